"""Question answering without a model: SQuAD's files, windows, spans, and its figures by a definition written anew."""

import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from squad_definition import official

from fastlm.data import Tokenizer
from fastlm.data.labelled import Record
from fastlm.data.labelled.squad import Answer, Question, questions_of, squad_rows, stream_rows
from fastlm.data.labelled.windows import encode_questions, tokens_of
from fastlm.data.sources import Report
from fastlm.tasks._spans import best_spans, combine
from fastlm.tasks._squad import best_threshold, f1, normalize, squad_figures, squad_scores

CONTEXT = "The old clock near the river was built in 1990s style by Anna Čapek, and it weighs twelve tons."


def question(text="When?", answers=(), context=CONTEXT, id="q"):
    found = None if answers is None else [{"text": one, "answer_start": context.index(one)} for one in answers]
    row = {"id": id, "question": text, "context": context, "answers": found}
    (question,) = questions_of([Record("place", row)], Report())
    return question


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(lambda: [CONTEXT, "when did who build what"] * 20, 150)


# ---- reading


def nested(*qas, context=CONTEXT, version="v2.0"):
    return {"version": version, "data": [{"title": "Clock", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


def test_squad_files_and_rows_give_the_same_questions():
    answers = [{"text": "Anna", "answer_start": CONTEXT.index("Anna")}]
    file = nested(
        {"id": "a", "question": "Who?", "answers": answers, "is_impossible": False},
        {"id": "b", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": answers},
    )
    rows = [
        {"id": "a", "question": "Who?", "context": CONTEXT, "answers": {"text": ["Anna"], "answer_start": [57]}},
        {"id": "b", "question": "Why?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
    ]
    report = Report()
    read = questions_of(squad_rows(json.loads(json.dumps(file)), "dev.json", report), report)
    flat = questions_of((Record(f"rows.jsonl:{i}", row) for i, row in enumerate(rows, 1)), report)
    assert [(q.id, q.text, q.context, q.answers) for q in read] == [(q.id, q.text, q.context, q.answers) for q in flat]
    assert read[1].place == "dev.json: data[0].paragraphs[0].qas[1]"
    assert read[1].answers == ()
    assert (report.read, report.set_aside) == (2, {})


def test_bad_rows_are_set_aside_with_their_place():
    good = {"id": 1, "question": "Who?"}
    file = nested(
        {**good, "answers": "Anna"},
        {**good, "answers": [{"text": "Anna"}]},
        {**good, "answers": [{"text": " ", "answer_start": 3}]},
        {**good, "answers": [], "is_impossible": False},
        {**good, "is_impossible": "no"},
        {"id": 1, "question": "  "},
        {"id": 1},
        {"id": [1], "question": "Who?"},
        "no question",
        good,
        good,
        {"question": "Where?", "answers": [{"text": "Anna", "answer_start": 2}]},
        {"question": "Who \ud83d?"},
        {"question": "Who?", "context": "Anna \ud83d"},
        {"question": "Who?", "id": "\ud83d"},
    )
    file["data"] += [3, {"title": "x"}]
    file["data"][0]["paragraphs"].append({"qas": [good]})
    report = Report()
    found = questions_of(squad_rows(file, "dev.json", report), report)
    assert [q.id for q in found] == ["1", "dev.json: data[0].paragraphs[0].qas[11]"]
    assert found[0].answers is None
    assert found[-1].answers[0] == ("Anna", None)  # not where its answer_start says
    at = "dev.json: data[0].paragraphs[0].qas"
    reasons = {reason: entry["first"] for reason, entry in report.set_aside.items()}
    assert reasons == {
        'no list under "answers"': [f"{at}[0]"],
        'answer without an integer "answer_start"': [f"{at}[1]"],
        'answer without a "text"': [f"{at}[2]"],
        "no answer, and not marked is_impossible": [f"{at}[3]"],
        'neither true nor false under "is_impossible"': [f"{at}[4]"],
        'empty text under "question"': [f"{at}[5]"],
        'no string under "question"': [f"{at}[6]"],
        'neither a string nor an integer under "id"': [f"{at}[7]"],
        "no JSON object": [f"{at}[8]", "dev.json: data[1]"],
        "id of an earlier question": [f"{at}[10]"],
        'not UTF-8 under "question"': [f"{at}[12]"],
        'not UTF-8 under "context"': [f"{at}[13]"],
        'not UTF-8 under "id"': [f"{at}[14]"],
        'no string under "context"': ["dev.json: data[0].paragraphs[1].qas[0]"],
        'no list under "paragraphs"': ["dev.json: data[2].paragraphs"],
    }
    assert report.read == 18


def test_files_of_both_kinds_and_damaged_ones(tmp_path):
    row = {"id": "a", "question": "Who?", "answers": []}
    (tmp_path / "a.json").write_text("\ufeff " + json.dumps(nested(row), indent=1), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({**row, "id": "b", "context": CONTEXT}) + "\n{oops\n")
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    answers = {"text": ["Anna"], "answer_start": [CONTEXT.index("Anna")]}
    table = pyarrow.Table.from_pylist([{"id": "c", "question": "Who?", "context": CONTEXT, "answers": answers}])
    parquet.write_table(table, tmp_path / "c.parquet")
    report = Report()
    read = questions_of(stream_rows([tmp_path], report), report)
    assert [question.id for question in read] == ["a", "b", "c"]
    assert read[2].answers == (("Anna", CONTEXT.index("Anna")),)
    assert {reason: entry["count"] for reason, entry in report.set_aside.items()} == {"malformed JSON": 1}
    (tmp_path / "a.json").write_text('{"data": \n  oops}')
    with pytest.raises(ValueError, match=r"data: .*a.json is not valid JSON: .*line 2 column 3"):
        list(stream_rows(tmp_path / "a.json", Report()))
    (tmp_path / "a.json").write_bytes(b'{"data": "\xff"}')
    with pytest.raises(ValueError, match=r"data: .*a.json is not UTF-8"):
        list(stream_rows(tmp_path / "a.json", Report()))


def test_standard_input_is_json(tmp_path, monkeypatch):
    row = {"id": "a", "question": "Who?", "answers": []}
    for content in (json.dumps(nested(row), indent=1), json.dumps({**row, "context": CONTEXT}) + "\n"):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content.encode())))
        report = Report()
        (found,) = questions_of(stream_rows(["-"], report, spool=tmp_path), report)
        assert (found.id, found.context, found.answers) == ("a", CONTEXT, ())
        assert (report.read, report.set_aside) == (1, {})


# ---- windows


def test_windows_cover_a_long_context_and_label_the_answer(tokenizer):
    context = " ".join([CONTEXT] * 4)
    begin = context.rindex("Anna")
    row = {"id": 0, "question": "Who did build what?", "context": context}
    row["answers"] = [{"text": "Anna Čapek", "answer_start": begin}]
    (asked,) = questions_of([Record("p", row)], Report())
    windows = encode_questions([asked], tokenizer, max_length=48, stride=10, max_question=64)
    ((ids, offsets),) = tokenizer.encode_offsets([context])
    assert ids.tolist() == tokenizer.encode_batch([context])[0]
    seen, inside = np.zeros(len(ids), int), 0
    for i, window in enumerate(windows.ids):
        first, at = windows.first[i], windows.context[i]
        part = window[first:-1]
        assert len(window) <= 48
        assert (window[0], window[first - 1], window[-1]) == (tokenizer.cls_id, tokenizer.sep_id, tokenizer.sep_id)
        assert windows.types[i].tolist() == [0] * first + [1] * (len(part) + 1)
        assert part.tolist() == ids[at : at + len(part)].tolist()
        seen[at : at + len(part)] += 1
        start, end = windows.start[i], windows.end[i]
        if start:
            inside += 1
            span = slice(offsets[start - first + at, 0], offsets[end - first + at, 1])
            assert context[span] == "Anna Čapek"
        else:
            assert end == 0
            assert not (
                at <= tokens_of(asked.answers[0], offsets)[0]
                and tokens_of(asked.answers[0], offsets)[1] < at + len(part)
            )
    assert seen.min() >= 1
    assert inside >= 1
    assert np.diff(windows.context).tolist() == [10] * (len(windows.ids) - 1)
    assert windows.counts == {}


def test_windows_overlap_by_half_where_the_stride_is_longer(tokenizer):
    ((ids, offsets),) = tokenizer.encode_offsets([CONTEXT])
    spans = [(first, first + size - 1) for size in (3, 6, 8) for first in range(len(ids) - size + 1)]
    answers = [CONTEXT[offsets[first, 0] : offsets[last, 1]].strip() for first, last in spans]
    asked = [
        Question("p", str(i), "?", CONTEXT, (Answer(text, CONTEXT.index(text, offsets[first, 0])),))
        for i, ((first, _), text) in enumerate(zip(spans, answers))
    ]
    room = 8
    head = len(tokenizer.encode_batch(["?"])[0]) + 3
    windows = encode_questions(asked, tokenizer, max_length=head + room, stride=128, max_question=64)
    assert set(np.diff(windows.context[: windows.question.index(1)])) == {4}
    inside = {number for number, start in zip(windows.question, windows.start) if start}
    assert inside >= {i for i, (first, last) in enumerate(spans) if last - first < 4}
    assert windows.counts["answers in no window"] == len(spans) - len(inside) > 0


def test_answers_that_tokenisation_splits_and_other_troubles_are_counted(tokenizer):
    inside = question(answers=["99"])  # in the middle of 1990s
    ((_, offsets),) = tokenizer.encode_offsets([CONTEXT])
    first, last = tokens_of(inside.answers[0], offsets)
    assert CONTEXT[offsets[first, 0] : offsets[last, 1]] == "1990s"
    asked = [
        inside,
        question(answers=[CONTEXT[:-1]], id="long"),
        Question("p", "moved", "Who?", CONTEXT, (inside.answers[0]._replace(start=None),)),
        question(text="who did build what when " * 9, answers=["Anna"], id="wordy"),
        question(answers=[], id="none"),
        question(answers=None, id="unknown"),
    ]
    options = {"max_length": 24, "stride": 8, "max_question": 12}
    windows = encode_questions(asked, tokenizer, **options)
    assert set(windows.question) == set(range(6))
    assert windows.counts == {
        "answers inside a token": 1,
        "answers longer than a window": 1,
        "answers not at their answer_start": 1,
        "questions cut": 1,
    }
    assert all(start == 0 for start, number in zip(windows.start, windows.question) if number in (1, 4))
    assert {start for start, number in zip(windows.start, windows.question) if number in (2, 5)} == {-100}
    with pytest.raises(ValueError, match=r"data\.max_length: expected room for a question, three special tokens"):
        encode_questions(asked, tokenizer, max_length=12, stride=8, max_question=12)


# ---- spans


def test_best_spans_are_those_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    for n, count, longest in [(1, 3, 5), (7, 4, 3), (12, 40, 30), (5, 100, 2)]:
        start, end = torch.randn(2, n, generator=generator)
        pairs = [(float(start[i] + end[j]), i, j) for i in range(n) for j in range(i, min(n, i + longest))]
        pairs = sorted(pairs, reverse=True)[:count]
        found = best_spans(start, end, count, longest)
        assert found.shape == (count, 3)
        torch.testing.assert_close(found[: len(pairs)], torch.tensor(pairs), rtol=1e-6, atol=1e-6)
        assert (found[len(pairs) :, 0] == -torch.inf).all()
    assert (best_spans(torch.empty(0), torch.empty(0), 3, 5) == -torch.inf).all()  # of a context without tokens


def test_windows_of_a_question_are_combined():
    text = "red green  blue"
    offsets = np.array([[0, 3], [3, 9], [9, 15]])  # as byte-level tokens have them, white space first
    none = [-np.inf] * 3
    found = np.array([[[2.0, 0, 1], [1.0, 1, 1], none], [[3.0, 0, 0], [2.5, 1, 1], none]])
    prediction = combine(found, [0.5, -1.0], [0, 1], offsets, text, count=3)
    assert [(span.text, span.start, span.stop, span.score) for span in prediction.spans] == [
        ("green", 4, 9, 3.0),  # of both windows, the better score
        ("blue", 11, 15, 2.5),
        ("red green", 0, 9, 2.0),
    ]
    assert prediction.null == -1.0
    assert prediction.margin == -4.0
    assert [prediction.text(threshold) for threshold in (None, 0.0, -4.0, -4.5)] == ["green", "green", "green", ""]
    chances, null = prediction.probabilities()
    assert sum(chances) + null == pytest.approx(1.0)
    assert chances[0] / null == pytest.approx(np.exp(4.0))
    assert combine(np.array([[none]]), [0.0], [0], offsets, text, 1).text(None) == ""


# ---- the figures


CASES = [
    ("the Old Clock!", ["old clock"]),
    ("an old, old clock", ["old clock", "the clock"]),
    ("", []),
    ("clock", []),
    ("", ["clock"]),
    ("the", ["a"]),
    ("clock", ["the", "a clock"]),
    ("thea  theatre\tan\u00a0apple", ["thea theatre apple"]),
    ("U.S.A.", ["USA"]),
    ("twelve tons", ["weighs twelve tons of"]),
    ("—dash", ["dash"]),
    ("THE a An", []),
]


def test_figures_are_the_official_ones():
    predicted, answers = zip(*CASES)
    exact, overlap = squad_scores(predicted, answers)
    wanted = [official(*case) for case in CASES]
    np.testing.assert_allclose(np.stack([exact, overlap], 1), wanted, rtol=1e-12)
    assert 0 < exact.mean() < overlap.mean() < 1
    assert normalize("The  cat, a 'hat'") == "cat hat"
    assert f1("a b b", "b b c") == pytest.approx(0.8)  # "a" is an article
    answerable = np.array([bool(right) for right in answers])
    figures = squad_figures(exact, overlap, answerable)
    assert figures["exact"] == pytest.approx(np.mean([e for e, _ in wanted]))
    assert figures["unanswerable_f1"] == pytest.approx(np.mean([official(*case)[1] for case in CASES if not case[1]]))
    assert "answerable_f1" not in squad_figures(exact, overlap, np.ones(len(CASES), bool))


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for size in (1, 2, 30):
        margin, scores = rng.integers(-4, 5, size).astype(float), rng.random(size)
        answerable = rng.random(size) < 0.6

        def mean(threshold, margin=margin, scores=scores, answerable=answerable):
            return np.where(margin > threshold, ~answerable, np.where(answerable, scores, 0.0)).mean()

        threshold, best = best_threshold(margin, scores, answerable)
        assert mean(threshold) == pytest.approx(best)
        assert best == pytest.approx(max(mean(x) for x in np.arange(-6, 6, 0.5)))
    nowhere = np.full(2, np.inf)  # neither context has a token
    assert best_threshold(nowhere, np.zeros(2), np.array([False, True])) == (0.0, 0.5)
