"""Fine-tuning: tasks on labelled examples, on the trainer's loop, and what a run leaves."""

import gzip
import json
import os
import signal
import subprocess
import sys
import warnings
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from labelled import TINY, make_model, reviews, sentences, write_conll, write_csv, write_jsonl
from models import to_transformers
from torch.utils.flop_counter import FlopCounterMode

from fastlm import _threads
from fastlm.data import Tokenizer
from fastlm.data.labelled import Record, read_records
from fastlm.data.sources import Report
from fastlm.finetune_cli import predict
from fastlm.models import BertConfig, BertForSequenceClassification, BertForTokenClassification, Counts
from fastlm.predict import Predictor, describe
from fastlm.run.initial import find_initial
from fastlm.run.labelled import open_examples
from fastlm.run.metrics import read_metrics
from fastlm.run.recipe import Recipe
from fastlm.tasks import find_task
from fastlm.train import finetune as finetuning
from fastlm.train import loop, pretrain
from fastlm.train.best import Best
from fastlm.train.finetune import finetune, finetune_seeds
from fastlm.train.optimizer import lr_at
from fastlm.train.watch import Counters

CPU = torch.device("cpu")
FAST = {"train.lr": 5e-3, "train.epochs": 4.0, "train.batch_size": 16, "model.hidden_dropout_prob": 0.0}
OFF = {"model.hidden_dropout_prob": 0.0, "model.attention_probs_dropout_prob": 0.0}


def recipe_of(task, **settings):
    return Recipe(task, name=task).with_values({**FAST, **{k.replace("__", "."): v for k, v in settings.items()}})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="left out|the head starts anew")
        yield


def loaded(task, data, model, **settings):
    """The task on its data, and the model with its new head."""
    initial = find_initial(model)
    recipe, found = open_examples(initial.recipe(recipe_of(task, **settings)), data, initial.tokenizer)
    made = find_task(task)(recipe, found.train, CPU, found.validation)
    return made, initial.model(recipe, found.train.tokenizer, made.head())


# ---- one run of each kind, and what it leaves


def numbers(count):
    return [(text, {"pos": 1.0, "neg": -1.0}[label] + 0.25 * ("two" in text)) for text, label in reviews(count)]


def topics(count):
    """Several labels a text."""
    return [{"text": text, "labels": ["good", "seen"] if label == "pos" else ["bad"]} for text, label in reviews(count)]


def pairs(count):
    rows = reviews(count)
    first, second = rows, reviews(count, seed=1)
    return [(a[0], b[0], "same" if a[1] == b[1] else "other") for a, b in zip(first, second)]


KINDS = {
    "classes": ("classify", lambda p: write_csv(p / "a.csv", reviews(240)), {}, "accuracy", 0.95),
    "several": (
        "classify",
        lambda p: write_jsonl(p / "a.jsonl", topics(240)),
        {},
        "f1_micro",
        0.9,
    ),
    "pairs": (
        "classify",
        lambda p: write_csv(p / "a.csv", pairs(60), ("sentence1", "sentence2", "label")),
        {"train__epochs": 1.0},
        "accuracy",
        0.0,
    ),
    "numbers": ("regress", lambda p: write_csv(p / "a.csv", numbers(240), ("text", "score")), {}, "pearson", 0.9),
    "tags": ("tag", lambda p: write_conll(p / "a.conll", sentences(160)), {}, "f1", 0.9),
}


EACH = [pytest.param(kind, marks=[pytest.mark.long] if kind == "pairs" else []) for kind in KINDS]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """Runs of KINDS by name, made once each: (directory, data)."""
    made = {}

    def run(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            task, write, settings, *_ = KINDS[kind]
            data = write(folder)
            if kind == "tags":
                settings = {"data__test": str(write_conll(folder / "test.conll", sentences(10, seed=3)))}
            finetune(recipe_of(task, **settings), model, data, folder / "run")
            made[kind] = folder / "run", data
        return made[kind]

    return run


@pytest.mark.parametrize("kind", EACH)
def test_a_run_learns_and_leaves_its_figures(kind, finished):
    out, _ = finished(kind)
    *_, figure, least = KINDS[kind]
    content = json.loads((out / "metrics.json").read_text())
    assert content["metric"] == figure
    assert content["metrics"][figure] >= least
    assert content["seconds"]["training"] > 0
    held = content["examples"]["validation"]
    assert held == round(0.1 * (held + content["examples"]["train"]))
    assert content["examples"]["test"] == (10 if kind == "tags" else None)
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    if kind != "several":
        assert (out / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    if "confusion" in content:
        counts = np.array(content["confusion"]["counts"])
        assert content["metrics"]["accuracy"] == pytest.approx(np.trace(counts) / counts.sum())
    rows = read_metrics(out / "metrics.jsonl")
    best = next(row for row in rows if row["step"] == content["best_step"])
    assert best[f"val_{figure}"] == content["metrics"][figure]
    assert best[f"val_{figure}"] == max(row[f"val_{figure}"] for row in rows if f"val_{figure}" in row)


@pytest.mark.parametrize("kind", EACH)
def test_pipelines_of_transformers_agree_with_predict(kind, finished):
    """OUT/hf loads with names of labels, and gives the probabilities that `fastlm predict` writes."""
    out, data = finished(kind)
    predictor, report = Predictor(out), Report()
    records = read_records(data, report, plain="conll" if kind == "tags" else "line").rows[:9]
    ours = list(predictor.predict(records, report, window=5, tokens=40))
    assert [said["place"] for said in ours] == [record.place for record in records]
    name = "token-classification" if kind == "tags" else "text-classification"
    if kind == "tags":
        theirs = transformers.pipeline(name, str(out / "hf"), aggregation_strategy="none")
        for said in ours:
            spans = theirs(" ".join(said["tokens"]))
            assert {span["entity"] for span in spans} <= set(predictor.labels)
            assert {tag for tag in said["tags"] if tag != "O"} <= {span["entity"] for span in spans}
        assert ours[0]["entities"][0]["type"] == "person"
        return
    theirs = transformers.pipeline(name, str(out / "hf"), top_k=None)
    for said in ours:
        text = said["text"]
        given = text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
        options = {"function_to_apply": "none"} if kind == "numbers" else {}
        (entries,) = theirs([given], **options)
        expected = {entry["label"]: entry["score"] for entry in entries}
        if kind == "numbers":
            assert said["value"] == pytest.approx(expected["score"], abs=1e-4)
        else:
            assert said["probabilities"] == pytest.approx(expected, abs=1e-4)


def test_predict_cuts_texts_where_the_run_did(finished, tmp_path):
    out, data = finished("classes")
    assert Predictor(out).longest == 48  # data.max_length was not given
    stored = json.loads((out / "recipe.json").read_text())
    assert stored["data"]["longest"] < stored["data"]["max_length"] == 48
    (tmp_path / "hf").symlink_to(out / "hf")
    (tmp_path / "recipe.json").write_text(json.dumps({"data": {"max_length": 5}}))
    predictor, records = Predictor(tmp_path), read_records(data, Report(), plain="line").rows[:9]
    assert len(list(predictor.predict(records, Report()))) == 9
    assert (predictor.longest, predictor.cut) == (5, 9)


# ---- the same as Transformers


def their_inputs(micro, starts):
    """A packed micro-batch, padded for Transformers."""
    rows = list(pairwise(starts))
    width = max(stop - start for start, stop in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (start, stop) in enumerate(rows):
        ids[row, : stop - start] = micro.inputs["input_ids"][start:stop]
        mask[row, : stop - start] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": micro.inputs["labels"]}


def losses_in_transformers(task, model, steps):
    """Transformers' losses over the same batches, with torch's AdamW by the recipe's schedule."""
    theirs, table = to_transformers(model), task.recipe.train
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": table.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(table.beta1, table.beta2), eps=table.eps)
    losses = []
    for step in range(steps):
        micro = task.micro(step, 0)
        loss = theirs(**their_inputs(micro, micro.inputs["cu_seqlens"].tolist())).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), table.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, table)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_losses(model, data, out, steps, **settings):
    settings = {"train__max_steps": steps, "train__lr": 1e-3, **settings}
    settings |= {name.replace(".", "__"): value for name, value in OFF.items()}
    task, started = loaded("classify", data, model, **settings)
    theirs = losses_in_transformers(task, started.train(), steps)
    finetune(recipe_of("classify", **settings), model, data, out)
    ours = [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
    assert len(ours) == steps
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert len(set(ours)) == steps


def test_losses_are_those_of_transformers(model, tmp_path):
    same_losses(model, write_csv(tmp_path / "a.csv", reviews(200)), tmp_path / "run", steps=20)


@pytest.mark.long
def test_losses_of_real_weights_are_those_of_transformers(tmp_path):
    from test_bert_heads import minilm

    directory = minilm.__wrapped__()
    rows = write_csv(tmp_path / "a.csv", reviews(400))
    same_losses(directory, rows, tmp_path / "run", steps=40, train__lr=5e-5, train__batch_size=32)


@pytest.mark.parametrize("task", ["classify", "tag", "regress"])
def test_packed_and_padded_batches_have_the_same_losses(task, model, tmp_path):
    data = {
        "classify": lambda: write_csv(tmp_path / "a.csv", reviews(40)),
        "tag": lambda: write_conll(tmp_path / "a.conll", sentences(40)),
        "regress": lambda: write_csv(tmp_path / "a.csv", numbers(40), ("text", "score")),
    }[task]()
    off = {name.replace(".", "__"): value for name, value in OFF.items()}
    found, shapes = [], []
    for layout in ("packed", "padded"):
        made, started = loaded(task, data, model, data__layout=layout, **off)
        micro = made.micro(0, 0)
        shapes.append(micro.inputs["input_ids"].dim())
        with torch.no_grad():
            found.append((float(started.eval()(**micro.inputs)), made.score(started, micro)[1]))
    assert shapes == [1, 2]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_rows_filled_up_for_a_graph_have_the_same_loss(task, model, tmp_path):
    """As on a GPU: every micro-batch of the run has one shape."""
    rows = write_csv(tmp_path / "a.csv", reviews(40)) if task == "classify" else None
    data = rows or write_conll(tmp_path / "a.conll", sentences(40))
    made, started = loaded(task, data, model, train__batch_size=6, data__layout="packed")
    started.eval()
    made.device = torch.device("cuda")
    shapes = set()
    with torch.no_grad():
        for step in range(8):
            _, numbers_of = made.batches.rows_at(step)
            filled = made.micro(step, 0)
            plain = made.make_rows(made.dataset, numbers_of, filled.inputs["rng"])
            shapes.add(tuple((k, tuple(v.shape)) for k, v in filled.inputs.items() if isinstance(v, torch.Tensor)))
            assert float(started(**filled.inputs)) == pytest.approx(float(started(**plain.inputs)), rel=1e-5)
            assert filled.inputs["input_ids"].numel() >= plain.inputs["input_ids"].numel()
    assert len(shapes) == 1


def test_examples_of_one_length_are_padded_not_packed(model, tmp_path):
    rows = [(f"a film is {word}", label) for word, label in (("good", "pos"), ("bad", "neg"))] * 20
    made, _ = loaded("classify", write_csv(tmp_path / "a.csv", rows), model)
    assert made.layout == "padded"
    assert "attention_mask" not in made.micro(0, 0).inputs
    assert "batches are padded, 100% full" in made.describe()
    made, _ = loaded("classify", write_csv(tmp_path / "b.csv", reviews(40)), model)
    assert made.layout == "packed"
    assert "batches are packed, padded to the longest they would be" in made.describe()


# ---- words and tokens


def test_only_the_first_token_of_a_word_bears_its_label(model, tmp_path):
    rows = [(["Anna", "showfriends", "Rome"], ["B-person", "O", "B-place"])] * 12
    made, _ = loaded("tag", write_conll(tmp_path / "a.conll", rows), model)
    ids, labels = made.dataset.ids.take(np.array([0])), made.dataset.fields["labels"].take(np.array([0]))
    pieces = Tokenizer.load(model).backend.encode(["Anna", "showfriends", "Rome"], is_pretokenized=True).tokens
    assert len(ids) == len(labels) == len(pieces)
    assert sum(piece.startswith("##") for piece in pieces) > 2
    names = made.dataset.labels
    borne = [names[label] for piece, label in zip(pieces, labels) if label != -100]
    assert borne == ["B-person", "O", "B-place"]
    assert all(label == -100 for piece, label in zip(pieces, labels) if piece.startswith(("##", "[")))


def test_what_is_cut_off_is_counted_and_predicted_as_outside(model, tmp_path):
    rows = [(["a", "a", "a", "a", "Rome"], ["O", "O", "O", "O", "B-place"]), (["Rome"], ["B-place"])] * 6
    made, started = loaded("tag", write_conll(tmp_path / "a.conll", rows), model, data__max_length=6)
    assert made.dataset.cut == {"texts": 6, "labels": 6, "words without a token": 0}
    assert made.notes() == [
        "data: cut off at 6 tokens: 6 texts, 6 labels",
        "held out: 1 of 1 examples have a text that is trained on",
    ]
    assert made.dataset.row_tokens == 6
    outputs = np.concatenate([made.score(started.eval(), micro)[1].detach() for micro in made.evaluation()])
    scores = made.scores(np.eye(2)[np.full(len(outputs), made.dataset.labels.index("B-place"))])
    true = sum(len(made.validation.fields["tags"].take(np.array([i]))) for i in range(made.validation.rows))
    assert len(outputs) < true
    assert scores["recall"] < 1.0
    rows = [([*"aaaa", "Rome"], [*"yyyy", "x"]), (["Rome"], ["x"])] * 6  # no tag is "O": nothing is predicted
    made, _ = loaded("tag", write_conll(tmp_path / "b.conll", rows), model, data__max_length=6)
    kept = made.validation.fields["tags"].values[made.validation.fields["borne"].values >= 0]
    assert made.scores(np.eye(2)[kept])["accuracy"] == len(kept) / len(made.validation.fields["tags"].values) < 1.0
    texts, _ = loaded("classify", write_csv(tmp_path / "a.csv", reviews(20)), model, data__max_length=5)
    assert texts.dataset.cut["texts"] > 0
    assert texts.dataset.row_tokens == 5


def test_the_longer_text_of_a_pair_is_cut_first():
    from fastlm.tasks._texts import _shortened

    assert _shortened(([1, 2, 3, 4, 5], [6]), 4) == ([1, 2, 3], [6])
    assert _shortened(([1], [2, 3, 4, 5]), 3) == ([1], [2, 3])
    assert _shortened(([1, 2, 3, 4], [5, 6, 7, 8]), 4) == ([1, 2], [5, 6])
    assert _shortened(([1, 2, 3],), 2) == ([1, 2],)


# ---- runs: resume, the best checkpoint, early stopping, seeds


def test_a_stopped_run_continues_with_the_same_losses(model, tmp_path, monkeypatch):
    data = write_csv(tmp_path / "a.csv", reviews(100))
    recipe = recipe_of("classify", train__epochs=2.0, model__hidden_dropout_prob=0.1)
    finetune(recipe, model, data, tmp_path / "whole")
    original, steps = loop.train_step, []

    def step(*args, **arguments):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        assert finetune(recipe, model, data, tmp_path / "parts").stopped_by == signal.SIGTERM
    assert finetune(recipe, model, data, tmp_path / "parts").summary["steps"] == len(
        read_metrics(tmp_path / "whole" / "metrics.jsonl")
    )
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert len(steps) == 5
    timed = ("tokens_per_s", "mfu")
    strip = lambda rows: [{k: v for k, v in row.items() if k not in timed} for row in rows]  # noqa: E731
    assert strip(whole) == strip(parts)
    tensors = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert tensors[0] == tensors[1]
    write_csv(data, [*reviews(90), *reviews(10, seed=5)])
    with pytest.raises(
        ValueError, match="is not what the run was started on: its text or its tokenizer is another one"
    ):
        finetune(recipe, model, data, tmp_path / "parts")


def scripted(monkeypatch, accuracies):
    """Evaluations with these accuracies in place of the true ones."""
    from fastlm.train import evaluation

    original, told = evaluation.evaluation, iter(accuracies)

    def call(*args):
        found = original(*args)
        return found._replace(figures={**found.figures, "val_accuracy": next(told)})

    monkeypatch.setattr(evaluation, "evaluation", call)


def test_the_best_checkpoint_is_kept_and_training_stops(model, tmp_path, monkeypatch):
    data = write_csv(tmp_path / "a.csv", reviews(100))
    recipe = recipe_of("classify", train__max_steps=20, train__eval_every=2, train__patience=2)
    scripted(monkeypatch, [0.5, 0.8, 0.7, 0.8, 0.9])  # at steps 2, 4, 6, 8, and of the best weights at the end
    result = finetune(recipe, model, data, tmp_path / "run")
    assert (result.step, result.summary["best_step"]) == (8, 4)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008"]
    best = finetune(recipe, model, data, tmp_path / "run")  # finished: nothing is trained or evaluated again
    assert best.summary == result.summary
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    exported = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "hf").state_dict()
    assert all(torch.equal(weights[name], exported[name]) for name in exported)


def test_best_figures():
    class Of:
        recipe = recipe_of("regress", train__metric="rmse", train__patience=2)

        def figure(self):
            return "rmse"

    counters = Counters()
    best = Best(Of(), counters)
    assert best.add(1, {"val_rmse": 2.0})
    assert not best.add(2, {"val_rmse": 2.0})
    assert best.add(3, {"val_rmse": 1.0})
    assert not best.add(4, {"val_rmse": 1.5})
    assert not best.exhausted
    assert not best.add(5, {"val_rmse": 1.5})
    assert best.exhausted
    assert (counters.best, counters.best_step, counters.stale) == (1.0, 3, 2)
    counters = Counters()
    best = Best(Of(), counters)
    assert [best.add(step, {"val_rmse": value}) for step, value in enumerate([np.nan, 2.0, np.nan, 3.0])] == [
        False,
        True,
        False,
        False,
    ]


def test_seeds(model, tmp_path, monkeypatch, capsys):
    """A label may hold what matplotlib takes for a formula, and the model is predicted with as it was trained."""
    rows = [("unrelated", text, {"pos": "a $_$"}.get(label, label)) for text, label in reviews(80, seed=2)]
    data = write_csv(tmp_path / "a.csv", rows[20:], ("text", "note", "label"))
    test = write_csv(tmp_path / "b.csv", [*rows[:20], ("x", "", "neg")], ("text", "note", "label"))
    recipe = recipe_of("classify", train__epochs=1.0, data__text="note", data__test=str(test))
    with monkeypatch.context() as patch:  # under torchrun
        patch.setenv("RANK", "1")
        patch.setattr(finetuning, "finetune", lambda *args, **options: loop.Result(tmp_path, 1, {}))
        finetune_seeds(recipe, model, data, tmp_path / "run", range(3, 5))
    assert not (tmp_path / "run").exists()
    results = finetune_seeds(recipe, model, data, tmp_path / "run", range(3, 5))
    with pytest.raises(ValueError, match=r"got .*seed-3, which holds checkpoints and metrics\.jsonl and summary\.json"):
        finetune_seeds(recipe, model, data, tmp_path / "run" / "seed-3", range(2))
    with pytest.raises(ValueError, match="holds runs, which `never` would overwrite"):
        finetune_seeds(recipe, model, data, tmp_path / "run", range(7, 9), resume="never")
    assert [result.out.name for result in results] == ["seed-3", "seed-4"]
    content = json.loads((tmp_path / "run" / "metrics.json").read_text())
    one = [json.loads((result.out / "metrics.json").read_text()) for result in results]
    for part in ("metrics", "test"):
        for name, entry in content[part].items():
            values = [each[part][name] for each in one]
            assert entry == {"mean": np.mean(values), "std": pytest.approx(np.std(values, ddof=1)), "values": values}
    assert one[0]["metrics"]["loss"] != one[1]["metrics"]["loss"]
    best = max(one, key=lambda each: each["metrics"]["accuracy"])
    assert content["best"] == f"seed-{3 + one.index(best)}"
    assert Predictor(tmp_path / "run").labels == ("a $_$", "neg")
    (said,) = Predictor(tmp_path / "run").predict(read_records(test, Report(), plain="line").rows[:1], Report())
    assert said["text"] == rows[0][1]
    monkeypatch.setattr(_threads, "for_work", lambda *_: None)
    (tmp_path / "lines.txt").write_text("a film is good\n")  # of the column "note"
    predict(tmp_path / "run", [str(tmp_path / "lines.txt")], out=tmp_path / "said.jsonl", header=True, dtype="float32")
    assert json.loads((tmp_path / "said.jsonl").read_text())["text"] == "a film is good"
    assert one[0]["read"]["data"]["set_aside"] == {}
    assert one[0]["read"]["test"]["set_aside"] == {'empty text in column "note"': {"count": 1, "first": ["b.csv:22"]}}
    assert 'test: 20 examples of 21 rows; set aside: 1 empty text in column "note"' in capsys.readouterr().err
    assert one[0]["examples"] == {"train": 54, "validation": 6, "test": 20}
    write_csv(test, rows[:19], ("text", "note", "label"))
    with pytest.raises(ValueError, match="is not what the run was started on"):
        finetune_seeds(recipe, model, data, tmp_path / "run", range(3, 5))


@pytest.mark.long
def test_two_processes_train_and_evaluate_the_same(model, tmp_path):
    data = write_csv(tmp_path / "a.csv", reviews(90))
    words = [
        "finetune",
        "classify",
        "--model",
        model,
        "--data",
        data,
        "--epochs",
        2,
        "--batch-size",
        16,
        "--device",
        "cpu",
    ]
    words += ["--set", "train.micro_batch_size=8", "train.lr=5e-3", *(f"{name}={value}" for name, value in OFF.items())]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    found = []
    for name, start in (("one", []), ("two", launch)):
        command = [sys.executable, *start, "-m", "fastlm", *words, "--out", tmp_path / name]
        subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
        figures = json.loads((tmp_path / name / "metrics.json").read_text())["metrics"]
        found.append((figures, [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-3)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-4)


def test_a_checkpoint_or_a_fine_tuned_model_is_a_start(finished, model, tmp_path):
    """The classifier stays where the labels are the model's, and starts anew where they are others."""
    out, data = finished("classes")
    before = BertForSequenceClassification.from_pretrained(out / "hf").classifier.weight
    checkpoint = next(iter((out / "checkpoints").iterdir()))
    for start in (out, out / "hf", checkpoint):
        task, again = loaded("classify", data, start)
        assert task.dataset.labels == ("neg", "pos")
        if start != checkpoint:  # which may be the last one, not the best
            assert torch.equal(again.classifier.weight, before)
    three = write_csv(
        tmp_path / "c.csv", [(text, label if i % 3 else "odd") for i, (text, label) in enumerate(reviews(60))]
    )
    for start in (out, checkpoint):
        task, other = loaded("classify", three, start)
        assert task.dataset.labels == ("neg", "odd", "pos")
        assert other.classifier.weight.shape == (3, 32)
        assert torch.equal(other.embeddings.word, loaded("classify", data, start)[1].embeddings.word)
    swapped = write_csv(
        tmp_path / "d.csv", [(text, {"pos": "neg", "neg": "pos"}[label]) for text, label in reviews(60)]
    )
    assert torch.equal(loaded("classify", swapped, out)[1].classifier.weight, before)


# ---- errors and counted rows


@pytest.mark.parametrize(
    ("task", "rows", "columns", "settings", "message"),
    [
        (
            "classify",
            [("a", "x"), ("b", "x")],
            ("text", "label"),
            {},
            "at least two classes in column .label., found only 'x'",
        ),
        (
            "classify",
            [("a", "x")],
            ("body", "label"),
            {},
            r'data.text: expected a column "text" or .* in a\.csv:2, found "body"',
        ),
        ("classify", [("a", "x")], ("text", "y"), {}, r'data.label: expected a column "label" or .* found "text", "y"'),
        ("classify", [], ("text", "label"), {}, r"data: expected labelled rows, found none in .*a\.csv"),
        (
            "classify",
            [("", "x"), (" ", "y")],
            ("text", "label"),
            {},
            r"found none that can be used .*2 empty text in column",
        ),
        (
            "classify",
            [("a", "x"), ("b", "y")],
            ("text", "label"),
            {"data__max_length": 2},
            "data.max_length: expected at least 3",
        ),
        (
            "classify",
            [("a", "x"), ("b", "y")] * 9,
            ("text", "label"),
            {"train__metric": "bleu"},
            "train.metric: expected one of accuracy",
        ),
        (
            "classify",
            [("a", "x"), ("b", "y")],
            ("text", "label"),
            {"data__text": "text,label,text"},
            "one column, or two of a pair",
        ),
        (
            "regress",
            [("a", 1), ("b", 1)],
            ("text", "score"),
            {},
            "expected different numbers in column .score., found 1 in all 2 rows",
        ),
        (
            "regress",
            [("a", "high")],
            ("text", "score"),
            {},
            r'found none that can be used .*1 no number in column "score" \(first: a\.csv:2',
        ),
        ("tag", [("a b", "O O")], ("tokens", "tags"), {}, r'1 no list of words in column "tokens" \(first: a\.csv:2'),
    ],
)
def test_data_that_does_not_fit_is_an_error(task, rows, columns, settings, message, model, tmp_path):
    data = write_csv(tmp_path / "a.csv", rows, columns)
    with pytest.raises(ValueError, match=message):
        finetune(recipe_of(task, **settings), model, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_labels_of_held_out_rows_are_errors(model, tmp_path):
    data = write_csv(tmp_path / "a.csv", reviews(30))
    held = write_csv(tmp_path / "b.csv", [("a film", "pos"), ("a film", "Pos")])
    with pytest.raises(ValueError, match=r"expected one of 'neg', 'pos' in column \"label\", .* got 'Pos' in b\.csv:3"):
        finetune(recipe_of("classify", data__validation=str(held)), model, data, tmp_path / "run")
    with pytest.raises(ValueError, match="data: expected files, got standard input"):
        finetune(recipe_of("classify"), model, "-.csv", tmp_path / "run")
    with pytest.raises(
        ValueError, match="recipe: expected one of a task on text, got classify; fastlm finetune classify"
    ):
        pretrain(recipe_of("classify"), data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"train\.micro_batch_size: expected a divisor of train.batch_size=16"):
        recipe_of("classify", train__micro_batch_size=5)


def test_bad_rows_are_counted_and_told(model, tmp_path):
    rows = [*reviews(20), ("a film", ""), ("", "pos")]
    made, _ = loaded("classify", write_csv(tmp_path / "a.csv", rows), model)
    assert made.dataset.report.set_aside == {
        'no label in column "label"': {"count": 1, "first": ["a.csv:22"]},
        'empty text in column "text"': {"count": 1, "first": ["a.csv:23"]},
    }
    note, *_ = made.notes()
    assert note.startswith("data: 20 examples of 22 rows; set aside: 1 no label in column")


def test_labels_of_several_kinds(model, tmp_path):
    columns = write_csv(
        tmp_path / "a.csv", [("a film", 1, 0), ("the song", 0, 1), ("the play", "yes", "true")] * 5, ("text", "x", "y")
    )
    made, _ = loaded("classify", columns, model, data__label="x,y")
    assert made.dataset.labels == ("x", "y")
    assert made.head()["problem_type"] == "multi_label_classification"
    assert {tuple(row) for row in made.dataset.fields["labels"].tolist()} == {(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)}
    split = write_csv(tmp_path / "b.csv", [("a film", "x;z"), ("the song", ""), ("the play", "y")] * 5)
    made, _ = loaded("classify", split, model, data__label_separator=";")
    assert made.dataset.labels == ("x", "y", "z")
    digits = write_csv(tmp_path / "c.csv", [("a film", i) for i in (10, 2, 1)] * 5)
    assert loaded("classify", digits, model)[0].dataset.labels == ("1", "2", "10")
    odd = [{"text": "\u200b" if i == 0.5 else "a film", "label": i} for i in (0.5, 2.0, "--1")] * 5
    made, _ = loaded("classify", write_jsonl(tmp_path / "d.jsonl", odd), model)
    assert made.dataset.labels == ("--1", "0.5", "2")
    assert made.dataset.told == {"texts without a token": 5}
    counts = write_csv(tmp_path / "e.csv", [("a film", i) for i in (1, "1_0", "2e0")], ("text", "score"))
    assert loaded("regress", counts, model)[0].dataset.fields["labels"].tolist() == [1.0, 2.0]


def test_the_same_share_of_every_one_of_several_labels_is_held_out():
    labels = np.random.default_rng(0).random((1000, 28)) < np.geomspace(0.3, 0.02, 28)  # about 700 sets of labels
    examples = SimpleNamespace(rows=1000, fields={"labels": labels.astype(np.float32)})
    train, held = find_task("classify").split(examples, 0.1, 0)
    assert len(train) + len(held) == 1000
    shares = labels[held].sum(0) / labels.sum(0)
    assert abs(len(held) - 100) <= 1
    assert shares.min() > 0.05
    assert shares.max() < 0.15


def test_held_out_rows_have_as_many_labels_as_the_training_examples(model, tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "label": label} for text, label in reviews(8)])
    lists = [{"text": "a film", "label": ["pos"]}, {"text": "a film", "label": ["pos", "neg"]}]
    several = write_jsonl(tmp_path / "b.jsonl", lists)
    made, _ = loaded("classify", one, model, data__validation=str(several))
    assert made.validation.fields["labels"].tolist() == [1]
    assert list(made.validation.report.set_aside) == ['not one label in column "label", as training examples have']
    made, _ = loaded("classify", several, model, data__validation=str(one))
    assert made.validation.fields["labels"].shape == (8, 2)


def test_a_row_without_the_column_is_set_aside_by_predict(finished):
    rows = [Record(f"x:{number}", {"text": "a film"}) for number in range(3)]
    rows[0] = Record("x:0", {"other": "a film"})
    rows[2] = Record("x:2", {"text": "cut \ud83d"})
    report, predictor = Report(), Predictor(finished("classes")[0])
    assert [said["place"] for said in predictor.predict([rows[1], *rows], report, window=1)] == ["x:1", "x:1"]
    assert len(list(predictor.predict(rows, report))) == 1
    assert {reason: entry["count"] for reason, entry in report.set_aside.items()} == {
        'no string in column "text"': 2,
        'not UTF-8 in column "text"': 2,
    }


def test_predict_says_of_how_many_texts_the_tokenizer_makes_nothing(finished):
    rows, said = [Record("x:0", {"text": "a film"}), Record("x:1", {"text": "\u200b"})], []
    report, predictor = Report(), Predictor(finished("classes")[0])
    assert len(list(predictor.predict(rows, report))) == 2
    describe(predictor, report, 1.0, said.append)
    assert said[-1].startswith("the tokenizer makes no token of a text: 1 rows")


def test_a_test_split_without_labels_is_left_out(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    texts, labels = zip(*reviews(30))
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
    secret = datasets.Dataset.from_dict({"text": texts, "label": [-1] * 30}, features=features)
    datasets.DatasetDict(train=rows, validation=rows, test=secret).save_to_disk(tmp_path / "d")
    initial = find_initial(model)
    recipe = initial.recipe(recipe_of("classify"))
    with pytest.warns(UserWarning, match=r"split .*test has no labels and is left out \(.*30 no label in column"):
        assert open_examples(recipe, tmp_path / "d", initial.tokenizer)[1].test is None
    recipe = recipe.with_values({"data.test": str(tmp_path / "d" / "test")})
    with pytest.raises(ValueError, match="found none that can be used"):
        open_examples(recipe, tmp_path / "d", initial.tokenizer)


def test_tags_of_a_compressed_file_are_no_text(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(_threads, "for_work", lambda *_: None)
    with gzip.open(tmp_path / "a.conll.gz", "wt") as file:
        file.write("Anna\tB-person\nfound\tO\n")
    predict(finished("tags")[0], [str(tmp_path / "a.conll.gz")], out=tmp_path / "said", header=True, dtype="float32")
    assert json.loads((tmp_path / "said").read_text())["tokens"] == ["Anna", "found"]


# ---- sizes


def test_flops_are_those_of_transformers():
    counts = Counts(tokens=48, pairs=3 * 16**2, predicted=48)
    config = BertConfig(vocab_size=50, **TINY, labels=("a", "b", "c"))
    ids = torch.arange(48).view(3, 16)
    found = []
    for cls in (BertForTokenClassification, BertForSequenceClassification):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            to_transformers(cls(config))(ids)
        found.append(counter.get_total_flops())
    width, inner = config.hidden_size, config.intermediate_size
    assert BertForTokenClassification(config).flops(counts) == 3 * found[0]
    skipped = 2 * (width * width + 2 * width * inner) * (48 - 3)  # of the last layer, on all but the first tokens
    assert BertForSequenceClassification(config).flops(counts._replace(predicted=3)) == 3 * (found[1] - skipped)
