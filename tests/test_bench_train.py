"""fastlm/bench/training.py: what a run prints and writes, on a fake clock."""

import json
from functools import partial

import pytest
from fake_clock import FakeClock
from step_workers import STEP_MS, Here
from training import set_options

from fastlm.bench import training
from fastlm.bench.compare import StepTime, compare_steps

SMALL = ["--device", "cpu", "--vocab", "300", *set_options()]


def test_a_run_writes_rows_and_curves(tmp_path, capsys):
    """fastlm beside Transformers: the same losses over the first steps, no dropout; rows, a bound, two pictures."""
    pytest.importorskip("transformers")
    options = ["--rounds", "2", "--seconds", "0.01", "--curve", "5", *SMALL]
    files = {"--json": "train.json", "--plot": "train.png", "--curve-plot": "curve.png"}
    contenders = ("fastlm", "transformers", "transformers tuned", "transformers patched")
    options += ["--contenders", *contenders, "transformers packed"]
    options += [str(x) for k, v in files.items() for x in (k, tmp_path / v)]
    clock = FakeClock()
    compare = partial(compare_steps, start=partial(Here, clock))
    assert training.main(options, compare=compare, clock=clock) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "not run: transformers packed: no row is padded" in printed
    assert "curves of 5 steps: at most" in printed
    content = json.loads((tmp_path / "train.json").read_text())
    rows = content["rows"]
    (missing,) = content["provenance"]["missing"]
    assert (missing["recipe"], missing["contender"]) == ("bert-mini", "transformers packed")
    assert [row["contender"] for row in rows] == list(contenders)
    for row in rows:
        assert row["ms"] == pytest.approx(STEP_MS)
        assert row["tokens_per_s"] == pytest.approx(256 / STEP_MS * 1e3)
        assert 0 < row["of_bound"] < 1
        assert row["losses"] == pytest.approx(rows[0]["losses"], rel=2e-3)
        assert row["curve_off"] <= row["curve_noise"]
        assert row["step_mb"] < row["peak_mb"]
    assert rows[0]["losses"][-1] < rows[0]["losses"][0]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("train.png", "curve.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curve", "2"], "--curve: expected at least 3 steps, got 2"),
        (["--curve-plot", "curve.png"], "--curve-plot: expected with --curve N"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--recipe", "t5"], "got 't5'; or of the fixed steps bert-mini-16x128, "),
        (
            ["--recipe", "t5-small-8x256", "--set", "train.batch_tokens=9"],
            "fixes model and batches; got train.batch_to",
        ),
        (["--recipe", "t5-small-8x256", "--set", "train.lr=fast"], "train.lr: expected a number, got 'fast'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    ],
)
def test_what_cannot_run_is_refused(options, message, capsys, monkeypatch):
    monkeypatch.setattr(training.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        training.main(["--device", "cpu", *options])
    assert message in capsys.readouterr().err


def test_recipes_without_time_left_are_named(tmp_path, capsys):
    clock = FakeClock()

    def compare(*_, **__):
        clock.advance(6000)
        return [StepTime("fastlm", 256, 10.0, 1.0)]

    options = ["--stop-after", "5", "--json", str(tmp_path / "train.json"), "--recipe", "bert-mini", "bert-small"]
    assert training.main([*SMALL, *options], compare=compare, clock=clock) == 0
    assert "left out after 5 s: bert-small 8x32" in capsys.readouterr().out
    content = json.loads((tmp_path / "train.json").read_text())
    assert [row["recipe"] for row in content["rows"]] == ["bert-mini"]
    assert content["provenance"]["left_out"] == [{"op": "bert-small", "shape": "8x32"}]


def test_a_wrong_contender_shows_in_the_exit_status(capsys):
    times = [StepTime("fastlm", 256, 10.0, 1.0), StepTime("transformers", missing="WRONG: computes a loss of 2")]
    assert training.main(SMALL, compare=lambda *_, **__: times, clock=FakeClock()) == 1
    assert "not run: transformers: WRONG: computes a loss of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "shape", "label"),
    [
        ("bert-mini-16x128", "16x128", "bert-mini-16x128"),
        ("bert-small-16x128-text", "16x72", "bert-small-16x128-text"),
        ("bert-mini", "64x128", "bert-mini 64x128"),
    ],
)
def test_a_step_is_labelled_with_its_rows_and_length(recipe, shape, label):
    assert training.step_label(recipe, shape) == label


def test_a_run_that_is_killed_leaves_the_contenders_that_it_has_timed(tmp_path):
    """The JSON after each contender: one row while the second is timed, both before the rounds end."""
    pytest.importorskip("transformers")
    clock, path, seen = FakeClock(), tmp_path / "train.json", []

    class Watched(Here):
        def run(self, steps, what="time"):
            rows = json.loads(path.read_text())["rows"] if path.exists() else []
            seen.append([row["contender"] for row in rows])
            return super().run(steps, what)

    options = [
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--contenders",
        "fastlm",
        "transformers",
        "--json",
        str(path),
        *SMALL,
    ]
    training.main(options, compare=partial(compare_steps, start=partial(Watched, clock)), clock=clock)
    assert seen[0] == []
    assert ["fastlm"] in seen
    assert ["fastlm", "transformers"] in seen
    rows = json.loads(path.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["fastlm", "transformers"]
    assert all(row["ms"] == pytest.approx(STEP_MS) for row in rows)
