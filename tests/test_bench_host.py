"""fastlm/bench/host.py: every contender runs with its launches left out; times are those of a fake clock."""

import json

import pytest
import torch
from fake_clock import FakeClock

from fastlm import _native, ops
from fastlm.bench import host
from fastlm.testing.cases import CASES


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_microseconds_are_those_of_the_clock(monkeypatch):
    """The best round and the median; contenders that a pass does not concern have no row."""
    clock, calls = FakeClock(), []

    def fastlm(t, backend):
        calls.append(torch.is_grad_enabled())
        clock.advance(0.005 if len(calls) <= 3 * (host.WARMUP + 4) else 0.007)  # the first of three rounds is faster
        return t["x"] * 2

    monkeypatch.setitem(host.CALLS, "gelu", {"fastlm": fastlm, "aten": lambda t, _: clock.advance(0.002) or t["x"] * 2})
    rows = host.measure("gelu", ["cpu"], 3, 4, clock)
    by = {(row["contender"], row["pass"]): (row["us"], row["median_us"]) for row in rows}
    assert by == {
        **{("fastlm cpu", which): pytest.approx((5.0, 7.0)) for which in host.PASSES},
        **{("aten", which): pytest.approx((2.0, 2.0)) for which in host.PASSES},
    }
    assert calls[0] is False
    assert calls[host.WARMUP + 4] is True
    assert "5.0 (7.0)" in host.table(rows)[1]


def test_every_op_is_timed(tmp_path, capsys, threads):
    """One real call of each, launches left out; a millisecond a call."""

    class Ticking(FakeClock):
        def now(self):
            self.advance(1.0)
            return self.seconds

    options = ["--rounds", "1", "--calls", "1", "--backend", "cuda", "--backend", "cpu"]
    assert host.main([*options, "--json", str(tmp_path / "host.json")], clock=Ticking()) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "host.json").read_text())
    assert report["provenance"]["rounds"] == 1
    assert all(row["us"] == pytest.approx(1000.0) for row in report["rows"])
    timed = {(row["op"], row["pass"]) for row in report["rows"] if row["contender"] == "fastlm cpu"}
    assert {op for op, _ in timed} == CASES.keys()
    assert ("layer_norm", "fwd+bwd") in timed
    assert len({len(line) for line in said.splitlines() if line.startswith(("us,", "gelu,", "rms_norm,"))}) == 1
    if _native.cuda() is None:
        assert "cuda is left out" in said
    else:
        assert "goal of layer_norm, fwd on cuda: 15 us" in said


@pytest.mark.skipif(_native.cuda() is None, reason="fastlm._cuda is not built")
def test_dropped_launches_run_nothing_and_end():
    x = torch.randn(3, 8)
    _native.drop_cuda_launches(True)
    try:
        assert ops.layer_norm(x, backend="cuda").shape == x.shape
    finally:
        _native.drop_cuda_launches(False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='backend="cuda" cannot run'):
            ops.layer_norm(x, backend="cuda")
