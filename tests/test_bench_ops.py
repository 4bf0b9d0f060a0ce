"""benchmarks/bench_ops.py: the check before the clock, and what a run writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
KEYS = {"op", "shape", "dtype", "pass", "contender", "ms", "ms_iqr", "gbps", "tflops", "of_ceiling", "peak_mb"}


@pytest.fixture
def bench_ops(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_ops

    return bench_ops


def test_every_op_has_peers_and_distinct_labels(bench_ops):
    for case in bench_ops.BENCHMARKS.values():
        assert "eager" in bench_ops.PEERS[case.op]
        labels = [bench_ops.label(case, variant) for variant in case.benchmarks]
        assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("skipped", ["rows", "gradient", "nothing"])
def test_skipped_work_fails_the_check(bench_ops, skipped):
    """A layer_norm that leaves rows out, or a gradient, is told from eager's; one that works is not."""
    case = bench_ops.CASES["layer_norm"]
    sets = [case.inputs(bench_ops.Variant({"rows": 64, "cols": 32}), 0, torch.float32)]
    eager = bench_ops.PEERS["layer_norm"]["eager"]

    def contender(x, **arguments):
        y, h = eager.function(x, **arguments)
        if skipped == "rows":
            y = torch.cat([y[:-8], y[-8:] * 0])
        return y, h.detach().requires_grad_() if skipped == "gradient" else h

    got = bench_ops.Contender(contender, sets, {}).results()
    want = bench_ops.adapted(eager, sets, {}).results()
    wrong = bench_ops.disagreement(got, want, bench_ops.AGREEMENT[torch.float32])
    assert (wrong is None) == (skipped == "nothing")


@pytest.mark.parametrize("lengths", [(), (5, 9, 1)], ids=["padded", "packed"])
def test_attention_peers_agree_with_the_op(bench_ops, lengths):
    """The peers' own form of the inputs, padded with a mask where the op's are packed, gives the op's results."""
    case = bench_ops.CASES["attention"]
    shape = {"h": 2, "d": 8, "lengths": lengths} if lengths else {"b": 2, "s": 11, "h": 2, "d": 8}
    options = {} if lengths else {"causal": True}
    sets = [case.inputs(bench_ops.Variant(shape), 0, torch.float32)]
    want = bench_ops.Contender(case.reference, sets, options, outputs=1).results()
    for name in ("eager", "sdpa"):
        got = bench_ops.adapted(bench_ops.PEERS["attention"][name], sets, options).results()
        assert {"output 0", "dq", "dk", "dv"} <= got.keys() & want.keys()
        assert bench_ops.disagreement(got, want, 1e-5) is None


def test_a_run_writes_rows_with_their_provenance(tmp_path):
    """The smallest run there is, through the command line: rows in the fixed format, a plot, a line for each shape."""
    options = ["--vs", "eager", "--malloc", "default", "--rounds", "2", "--min-ms", "1"]
    files = ["--json", tmp_path / "ops.json", "--plot", tmp_path / "ops.png"]
    command = [sys.executable, BENCHMARKS / "bench_ops.py", "--op", "call overhead", *options, *files]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert "of the best peer, geometric mean of 1 shapes" in done.stdout
    written = json.loads((tmp_path / "ops.json").read_text())
    assert {"torch", "cpu", "commit", "dirty", "allocator", "ceilings", "command"} <= written["provenance"].keys()
    assert {(row["contender"], row["pass"]) for row in written["rows"]} >= {("eager", "fwd"), ("eager", "fwd+bwd")}
    for row in written["rows"]:
        assert row.keys() == KEYS
        assert row["ms"] > 0
    assert (tmp_path / "ops.png").stat().st_size > 1000
