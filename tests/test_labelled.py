"""Labelled files: every format gives the same rows; what cannot be read is counted with its place and column."""

import gzip
import json

import numpy as np
import pytest
from labelled import reviews, sentences, write_conll, write_csv, write_jsonl

from fastlm.data.labelled import Ragged, choose_columns, hold_out, read_records, saved_splits, text_of
from fastlm.data.labelled.columns import LABELS, TEXTS
from fastlm.data.sources import Report

ROWS = reviews(12)


def parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    written = pytest.importorskip("pyarrow.parquet")
    texts, labels = zip(*ROWS)
    features = {"text": {"dtype": "string"}, "label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}
    table = pyarrow.table({"text": texts, "label": [("neg", "pos").index(label) for label in labels]})
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    written.write_table(table.replace_schema_metadata(metadata), path)
    return path


def saved(path):
    datasets = pytest.importorskip("datasets")
    texts, labels = zip(*ROWS)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
    rows.save_to_disk(path)
    return path


def in_files(path):
    path.mkdir()
    for label in ("pos", "neg"):
        (path / f"{label}.txt").write_text("".join(f"{text}\n" for text, other in ROWS if other == label))
    return path


def in_directories(path):
    for number, (text, label) in enumerate(ROWS):
        (path / label).mkdir(parents=True, exist_ok=True)
        (path / label / f"{number}.txt").write_text(text)
    return path


def zipped(path):
    with gzip.open(path, "wt") as file:
        file.write("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS))
    return path


FORMATS = {
    "a.csv": lambda path: write_csv(path, ROWS),
    "a.tsv": lambda path: write_csv(path, ROWS, delimiter="\t"),
    "a.tsv.gz": zipped,
    "a.jsonl": lambda path: write_jsonl(path, [{"text": text, "label": label} for text, label in ROWS]),
    "a.json": lambda path: (
        path.write_text(json.dumps([{"text": text, "label": label} for text, label in ROWS])) and path
    ),
    "a.parquet": parquet,
    "saved": saved,
    "files": in_files,
    "directories": in_directories,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    report = Report()
    records = read_records([FORMATS[name](tmp_path / name)], report, plain="class")
    found = [(record.values["text"], record.values["label"]) for record in records.rows]
    by_class = name in ("files", "directories")
    assert (sorted(found) if by_class else found) == (sorted(ROWS) if by_class else ROWS)
    assert not report.set_aside
    assert report.read == len(ROWS)
    if name in ("a.parquet", "saved"):
        assert records.names == {"label": ["neg", "pos"]}
    first = records.rows[0].place
    assert first.split("/")[-1].split(":")[0] in ("a.csv", "a.tsv", "a.tsv.gz", "a.jsonl", "a.json", "a.parquet") or (
        name in ("saved", "files", "directories") and first.startswith(name)
    )


def test_tokens_and_tags(tmp_path):
    rows = sentences(5)
    path = write_conll(tmp_path / "a.conll", rows)
    path.write_text("-DOCSTART- O\n\n" + path.read_text() + "\t\nlone\n\nx\tO\n")
    report = Report()
    records = read_records(path, report, plain="conll")
    assert [(r.values["tokens"], r.values["tags"]) for r in records.rows] == [*rows, (["x"], ["O"])]
    (reason,) = report.set_aside
    assert reason == "sentence with a line that is not a token, a tab and a tag"
    line = path.read_text().splitlines().index("lone") + 1
    assert report.set_aside[reason] == {"count": 1, "first": [f"a.conll:{line}"]}


def test_lines_of_conll_that_are_hard_to_tell(tmp_path):
    path = tmp_path / "a.conll"
    path.write_bytes(
        b"# text = x y\n-DOCSTART- O\nAnna B\nM\xfcller I\n\n"
        b"# SYM\n5 NUM\n\n# id = 3\n# new\na\tX\n\n# only\n\nb X\n# Y\n"
    )
    report = Report()
    rows = [record.values for record in read_records(path, report, plain="conll").rows]
    found = [(row["tokens"], row["tags"]) for row in rows]
    assert found == [(["#", "5"], ["SYM", "NUM"]), (["a"], ["X"]), (["b", "#"], ["X", "Y"])]
    assert report.set_aside == {"line that is not UTF-8": {"count": 1, "first": ["a.conll:4"]}}
    assert report.read == 4


def test_an_array_after_a_byte_order_mark_and_classes_with_a_point(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf\n [{"text": "a"}]')
    assert [row.values for row in read_records(tmp_path / "a.json", Report(), plain="line").rows] == [{"text": "a"}]
    for name in ("1.0", "1.5"):
        with gzip.open(tmp_path / f"{name}.txt.gz", "wt") as file:
            file.write("a\n")
    rows = read_records(sorted(tmp_path.glob("*.gz")), Report(), plain="class").rows
    assert [row.values["label"] for row in rows] == ["1.0", "1.5"]


def test_bad_rows_are_counted_with_their_places(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\nfine,pos\nonly one\n\xff\xfe,pos\n\ngood,neg\n")
    report = Report()
    assert [record.place for record in read_records(path, report, plain="class").rows] == ["a.csv:2", "a.csv:6"]
    assert report.set_aside == {
        "row of other than 2 columns": {"count": 1, "first": ["a.csv:3"]},
        'not UTF-8 in column "text"': {"count": 1, "first": ["a.csv:4"]},
    }
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n{"text": \n[1]\n\n{"text": "b"}\n')
    report = Report()
    assert [record.place for record in read_records(lines, report, plain="class").rows] == ["a.jsonl:1", "a.jsonl:5"]
    assert {reason: entry["first"] for reason, entry in report.set_aside.items()} == {
        "malformed JSON": ["a.jsonl:2"],
        "JSON that is no object": ["a.jsonl:3"],
    }


def test_quotes_of_a_table(tmp_path):
    """In a .tsv file they are text. In a .csv file one that is not closed is told where its row begins."""
    rows = ['1\t"Unfinished', "0\tfoo", '1\tbar"']
    (tmp_path / "a.tsv").write_text("\n".join(["label\ttext", *rows]))
    report = Report()
    records = read_records(tmp_path / "a.tsv", report, plain="class").rows
    assert ["\t".join(record.values.values()) for record in records] == rows
    assert not report.set_aside
    (tmp_path / "a.csv").write_text('label,text\n1,fine\n0,"never closed\n1,bar\n0,foo\n')
    assert len(read_records(tmp_path / "a.csv", report, plain="class").rows) == 1
    assert report.set_aside == {
        "malformed CSV (from a quote that is not closed to the end)": {"count": 1, "first": ["a.csv:3"]}
    }


def test_without_a_header_columns_have_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("fine,pos\ngood,neg\n")
    records = read_records(path, Report(), plain="class", header=False)
    assert [record.values for record in records.rows] == [{"1": "fine", "2": "pos"}, {"1": "good", "2": "neg"}]
    path.write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match=r"data: a\.csv:1: expected a different name for every column, got a, a"):
        read_records(path, Report(), plain="class")


def test_damaged_files_are_errors(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"data: a\.parquet cannot be read: it is a malformed Parquet file"):
        read_records(tmp_path / "a.parquet", Report(), plain="class")
    (tmp_path / "a.json").write_text("[1, ")
    with pytest.raises(ValueError, match=r"data: a\.json is not valid JSON"):
        read_records(tmp_path / "a.json", Report(), plain="class")
    with pytest.raises(ValueError, match="expected one of class, conll, line, got 'words'"):
        read_records(tmp_path / "a.json", Report(), plain="words")


def test_columns(tmp_path):
    pair = read_records(
        write_csv(tmp_path / "a.csv", [("a", "b", 1)], ("premise", "hypothesis", "score")), Report(), plain="line"
    )
    assert choose_columns("data.text", "", TEXTS, pair.rows) == ("premise", "hypothesis")
    assert choose_columns("data.label", "", LABELS, pair.rows) == ("score",)
    assert choose_columns("data.text", "premise", TEXTS, pair.rows) == ("premise",)
    assert text_of(pair.rows[0], ("premise", "hypothesis")) == ("a", "b")
    with pytest.raises(ValueError, match=r'data.text: expected a column "body" in a\.csv:2, found "premise", "hypoth'):
        choose_columns("data.text", "body", TEXTS, pair.rows)
    other = read_records(write_csv(tmp_path / "b.csv", [("a", 1)], ("body", "y")), Report(), plain="line").rows
    with pytest.raises(
        ValueError, match=r'expected a column "label" or .* in b\.csv:2, found "body", "y"; name one with'
    ):
        choose_columns("data.label", "", LABELS, other)
    assert choose_columns("data.label", "", LABELS, other, needed=False) == ()
    assert text_of(other[0], ("y",)) == ("1",)
    assert text_of(other[0], ("z",)) == 'no string in column "z"'
    lines = write_jsonl(tmp_path / "a.jsonl", [{"label": 1}, {"text": "cut \ud83d", "label": 1}])
    rows = read_records(lines, Report(), plain="line").rows
    assert choose_columns("data.text", "", TEXTS, rows) == ("text",)  # the first row lacks it
    assert text_of(rows[1], ("text",)) == 'not UTF-8 in column "text"'


def test_the_splits_of_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": ["b"]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "d")
    assert {name: path.name for name, path in saved_splits(tmp_path / "d").items()} == {
        "train": "train",
        "test": "test",
    }
    assert saved_splits(tmp_path) == {}


def test_a_split_is_stratified_and_decided_by_its_seed():
    groups = ["a"] * 90 + ["b"] * 27 + ["c"] * 3 + ["d"]
    train, held = hold_out(len(groups), 0.1, 0, groups)
    assert sorted([*train, *held]) == list(range(len(groups)))
    counts = {name: sum(groups[i] == name for i in held) for name in "abcd"}
    assert counts["a"] == 9
    assert counts["b"] in (2, 3)
    assert counts["c"] <= 1
    assert counts["d"] == 0
    assert np.array_equal(hold_out(len(groups), 0.1, 0, groups)[1], held)
    assert not np.array_equal(hold_out(len(groups), 0.1, 1, groups)[1], held)
    assert len(hold_out(100, 0.25, 3)[1]) == 25
    assert len(hold_out(100, 0.0, 3)[1]) == 0
    assert len(hold_out(1, 0.9, 3)[1]) == 0


def test_small_classes_do_not_drain_the_others():
    groups = ["z"] * 60 + [f"lone {number}" for number in range(500)]
    held = hold_out(len(groups), 0.1, 0, groups)[1]
    assert len(held) in (6, 7)
    assert held.max() < 60
    pairs = ["z"] * 60 + [f"{number // 2}" for number in range(500)]
    train, held = hold_out(len(pairs), 0.1, 0, pairs)
    assert len(held) == 56
    assert sum(pairs[i] == "z" for i in held) == 6
    assert {pairs[i] for i in train} == set(pairs)


def test_ragged_rows():
    ragged = Ragged.of([[1, 2], [], [3, 4, 5]])
    assert len(ragged) == 3
    assert ragged.lengths.tolist() == [2, 0, 3]
    assert ragged.take(np.array([2, 1, 0, 2])).tolist() == [3, 4, 5, 1, 2, 3, 4, 5]
    assert ragged.take(np.array([], np.int64)).tolist() == []
