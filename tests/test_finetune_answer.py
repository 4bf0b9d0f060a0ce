"""Fine-tuning for question answering, from SQuAD's files to predictions that Transformers' model gives too."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from labelled import write_jsonl
from pages import command_of, run_command
from squad_definition import official

from fastlm.data import Tokenizer
from fastlm.data.labelled import Record, hold_out
from fastlm.data.labelled.squad import stream_rows
from fastlm.data.sources import Report
from fastlm.models import Bert, BertConfig
from fastlm.predict_answers import AnswerPredictor
from fastlm.run.labelled import open_examples
from fastlm.run.recipe import Recipe
from fastlm.run.reports import write_seeds
from fastlm.tasks import find_task
from fastlm.train.finetune import finetune

PLACES = ("old garden", "river", "station hall", "house", "clock tower", "fish market")
SMALL = ("data.stride=16", "model.hidden_dropout_prob=0.0", "model.attention_probs_dropout_prob=0.0")
FILLER = "It was a long day, and nothing else happened until late in the evening."


def squad(path, contexts, seed, fill=1, unanswerable=0.3):
    """Writes a SQuAD file about where things are, and returns its rows."""
    draw, data, rows = random.Random(seed), [], []
    for number in range(contexts):
        place = None if draw.random() < unanswerable else draw.choice(PLACES)
        sentences = [FILLER] * fill + [f"Anna sat near the {place}." if place else "Anna sat down."]
        draw.shuffle(sentences)
        context = " ".join(sentences)
        right = [{"text": place, "answer_start": context.index(place)}] if place else []
        row = {"id": f"{seed}-{number}", "question": "Where was Anna?", "answers": right, "is_impossible": not right}
        data.append({"title": "Anna", "paragraphs": [{"context": context, "qas": [row]}]})
        rows.append({**row, "context": context})
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small BERT without training, and its tokenizer."""
    out = tmp_path_factory.mktemp("base")
    texts = [f"Anna sat near the {place}. Anna sat down. Where was Anna? {FILLER}" for place in PLACES]
    tokenizer = Tokenizer.train(lambda: texts * 3, 200)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = Bert(BertConfig(tokenizer.vocab_size, max_position_embeddings=48, initializer_range=0.2, **sizes))
    model.save_pretrained(out, tokenizer)
    return out


def recipe(**values):
    values = {key.replace("__", "."): value for key, value in values.items()}
    return Recipe("answer", name="answer").with_settings(SMALL).with_values(values)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """(directory of the page's run, rows of the held-out file dev.json), whose contexts take several windows."""
    out = tmp_path_factory.mktemp("answer")
    squad(out / "squad.json", 60, seed=1)
    held = squad(out / "dev.json", 20, seed=2, fill=4)
    shutil.copytree(base, out / "runs" / "mini")
    line = command_of("finetuning-texts.md", "fastlm finetune answer")
    assert run_command(line, out, "--epochs=6", "--batch-size=16", "--lr=1e-2", "--device=cpu", "--set", *SMALL) == 0
    return out / "runs" / "answer", held


def test_the_best_of_several_seeds_answers_as_its_run(run, tmp_path):
    out, _ = run
    write_seeds(tmp_path, [out])
    series, single = AnswerPredictor(tmp_path), AnswerPredictor(out)
    assert series.data == single.data
    assert series.threshold == single.threshold == 0.0


def test_figures_are_the_official_ones_of_the_predictions(run):
    out, held = run
    predictor, report = AnswerPredictor(out / "hf"), Report()
    said = list(predictor.predict(stream_rows(out.parents[1] / "dev.json", report), report, questions=7, tokens=100))
    assert [one["id"] for one in said] == [row["id"] for row in held]
    figures = json.loads((out / "metrics.json").read_text())
    scores = np.array([official(one["answer"], [a["text"] for a in row["answers"]]) for one, row in zip(said, held)])
    possible = np.array([bool(row["answers"]) for row in held])
    assert figures["metrics"]["exact"] == pytest.approx(scores[:, 0].mean())
    assert figures["metrics"]["f1"] == pytest.approx(scores[:, 1].mean())
    assert figures["metrics"]["unanswerable_exact"] == pytest.approx(scores[~possible, 0].mean())
    assert figures["metrics"]["f1"] > 0.7  # it learned where the places are
    assert figures["metrics"]["best_f1"] >= figures["metrics"]["f1"]
    assert figures["examples"]["validation"] > len(held) == figures["questions"]  # windows
    for one, row in zip(said, held):
        for span in one["spans"]:
            assert row["context"][span["start"] : span["stop"]] == span["text"]
        if one["answer"]:
            assert row["context"][one["start"] : one["stop"]] == one["answer"]
            assert one["margin"] <= 0
        else:
            assert (one["start"], one["probability"]) == (None, one["no_answer"])


def test_the_command_writes_lines_and_squads_file(run, tmp_path, capsys):
    out, held = run
    folder = out.parents[1]
    line = command_of("finetuning-texts.md", "fastlm predict --model runs/answer")
    assert run_command(line, folder, "--null-threshold", 1e9) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("20 rows in ")
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert json.loads((folder / "predictions.json").read_text()) == {one["id"]: one["answer"] for one in lines}
    assert [one["id"] for one in lines] == [row["id"] for row in held]
    assert all(one["answer"] for one in lines)  # every margin is below
    command = f"fastlm predict --model {out} --data {tmp_path / 'bad.jsonl'}"
    assert run_command(command, tmp_path, "--text", "passage") == 2
    assert capsys.readouterr().err.startswith("error: --text: expected none for the BertForQuestionAnswering in")
    (tmp_path / "bad.jsonl").write_text('{"question": 3}\n')
    assert run_command(command, tmp_path) == 2
    error = capsys.readouterr().err
    assert "error: data: expected texts, found none" in error
    assert 'no string under "question"' in error


def test_transformers_finds_the_same_spans(run):
    out, held = run
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(out / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "hf")
    predictor, report = AnswerPredictor(out / "hf"), Report()
    said = list(predictor.predict(stream_rows(out.parents[1] / "dev.json", report), report))
    for row, ours in zip(held[:8], said):
        inputs = tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=48,
            stride=48 - 3 - 4 - 16,  # Transformers' is how much windows share: "Where was Anna?" has 4 tokens
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            names = ("input_ids", "attention_mask", "token_type_ids")
            logits = theirs(**{name: inputs[name] for name in names})
        best, null = (-np.inf, None), np.inf
        for window, (start, end) in enumerate(zip(logits.start_logits, logits.end_logits)):
            null = min(null, float(start[0] + end[0]))
            places = [i for i, part in enumerate(inputs.sequence_ids(window)) if part == 1]
            for i in places:
                for j in places:
                    if i <= j < i + 30:
                        span = int(inputs["offset_mapping"][window, i, 0]), int(inputs["offset_mapping"][window, j, 1])
                        best = max(best, (float(start[i] + end[j]), span))
        assert row["context"][slice(*best[1])] == ours["spans"][0]["text"]
        assert best[1] == (ours["spans"][0]["start"], ours["spans"][0]["stop"])
        assert ours["margin"] == pytest.approx(null - best[0], abs=1e-4)


def test_a_split_keeps_the_questions_of_a_text_together(base, tmp_path):
    rows = [
        {
            "id": f"{text}-{i}",
            "question": f"Where was Anna {i}?",
            "context": f"{FILLER} {text} Anna sat.",
            "answers": [],
        }
        for i in range(3)
        for text in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data__validation_share": 0.3, "train__max_steps": 2, "train__epochs": 1}
    result = finetune(recipe(**settings), base, tmp_path / "rows.jsonl", tmp_path / "run")
    assert result.step == 2
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert figures["questions"] == 9  # all of three texts, all of them without an answer
    assert figures["null_threshold"] == 0.0
    assert figures["metrics"]["exact"] == figures["metrics"]["f1"] == figures["metrics"]["unanswerable_f1"]
    assert "answerable_f1" not in figures["metrics"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data: expected text|data: expected labelled rows, found none"),
        ('{"version": "v2.0", "data": []}', "data: expected labelled rows, found none"),
        ('{"context": "A text.", "answers": []}\n', 'found none that can be used in .* no string under "question"'),
        ('{"question": "Who?", "context": "A text."}\n', "found none that can be used in .* question without answers"),
    ],
)
def test_files_without_questions(base, tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        finetune(recipe(), base, tmp_path / "rows.jsonl", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["validation", "test"])
def test_held_out_questions_without_answers(base, tmp_path, name):
    squad(tmp_path / "squad.json", 4, seed=1)
    (tmp_path / "asked.jsonl").write_text('{"question": "Who?", "context": "A text."}\n')
    asked = recipe(**{f"data__{name}": str(tmp_path / "asked.jsonl")})
    with pytest.raises(ValueError, match=r"found none that can be used in .*asked.* .*question without answers"):
        finetune(asked, base, tmp_path / "squad.json", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_context_without_tokens_has_no_answer(base, tmp_path):
    """U+200B is no white space, and the tokenizer's normalizer drops it."""
    rows = [{"id": i, "question": "Where was Anna?", "context": "\u200b", "answers": []} for i in range(4)]
    right = [{"text": "sat", "answer_start": 5}]
    rows.append({"id": 4, "question": "Where?", "context": "Anna sat.", "answers": right})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data__validation": str(tmp_path / "rows.jsonl"), "train__max_steps": 1, "train__epochs": 1}
    finetune(recipe(**settings), base, tmp_path / "rows.jsonl", tmp_path / "run")
    report = Report()
    said = list(AnswerPredictor(tmp_path / "run").predict(stream_rows(tmp_path / "rows.jsonl", report), report))
    assert [(one["answer"], one["margin"], one["spans"]) for one in said[:4]] == [("", None, [])] * 4
    assert len(said) == 5
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["unanswerable_exact"] == 1.0


def test_predict_has_the_windows_of_the_run_not_its_longest_example(base, tmp_path):
    squad(tmp_path / "squad.json", 4, seed=1, fill=0)  # 11 to 21 tokens
    finetune(recipe(train__max_steps=1, train__epochs=1), base, tmp_path / "squad.json", tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]
    assert stored["longest"] < stored["max_length"] == 48
    predictor, report = AnswerPredictor(tmp_path / "run"), Report()
    assert predictor.data.max_length == 48
    rows = [{"id": i, "question": "Was Anna " * i + "?", "context": f"{FILLER} Anna sat."} for i in (1, 60, 6)]
    said = predictor.predict([Record(f"row {row['id']}", row) for row in rows], report, questions=2)
    assert [one["id"] for one in said] == ["1", "6"]
    assert (report.kept, predictor.cut) == (2, 0)
    assert report.set_aside == {"question that leaves no room for its context": {"count": 1, "first": ["row 60"]}}
    assert list(predictor.predict([Record("row", rows[1])], report)) == []


def test_held_out_questions_are_the_same_from_a_split_and_from_a_file(base, tmp_path):
    """Half of the answers are not at their answer_start: nothing is trained on them, and their texts count."""
    held = set(hold_out(10, 0.3, 0)[1].tolist())
    rows = [[], []]
    for text in range(10):
        context, place = f"{FILLER} Anna sat near the {PLACES[text % 6]}. {text}", PLACES[text % 6]
        rows[text in held] += [
            {
                "id": f"{text}-{number}",
                "question": "Where was Anna?",
                "context": context,
                "answers": [{"text": place, "answer_start": start}] if start is not None else [],
            }
            for number, start in enumerate((context.index(place), 0, *([None] if text in held else [])))
        ]
    write_jsonl(tmp_path / "all.jsonl", sorted(rows[0] + rows[1], key=lambda row: row["id"]))
    train, dev = (write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in zip(("train", "dev"), rows))
    _, split = open_examples(recipe(data__validation_share=0.3), tmp_path / "all.jsonl", base)
    filled, files = open_examples(recipe(data__validation=str(dev)), train, base)
    for ours, theirs, questions in ((split.train, files.train, 7), (split.validation, files.validation, 9)):
        assert ours.ids.values.tolist() == theirs.ids.values.tolist()
        assert ours.fields["start"].tolist() == theirs.fields["start"].tolist()
        assert len(set(ours.fields["question"])) == questions
    assert -100 in split.validation.fields["start"]
    assert -100 not in split.train.fields["start"]
    for found in (split, files):  # no question that is trained on is without an answer
        assert find_task("answer")(filled, found.train, torch.device("cpu"), found.validation).threshold is None
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [row for row in rows[0] if row["id"].endswith("-1")])
    with pytest.raises(ValueError, match=r"found none \(7 answers not at their answer_start"):
        open_examples(recipe(), wrong, base)


def test_columns_are_not_to_be_named():
    with pytest.raises(ValueError, match=r"data\.text: expected none for task answer, whose columns are id, question"):
        recipe(data__text="passage")
