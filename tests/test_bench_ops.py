"""fastlm/bench/ops.py: the check before the clock, exact times on a fake clock, and what a run prints and writes."""

import dataclasses
import json
import types
from functools import partial

import pytest
import torch
from fake_clock import FakeClock, FakeGpuClock
from fake_cuda import FakeCuda

from fastlm.bench import op_worker, ops, results
from fastlm.bench.op_runner import AGREEMENT, OpRunner, disagreement
from fastlm.bench.op_worker import BENCHMARKS, OpWorker, Process, shapes
from fastlm.bench.peers import PEERS, Peer
from fastlm.testing.cases import CASES, Variant

KEYS = {"op", "shape", "dtype", "pass", "contender", "ms", "ms_iqr", "gbps", "tflops", "of_ceiling", "peak_mb"}
KEYS |= {"host_ms", "timed"}
COPY_MS, MATMUL_MS = 0.25, 2.0


def test_every_shape_has_a_label_of_its_own():
    for name, case in BENCHMARKS.items():
        for device in ("cpu", "cuda"):
            labels = [ops.label(case, variant) for variant in shapes(case, device)]
            assert len(set(labels)) == len(labels) > 0
        assert shapes(case, "cpu") == case.benchmarks
        assert name not in CASES or shapes(case, "cuda") != case.benchmarks


@pytest.mark.parametrize("skipped", ["rows", "output", "gradient", "gradient of weight", "nothing"])
def test_skipped_work_fails_the_check(skipped):
    """A layer_norm that leaves out rows, an output or a gradient is told from eager's; a complete one is not."""
    case = CASES["layer_norm"]
    sets = [case.inputs(Variant({"rows": 64, "cols": 32}), 0, torch.float32)]
    eager = PEERS["layer_norm"]["eager"]

    def contender(x, weight, **arguments):
        y, h = eager.function(x, weight.detach() if skipped == "gradient of weight" else weight, **arguments)
        if skipped == "rows":
            y = torch.cat([y[:-8], y[-8:] * 0])
        if skipped == "output":
            return y
        return y, h.detach().requires_grad_() if skipped == "gradient" else h

    got = OpRunner(contender, sets, {}).results()
    want = OpRunner.of(eager, sets, {}).results()
    wrong = disagreement(got, want, AGREEMENT[torch.float32])
    assert (wrong is None) == (skipped == "nothing")
    if skipped in ("output", "gradient of weight"):
        assert wrong == {"output": "output 1", "gradient of weight": "dweight"}[skipped] + " is missing"


class Here:
    """An op_worker.Process without a process: an OpWorker on a fake clock, with ceilings of known durations."""

    def __init__(self, clock):
        self.clock = clock
        self.worker = OpWorker(lambda device: clock)

    def __call__(self, method, *arguments):
        out = getattr(self.worker, method)(*arguments)
        if method == "prepare_ceilings":
            for name, ms in (("copy", COPY_MS), ("matmul", MATMUL_MS)):
                on_gpu = self.clock.on_gpu
                self.worker.ceilings[name] = partial(
                    *((self.clock.launch, 0.0) if on_gpu else (self.clock.advance,)), ms
                )
            return {"copy": 1000, "matmul": 4000}
        return out

    def close(self):
        pass


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def bench(monkeypatch, clock):
    """(a fake clock, a function that benches peers of layer_norm on a shape of 600 rows)."""
    eager = PEERS["layer_norm"]["eager"].function
    case = CASES["layer_norm"]

    def ours(*, backend, **arguments):
        clock.launch(0.4, 0.1) if clock.on_gpu else clock.advance(0.4)
        return case.function(**arguments, backend=backend)

    def run(whole=False, **functions):
        peers = {name: Peer(function) for name, function in functions.items()}
        monkeypatch.setitem(PEERS, "layer_norm", {"eager": Peer(eager), **peers})
        small = dataclasses.replace(case, function=ours, benchmarks=(Variant({"rows": 600, "cols": 256}),))
        monkeypatch.setitem(BENCHMARKS, "layer_norm", small)
        args = types.SimpleNamespace(device="cpu", vs=(*functions, "sdpa"), whole=whole, rounds=5, min_ms=2.0)
        return ops.bench_shape({"": Here(clock)}, "layer_norm", 0, "float32", args)

    monkeypatch.setattr(op_worker.ceilings, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(op_worker, "OURS", ("reference",))
    return clock, run


def test_times_are_those_of_the_clock(bench):
    """An op that is a fifth slower shows as that; GB/s and shares of a ceiling follow from the times."""
    clock, run = bench

    def paced(ms):
        def call(x, weight=None, bias=None, residual=None, rng=None):
            clock.advance(ms)
            return PEERS["layer_norm"]["eager"].function(x, weight, bias)

        return call

    rows, missing, beside, not_captured = run(even=paced(0.5), slower=paced(0.6))
    assert missing == {"sdpa": "has no layer_norm"}
    assert not_captured == {}
    assert {(row["timed"], row["host_ms"]) for row in rows} == {("host", None)}
    by = {(row["contender"], row["pass"]): row for row in rows}
    ms = {name: by[name, "fwd"]["ms"] for name, which in by if which == "fwd"}
    assert ms == pytest.approx({"even": 0.5, "slower": 0.6, "fastlm:reference": 0.4})
    moved = CASES["layer_norm"].bytes({"rows": 600, "cols": 256}, {}, 4, False)
    row = by["even", "fwd"]
    assert row.keys() == KEYS
    assert row["ms_iqr"] == pytest.approx(0.0)
    assert row["gbps"] == pytest.approx(moved / 0.5e-3 / 1e9)
    assert row["of_ceiling"] == pytest.approx(moved / 0.5 / (1000 / COPY_MS))
    assert by["slower", "fwd+bwd"]["ms"] == pytest.approx(0.6)  # the backward does not move this clock
    assert beside[0]["copy_gbps"] == pytest.approx(1000 / COPY_MS / 1e6)
    assert beside[0]["matmul_tflops"] == pytest.approx(4000 / MATMUL_MS / 1e9)
    line = next(line for line in ops.lines(rows) if " fwd " in line)
    assert "fastlm:reference" in line
    assert "400.0 us" in line
    assert "x  1.25 of even" in line
    assert ops.summary("layer_norm", rows)[0] == (
        "layer_norm fwd: fastlm:reference is x 1.25 of the best peer, geometric mean of 1 shapes"
    )
    assert {row["pass"] for row in run(whole=True, even=paced(0.5))[0]} == {"fwd+bwd"}


def test_skipped_work_or_an_overwritten_input_is_not_timed(bench):
    clock, run = bench
    eager = PEERS["layer_norm"]["eager"].function

    def skips(x, weight=None, bias=None, residual=None, rng=None):
        y, h = eager(x, weight, bias)
        return torch.cat([y[:-100], torch.zeros_like(y[-100:])]), h

    def overwrites(x, weight=None, bias=None, residual=None, rng=None):
        out = eager(x, weight, bias)
        x.data.zero_()  # unseen by autograd, as a kernel's writes are
        return out

    def honest(**arguments):
        clock.advance(1.0)
        return eager(**arguments)

    rows, missing, _, _ = run(overwrites=overwrites, skips=skips, honest=honest)
    assert missing["skips"].startswith(results.WRONG)
    assert missing["overwrites"] == "overwrites its x"
    assert {row["contender"] for row in rows} == {"honest", "fastlm:reference"}


@pytest.mark.parametrize("clock", [FakeGpuClock()])
def test_kernels_are_timed_by_graph_and_the_host_apart(bench, monkeypatch):
    """A peer of 53 us of Python and 47 us of kernel; one that synchronises is timed by launches, and marked."""
    clock, run = bench
    cuda = FakeCuda(clock).install(monkeypatch)
    eager = PEERS["layer_norm"]["eager"].function

    def launched(x, weight=None, bias=None, residual=None, rng=None):
        clock.launch(0.053, 0.047)
        return eager(x, weight, bias)

    def synchronises(**arguments):
        out = launched(**arguments)
        clock.wait()
        return out

    rows, _, _, not_captured = run(launched=launched, synchronises=synchronises)
    by = {(row["contender"], row["pass"]): row for row in rows}
    row = by["launched", "fwd"]
    assert (row["timed"], row["ms"], row["host_ms"]) == ("graph", pytest.approx(0.047), pytest.approx(0.053))
    assert by["synchronises", "fwd"]["timed"] == "launches"
    assert not_captured["synchronises fwd"].startswith("RuntimeError: operation failed")
    assert "launched fwd" not in not_captured
    assert cuda.current == "default"
    cuda.draw()
    line = next(line for line in ops.lines(rows) if " fwd " in line)
    assert "host   400.0 us" in line
    assert "launched 47.0" in line
    assert "synchronises* " in line
    # One graph for both passes of two contenders and of the ceilings, whatever the number of rounds.
    assert sum(graph.replays > 0 for graph in cuda.graphs) == 2 * (2 + 2)


def test_missing_contenders_share_a_line():
    lines = ops.missing_lines({"te": "is missing", "apex": "is missing", "sdpa": "has no gelu"})
    assert [line.strip() for line in lines] == ["te, apex: is missing", "sdpa: has no gelu"]


def test_a_loss_that_computes_its_gradient_is_labelled():
    row = dict.fromkeys(KEYS, 1.0) | {"shape": "s", "pass": "fwd", "contender": "fastlm:cpu"}
    assert "fwd (with gradient) fastlm:cpu" in ops.lines([row | {"op": "cross_entropy"}])[0]
    assert "with gradient" not in ops.lines([row | {"op": "gelu"}])[0]
    assert {op for op in CASES if CASES[op].gradient_in_forward} == {"cross_entropy", "linear_cross_entropy"}


def test_peers_by_default():
    assert set(ops.parse([]).vs) == {"eager", "compile", "sdpa", "chunked", "transformers"}
    assert {"sdpa-flash", "liger", "te", "apex"} < set(ops.default_vs("cuda"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "conv"], "--op: expected attention, "),
        (["--vs", "jax"], "got jax"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        ops.parse(options)
    assert message in capsys.readouterr().err


def test_a_run_writes_rows_with_their_provenance(tmp_path, capsys):
    """The smallest run there is: rows in the fixed format, a plot, a line for each shape. One second per call."""

    class Ticking(FakeClock):
        def now(self):
            self.advance(1.0)
            return self.seconds

    options = ["--op", "call overhead", "--vs", "eager,liger,sdpa", "--malloc", "default", "--rounds", "2"]
    files = ["--json", str(tmp_path / "ops.json"), "--plot", str(tmp_path / "ops.png")]
    clock = Ticking()
    assert ops.main([*options, *files], start=lambda allocator: Here(clock), clock=clock) == 0
    assert "of the best peer, geometric mean of 1 shapes" in capsys.readouterr().out
    written = json.loads((tmp_path / "ops.json").read_text())
    reasons = {one["contender"]: one["reason"] for one in written["provenance"]["missing"]}
    assert reasons == {"liger": "needs CUDA, the device is cpu", "sdpa": "has no layer_norm"}
    assert {"torch", "cpu", "commit", "dirty", "allocator", "ceilings", "command"} <= written["provenance"].keys()
    assert {(row["contender"], row["pass"]) for row in written["rows"]} >= {("eager", "fwd"), ("eager", "fwd+bwd")}
    assert all(row.keys() == KEYS and row["ms"] > 0 for row in written["rows"])
    assert (tmp_path / "ops.png").stat().st_size > 1000


def test_shapes_without_time_left_are_named(tmp_path, capsys, monkeypatch):
    """The first shapes of all ops come first; the clock is read at the start and before each shape."""
    clock = FakeClock()

    def bench_shape(processes, op, index, dtype, args):
        clock.advance(4000)
        return [], {}, [], {}

    monkeypatch.setattr(ops, "bench_shape", bench_shape)
    options = ["--op", "gelu,dropout", "--malloc", "default", "--seconds", "5", "--json", str(tmp_path / "ops.json")]
    assert ops.main(options, start=lambda allocator: Here(clock), clock=clock) == 0
    left_out = json.loads((tmp_path / "ops.json").read_text())["provenance"]["left_out"]
    names = [(one["op"], one["shape"]) for one in left_out]
    every = {(op, ops.label(BENCHMARKS[op], v)) for op in ("gelu", "dropout") for v in BENCHMARKS[op].benchmarks}
    first = {(op, ops.label(BENCHMARKS[op], BENCHMARKS[op].benchmarks[0])) for op in ("gelu", "dropout")}
    assert set(names) == every - first
    assert f"left out after 5 s: {' '.join(names[0])}" in capsys.readouterr().out


def test_a_process_has_its_own_allocator():
    process = Process("tuned")
    try:
        assert "tuned" in process("allocator")
        with pytest.raises(RuntimeError, match="KeyError"):
            process("prepare", "no such op", 0, torch.float32, "cpu", ())
    finally:
        process.close()
