"""The demo, in small, and the comparison of training steps that it ends with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training import small

from fastlm import demo
from fastlm.testing import train_step
from fastlm.train import flops
from fastlm.train.metrics import read_metrics


@pytest.fixture
def run_demo(tmp_path):
    recipe = replace(small(data__documents="file", data__tokenizer="train:400"), name="demo")

    def run():
        return demo.demo(tmp_path, seconds=0.1, recipe=recipe, least_steps=6, corpus_bytes=50_000, rounds=1)

    return run


def test_demo(run_demo, tmp_path, capsys, monkeypatch):
    """Everything is there, a second run starts anew, a stopped one goes on."""
    pytest.importorskip("transformers")
    summary = run_demo()
    assert {"corpus.jsonl", "data", "metrics.jsonl", "summary.json", "loss.png", "hf"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    printed = capsys.readouterr().out
    assert demo.SENTENCE in printed
    assert printed.count("%") >= 5
    assert all(contender in printed for contender in train_step.CONTENDERS)
    assert "not run" not in printed
    assert printed.splitlines()[-1].startswith(f"Not judged, since {summary['steps']} steps are fewer than 600: ")

    monkeypatch.setattr(train_step, "compare_steps", lambda *_, **__: [])
    steps = len(read_metrics(tmp_path / "metrics.jsonl"))
    run_demo()
    assert "Starting anew" in capsys.readouterr().out
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    (tmp_path / "summary.json").unlink()
    run_demo()
    assert "Going on with the demo that was stopped" in capsys.readouterr().out
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
    (tmp_path / "recipe.json").write_text(json.dumps({"name": "demo", **small().tables()}))
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


def test_demo_replaces_no_other_run(run_demo, tmp_path):
    (tmp_path / "recipe.json").write_text('{"name": "mine"}')
    with pytest.raises(ValueError, match="holds a run that is no demo"):
        run_demo()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_contender_that_computes_something_else_is_an_error():
    train_step._same_losses({"fastlm": 5.0, "other": 5.0001}, 1e-4)
    for loss in (4.99, float("nan")):
        with pytest.raises(RuntimeError, match="other computes"):
            train_step._same_losses({"fastlm": 5.0, "other": loss}, 1e-4)


def test_a_contender_that_cannot_run_is_named(monkeypatch):
    times = [
        train_step.StepTime("fastlm", 100, 10.0, 1.0),
        train_step.StepTime("theirs", missing="it is not installed"),
    ]
    table = train_step.table(times, title="steps")
    assert list(table.columns[1].cells) == ["10,000"]
    assert "not run: theirs: it is not installed" in table.caption


def test_drawn_inputs():
    recipe = small()
    inputs = train_step.drawn(recipe, 100)
    for input_ids, labels in inputs.batches:
        assert input_ids.shape == labels.shape == (8, 32)
        assert torch.equal(labels != -100, input_ids == 4)
        assert labels[labels != -100].min() >= 5
        assert labels.max() < 100
    assert 0 < inputs.predicted < inputs.tokens == 256


@pytest.mark.parametrize(
    "made",
    [
        lambda: train_step.gpt2_step(2, 16, vocab_size=100, n_embd=32, n_layer=1, n_head=2),
        lambda: train_step.t5_step(2, 16, 8, vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
    ],
    ids=["gpt2", "t5"],
)
def test_steps_of_other_models(made, tmp_path):
    """fastlm and Transformers start from one loss, and take their steps."""
    pytest.importorskip("transformers")
    recipe, inputs = made()
    train_step._write_inputs(recipe, inputs, tmp_path, "cpu", None)
    cls, device = type(inputs.model), torch.device("cpu")
    losses = {}
    form = train_step._FORMS["transformers tuned"]
    for name, built in (
        ("fastlm", train_step.fastlm_step(cls.from_pretrained(tmp_path / "weights"), recipe.train, inputs.batches)),
        (
            "transformers",
            train_step._build_transformers(cls, recipe.train, tmp_path, inputs.batches, device, form),
        ),
    ):
        losses[name], step = built
        for _ in range(3):
            step(0)
    train_step._same_losses(losses, 1e-4)


def test_flops_of_other_models(tmp_path):
    """Against torch's count of Transformers' products, which masks what is causal but multiplies all of it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 2, "attn_implementation": "eager"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    ids = torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    want = flops.gpt2_flops(48, 2 * 3 * 16**2, 48, layers=2, hidden=32, inner=128, vocab=100)
    assert counter.get_total_flops() == want / 3

    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1}
    sizes |= {"num_heads": 3, "feed_forward_proj": "gated-gelu", "attn_implementation": "eager"}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with FlopCounterMode(display=False) as counter:
        model(ids, decoder_input_ids=ids[:, :5])
    want = flops.t5_flops(
        48, 15, 3 * 16**2, 2 * 3 * 5**2, 3 * 16 * 5,
        layers=2, decoder_layers=1, hidden=32, heads=24, inner=48, vocab=100, gated=True,
    )  # fmt: skip
    assert counter.get_total_flops() == want / 3
