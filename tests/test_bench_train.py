"""benchmarks/bench_train.py: what a run prints and writes; and that its clock tells a slower contender."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import set_options

from fastlm.testing import timing
from fastlm.testing.train_step import StepTime

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench_train_here(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_train

    return bench_train


def bench_train(*options):
    command = [sys.executable, BENCHMARKS / "bench_train.py", "--device", "cpu", "--vocab", "300", *options]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    )


def test_a_run_writes_rows_and_curves(tmp_path):
    """fastlm beside Transformers: the same losses over the first steps, no dropout; rows, a bound, two pictures."""
    options = ["--rounds", "2", "--seconds", "0.01", "--curve", "5", "--threads", "1", *set_options()]
    files = {"--json": "train.json", "--plot": "train.png", "--curve-plot": "curve.png"}
    contenders = ("fastlm", "transformers", "transformers tuned", "transformers patched")
    options += ["--contenders", *contenders, "transformers packed"]
    done = bench_train(*options, *(str(x) for k, v in files.items() for x in (k, tmp_path / v)))
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "not run: transformers packed: no row is padded" in done.stdout
    assert "curves of 5 steps: at most" in done.stdout
    content = json.loads((tmp_path / "train.json").read_text())
    rows = content["rows"]
    (missing,) = content["provenance"]["missing"]
    assert (missing["recipe"], missing["contender"]) == ("bert-mini", "transformers packed")
    assert [row["contender"] for row in rows] == list(contenders)
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(256 / row["ms"] * 1e3)
        assert 0 < row["of_bound"] < 1
        assert row["threads"] == 1
        assert row["losses"] == pytest.approx(rows[0]["losses"], rel=2e-3)
        assert row["curve_off"] <= row["curve_noise"]
        assert 0 < row["step_mb"] < row["peak_mb"]
    assert rows[0]["losses"][-1] < rows[0]["losses"][0]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("train.png", "curve.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curve", "2"], "--curve: expected at least 3 steps, got 2"),
        (["--curve-plot", "curve.png"], "--curve-plot: expected with --curve N"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--recipe", "t5"], "got 't5'; of fixed steps there are bert-mini-16x128, "),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    ],
)
def test_what_cannot_run_is_refused(bench_train_here, options, message, capsys, monkeypatch):
    monkeypatch.setattr(bench_train_here.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_train.py", "--device", "cpu", *options])
    with pytest.raises(SystemExit, match="2"):
        bench_train_here.main()
    assert message in capsys.readouterr().err


def test_what_there_is_no_time_for_is_named(bench_train_here, tmp_path, capsys, monkeypatch):
    """The first recipe runs; `began` and a look at the clock for each are all that asks for the time."""
    monkeypatch.setattr(bench_train_here, "compare_steps", lambda *_, **__: [StepTime("fastlm", 256, 10.0, 1.0)])
    monkeypatch.setattr(bench_train_here, "monotonic", iter([0.0, 4.0, 6.0]).__next__)
    options = ["--device", "cpu", "--vocab", "300", "--stop-after", "5", "--json", str(tmp_path / "train.json")]
    options += ["--recipe", "bert-mini", "bert-small", *set_options()]
    monkeypatch.setattr("sys.argv", ["bench_train.py", *options])
    assert bench_train_here.main() == 0
    assert "left out after 5 s: bert-small 8x32" in capsys.readouterr().out
    content = json.loads((tmp_path / "train.json").read_text())
    assert [row["recipe"] for row in content["rows"]] == ["bert-mini"]
    assert content["provenance"]["left_out"] == [{"op": "bert-small", "shape": "8x32"}]


def test_who_is_wrong_shows_in_the_exit_status(bench_train_here, capsys, monkeypatch):
    times = [StepTime("fastlm", 256, 10.0, 1.0), StepTime("transformers", missing="WRONG: computes a loss of 2")]
    monkeypatch.setattr(bench_train_here, "compare_steps", lambda *_, **__: times)
    monkeypatch.setattr("sys.argv", ["bench_train.py", "--device", "cpu", "--vocab", "300", *set_options()])
    assert bench_train_here.main() == 1
    assert "not run: transformers: WRONG: computes a loss of 2" in capsys.readouterr().out


def test_no_contender_always_has_the_same_place():
    """Every round runs each of them once, in an order of its own, the same ones in every run."""

    def orders():
        ran = []
        timers = {name: lambda calls, name=name: ran.append(name) or 1.0 for name in "abcd"}
        times = timing.interleaved_timers(timers, rounds=12, min_ms=1.0)
        assert all(len(of.rounds) == 12 for of in times.values())
        ran = ran[-12 * len(timers) :]  # without the warm-up
        return [ran[start : start + 4] for start in range(0, len(ran), 4)]

    drawn = orders()
    assert all(sorted(order) == list("abcd") for order in drawn)
    assert all({order[place] for order in drawn} == set("abcd") for place in (0, 3))
    assert orders() == drawn


def test_a_contender_that_is_a_fifth_slower_shows_as_that():
    def spin(ms):
        def run():
            end = time.perf_counter() + ms / 1e3
            while time.perf_counter() < end:
                pass

        return run

    # Calls so short that few meet a switch to another process, where the machine is busy.
    times = timing.interleaved({"a": spin(0.2), "slower": spin(0.24)}, rounds=51, min_ms=0.1)
    assert times["slower"].ms / times["a"].ms == pytest.approx(1.2, rel=0.05)
