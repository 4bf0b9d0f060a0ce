"""The demo, at a small size."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from training import small

from fastlm import demo, train
from fastlm.bench import compare
from fastlm.run.metrics import read_metrics


@pytest.fixture
def run_demo(tmp_path):
    recipe = replace(small(data__documents="file", data__tokenizer="train:400"), name="demo")

    def run():
        return demo.demo(tmp_path, seconds=0.1, recipe=recipe, least_steps=6, corpus_bytes=50_000, rounds=1)

    return run


def test_demo(run_demo, tmp_path, capsys, monkeypatch):
    """Everything is there, a second run starts anew, a stopped one continues."""
    pytest.importorskip("transformers")
    summary = run_demo()
    assert {"corpus.jsonl", "data", "metrics.jsonl", "summary.json", "loss.png", "hf"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    printed = capsys.readouterr().out
    assert demo.SENTENCE in printed
    assert printed.count("%") >= 5
    assert all(contender in printed for contender in compare.CONTENDERS)
    assert "not run" not in printed
    assert printed.splitlines()[-1].startswith(f"Not judged, since {summary['steps']} steps are fewer than 600: ")

    monkeypatch.setattr(compare, "compare_steps", lambda *_, **__: [])
    steps = len(read_metrics(tmp_path / "metrics.jsonl"))
    run_demo()
    assert "Starting anew" in capsys.readouterr().out
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    (tmp_path / "summary.json").unlink()
    run_demo()
    assert "Continuing the demo that was stopped" in capsys.readouterr().out
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == losses
    assert steps >= 6


@pytest.mark.parametrize(
    ("final", "steps", "good", "words"),
    [
        (6.25, 600, True, "The demo learned: the final loss, 6.250, is 0.250 nats below the unigram entropy, 6.500"),
        (6.2501, 600, False, "The demo failed: "),
        (6.6, 1276, False, "is -0.100 nats below the unigram entropy, 6.500, and at least 0.25 was expected"),
        (float("nan"), 600, False, "The demo failed: "),
        (6.6, 599, True, "Not judged, since 599 steps are fewer than 600"),
    ],
)
def test_what_the_demo_must_reach(final, steps, good, words, tmp_path, monkeypatch):
    summary = {"final_loss": final, "unigram_entropy": 6.5, "steps": steps}
    verdict = demo.judge(summary)
    assert verdict[0] is good
    assert words in verdict[1]
    monkeypatch.setattr(demo, "demo", lambda out, **_: summary)
    monkeypatch.setattr(demo._malloc, "tune", lambda: "left alone in tests")
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path)])
    if good:
        demo.main()
    else:
        with pytest.raises(SystemExit, match="error: The demo failed: "):
            demo.main()


def test_a_finished_demo_is_known_until_nothing_of_it_is_left(tmp_path, monkeypatch):
    """Killed at any point of its removal, the next call starts anew as well."""
    (tmp_path / "recipe.json").write_text(json.dumps({"name": "demo", **small().to_dict()}))
    for name in ("metrics.jsonl", "summary.json", "loss.png", "corpus.jsonl"):
        (tmp_path / name).write_text("{}")
    for name in ("checkpoints", "hf", "data"):
        (tmp_path / name).mkdir()
    unlink, said = Path.unlink, []

    def unlink_and_die(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_and_die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                demo._stopped_demo(tmp_path, said.append)
    assert (tmp_path / "summary.json").exists()
    assert demo._stopped_demo(tmp_path, said.append) is None
    assert [line.split(":")[0] for line in said] == ["Starting anew"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "data"]


def test_a_stopped_demo_is_no_success(run_demo, monkeypatch, capsys):
    result = train.Result(Path("out"), 3, None, signal.SIGTERM)
    monkeypatch.setattr(train, "pretrain", lambda *_: result)
    with pytest.raises(SystemExit) as exit:
        run_demo()
    assert exit.value.code == 143
    assert "the same command continues the run" in capsys.readouterr().out


def test_demo_replaces_no_other_run(run_demo, tmp_path):
    (tmp_path / "recipe.json").write_text('{"name": "mine"}')
    with pytest.raises(ValueError, match="holds a run that is no demo"):
        run_demo()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
