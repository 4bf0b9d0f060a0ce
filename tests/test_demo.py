"""The demo, at a small size."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training import small
from typer.testing import CliRunner

from fastlm import cli, demo, train
from fastlm.bench import compare
from fastlm.demo import _bert, _gpt2, _t5
from fastlm.demo._held_out import held_out_sentences
from fastlm.demo._ngrams import Trigrams, before
from fastlm.run.metrics import read_metrics
from fastlm.run.recipe import load_recipe

DATA = {"data.row_tokens": 32, "data.validation_share": 0.2, "train.batch_tokens": 256, "train.lr": 5e-3}
GPT2 = {"model.n_embd": 32, "model.n_layer": 1, "model.n_head": 2, "model.n_positions": 32}
T5 = {"model.d_model": 32, "model.d_ff": 64, "model.d_kv": 16, "model.num_heads": 2, "model.num_layers": 1}


def recipe_of(kind):
    if kind == "bert":
        recipe = small(data__documents="file", data__tokenizer="train:400", data__validation_share=0.2)
    elif kind == "gpt2":
        recipe = load_recipe("gpt2-mini").with_values({**DATA, **GPT2, "data.tokenizer": "train:400"})
    else:
        recipe = load_recipe("t5-mini").with_values({**DATA, **T5, "data.tokenizer": "train:500"})
    return replace(recipe, name=demo._name(kind))


@pytest.fixture
def run_demo(tmp_path):
    def run(kind="bert"):
        return demo.demo(
            tmp_path, seconds=0.1, kind=kind, recipe=recipe_of(kind), least_steps=6, corpus_bytes=60_000, rounds=1
        )

    return run


def test_demo(run_demo, tmp_path, capsys, monkeypatch):
    """Everything is there, a second run starts anew, a stopped one continues."""
    pytest.importorskip("transformers")
    summary = run_demo()
    assert {"corpus.jsonl", "data", "metrics.jsonl", "summary.json", "demo.json", "loss.png", "hf"} <= {
        path.name for path in tmp_path.iterdir()
    }
    written = [json.loads((tmp_path / name).read_text()) for name in ("summary.json", "demo.json")]
    assert {**written[0], **written[1]} == summary
    assert 0.0 <= summary["top1"] <= summary["top5"] <= 1.0
    assert summary["held_out_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert 0.0 < summary["unigram_top1"] <= summary["unigram_top5"] < 1.0
    printed = capsys.readouterr().out
    assert summary["corpus"][:16] in printed
    assert printed.count("[MASK]") >= 1
    assert "masks of held-out text" in printed
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


def test_gpt2_demo(run_demo, tmp_path, capsys):
    """Its bits a character are those that training found, and sampling again gives the same text."""
    summary = run_demo("gpt2")
    printed = capsys.readouterr().out
    assert "▸" in printed
    assert "trigrams of tokens" in printed
    predicted = summary["held_out_tokens"]
    nats = summary["bits_per_character"] * np.log(2) * summary["held_out_characters"] / predicted
    assert nats == pytest.approx(summary["val_loss"], rel=1e-5)
    assert 0.0 < summary["trigram_bits_per_character"] < summary["unigram_bits_per_character"] < 8.0
    (tmp_path / "summary.json").unlink()
    assert run_demo("gpt2")["bits_per_character"] == summary["bits_per_character"]
    assert [line for line in printed.splitlines() if "▸" in line] == [
        line for line in capsys.readouterr().out.splitlines() if "▸" in line
    ]


def test_t5_demo(run_demo, capsys):
    summary = run_demo("t5")
    printed = capsys.readouterr().out
    assert "____" in printed
    assert "trigrams of tokens" in printed
    assert summary["held_out_span_tokens"] > 100
    assert 0.0 < summary["trigram_accuracy"] < 1.0
    assert 0.0 < summary["unigram_accuracy"] < summary["trigram_accuracy"]
    assert 0.0 <= summary["span_token_accuracy"] < 1.0
    with pytest.raises(ValueError, match="holds a run that is not demo-gpt2; name another directory"):
        run_demo("gpt2")


GPT2_FOUND = {
    "kind": "gpt2",
    "bits_per_character": 1.69,
    "trigram_bits_per_character": 1.6,
    "unigram_bits_per_character": 2.0,
}
T5_FOUND = {"kind": "t5", "span_token_accuracy": 0.21, "trigram_accuracy": 0.3, "unigram_accuracy": 0.1}
BERT = {"kind": "bert", "unigram_held_out_loss": 6.5, "held_out_loss": 6.14, "top5": 0.27, "unigram_top5": 0.2}


@pytest.mark.parametrize(
    ("module", "found", "good"),
    [
        (_bert, BERT, True),
        (_bert, {**BERT, "held_out_loss": 6.16}, False),
        (_bert, {**BERT, "held_out_loss": float("nan")}, False),
        (_bert, {**BERT, "top5": 0.25}, False),
        (_gpt2, GPT2_FOUND, True),
        (_gpt2, {**GPT2_FOUND, "bits_per_character": 1.71}, False),
        (_gpt2, {**GPT2_FOUND, "bits_per_character": float("nan")}, False),
        (_t5, T5_FOUND, True),
        (_t5, {**T5_FOUND, "span_token_accuracy": 0.19}, False),
    ],
)
def test_what_the_demo_must_reach(module, found, good, tmp_path, monkeypatch):
    assert module.judge(found)[0] is good
    steps = module.LEAST_STEPS
    few, many = {**found, "steps": steps - 1}, {**found, "steps": steps}
    assert demo.judge(few)[0]
    assert demo.judge(few)[1].startswith(f"Not judged, since {steps - 1} steps are fewer than {steps}: ")
    assert demo.judge(many)[0] is good
    assert demo.judge(many)[1].startswith("The demo learned: " if good else "The demo failed: ")

    kinds = []
    monkeypatch.setattr(demo, "demo", lambda out, kind, **_: kinds.append((out, kind)) or many)
    ran = CliRunner().invoke(cli.app, ["demo", found["kind"]])
    assert kinds == [(Path(f"runs/demo-{found['kind']}"), found["kind"])]
    assert ran.exit_code == (0 if good else 1)


def test_a_demo_of_another_kind():
    with pytest.raises(ValueError, match="demo: expected one of bert, gpt2, t5, got 'llama'"):
        demo.recipe_of("llama")


@pytest.mark.parametrize("kind", demo.KINDS)
def test_the_demos_recipes_hold_text_out(kind):
    assert demo.recipe_of(kind).data.validation_share == demo.HELD_OUT


def test_trigrams_by_hand():
    """3 tokens, a b c = 0 1 2 once, 0 1 1 once, 2 1 2 twice: probabilities by the formula, which sum to 1."""
    a, b, c = np.array([[0, 0, 2, 2], [1, 1, 1, 1], [2, 1, 2, 2]])
    model = Trigrams(a, b, c, 3)
    unigram = np.array([0.5, 1.5, 3.5]) / 5.5
    two = np.array([0.0, 0.25, 2.25]) / 4 + 0.75 * 2 / 4 * unigram
    three = np.array([0.0, 0.25, 0.25]) / 2 + 0.75 * 2 / 2 * two
    np.testing.assert_allclose(np.exp(-model.nats(*np.array([[0] * 3, [1] * 3, [0, 1, 2]]))), three)
    assert three.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(np.exp(-model.nats(*np.array([[1], [1], [2]]))), two[2:])  # 1 1 never occurred
    np.testing.assert_allclose(np.exp(-model.nats(*np.array([[1], [3], [2]]))), unigram[2:])  # nor did 3
    assert model.best(np.array([0, 2, 1, 0]), np.array([1, 1, 1, 3])).tolist() == [1, 2, 2, 2]
    ids, positions = np.array([5, 6, 7, 8, 9]), np.array([0, 1, 2, 0, 1])
    assert before(ids, positions, 1, 99).tolist() == [99, 5, 6, 99, 8]
    assert before(ids, positions, 2, 99).tolist() == [99, 99, 5, 99, 99]


def test_held_out_sentences_are_those_of_held_out_documents(tmp_path):
    from fastlm.data import open_dataset, prepare
    from fastlm.data.batches import make_batch

    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [f"The {a} of the {b} is kept in a file of this name. It is 3." for a in numbers for b in numbers]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([path], "train:100", tmp_path / "rows", row_tokens=64, validation_share=0.2)
    held = open_dataset(tmp_path / "rows", split="validation")
    batch = make_batch(held, np.zeros(held.rows, np.int64), np.arange(held.rows))
    decoded = held.tokenizer.decode(batch.input_ids)
    found = held_out_sentences(path, 0.2, 1000)
    assert len(found) == held.documents
    assert all(sentence.lower().rstrip(".") in decoded for sentence in found)
    few = held_out_sentences(path, 0.2, 3)
    assert len(few) == 3
    assert set(few) < set(found)
    assert held_out_sentences(path, 0.2, 3, longest=10) == []


def test_a_finished_demo_is_known_until_nothing_of_it_is_left(tmp_path, monkeypatch):
    """Killed at any point of its removal, the next call starts anew as well."""
    (tmp_path / "recipe.json").write_text(json.dumps({"name": "demo", **small().to_dict()}))
    for name in ("metrics.jsonl", "summary.json", "loss.png", "corpus.jsonl", "demo.json"):
        (tmp_path / name).write_text("{}")
    for name in ("checkpoints", "hf", "data"):
        (tmp_path / name).mkdir()
    unlink, said = Path.unlink, []

    def unlink_and_die(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_and_die)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                demo._stopped_demo(tmp_path, "demo", said.append)
    assert (tmp_path / "summary.json").exists()
    assert demo._stopped_demo(tmp_path, "demo", said.append) is None
    assert [line.split(":")[0] for line in said] == ["Starting anew"] * 4
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
    with pytest.raises(ValueError, match="holds a run that is not demo"):
        run_demo()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
