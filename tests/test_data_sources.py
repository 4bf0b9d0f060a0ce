"""Sources of text and cleaning: every record is used or reported."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.cleaning import clean_documents, clean_text
from fastlm.data.sources import Report, find_files, read_documents


def read(paths, documents="file"):
    report = Report()
    found = list(read_documents(find_files(paths, report), documents, report))
    return found, report


def test_a_directory_is_read_in_the_order_of_its_paths(tmp_path):
    root = tmp_path / "corpus"
    # "a.txt" sorts before "a/": by path parts, not by the whole string, and whatever os.walk does first
    for name in ("b/z.txt", "b.md", "a/deep/c.rst", "a.txt", "Z.TXT"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    (root / ".hidden.txt").write_text("no")
    (root / ".git").mkdir()
    (root / ".git/x.txt").write_text("no")
    (root / "image.png").write_bytes(b"\x89PNG\0")
    os.symlink(root, root / "a" / "loop")
    os.symlink(root / "missing", root / "dangling.txt")
    found, report = read([root, root / "b.md"])
    names = ["corpus/Z.TXT", "corpus/a/deep/c.rst", "corpus/a.txt", "corpus/b/z.txt", "corpus/b.md", "b.md"]
    assert [place for place, _ in found] == names
    assert found[2][1] == "text of a.txt"
    assert report.set_aside == {
        "link to a directory": {"count": 1, "first": ["corpus/a/loop"]},
        "file of another kind (.png)": {"count": 1, "first": ["corpus/image.png"]},
        "not a regular file": {"count": 1, "first": ["corpus/dangling.txt"]},
    }


@pytest.mark.parametrize("name", ["a.xlsx", "a.TAB", "a.feather"])
def test_a_table_of_another_kind_is_no_prose(name, tmp_path):
    (tmp_path / name).write_text("id,text\n1,hello\n")
    with pytest.raises(ValueError, match=rf"got .*{name}, which is a table of a kind .* JSON lines"):
        read([tmp_path / name])
    (tmp_path / "b.txt").write_text("prose")
    (tmp_path / "notes").write_text("prose of no suffix")
    assert [place for place, _ in read([tmp_path, tmp_path / "notes"])[0]] == [f"{tmp_path.name}/b.txt", "notes"]


def test_what_a_document_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\r\n\n \n\nthree\nfour\n\n")
    assert read([path], "file")[0] == [("a.txt", "one\ntwo\r\n\n \n\nthree\nfour\n\n")]
    assert [place for place, _ in read([path], "line")[0]] == ["a.txt:1", "a.txt:2", "a.txt:6", "a.txt:7"]
    assert read([path], "blank")[0] == [("a.txt:1", "one\ntwo\r\n"), ("a.txt:6", "three\nfour\n")]
    with pytest.raises(ValueError, match=r"documents: expected one of file, line, blank, got 'page'"):
        read([path], "page")


def test_bad_records_are_counted_and_the_rest_is_read(tmp_path):
    rows = [
        b'{"text": "good"}',
        b'{"text": "torn',
        b"",
        b"[1, 2]",
        b'{"body": "x"}',
        b'{"text": 3}',
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b'{"text": "also good", "id": 1}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    found, report = read([tmp_path])
    assert [text for _, text in found] == ["good", "also good"]
    assert {reason: entry["count"] for reason, entry in report.set_aside.items()} == {
        "malformed JSON": 2,
        'no string under "text"': 3,
        "not UTF-8": 2,
        "binary file": 1,
    }
    name = tmp_path.name
    assert report.set_aside["not UTF-8"]["first"] == [f"{name}/a.jsonl:7", f"{name}/latin.txt"]
    assert "2 malformed JSON (first: " in report.reasons()


def test_line_by_line_only_the_bad_line_is_lost(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\nbad \xff\nlast")
    found, report = read([tmp_path / "a.txt"], "line")
    assert found == [("a.txt:1", "first\n"), ("a.txt:3", "last")]
    assert report.set_aside["not UTF-8"] == {"count": 1, "first": ["a.txt:2"]}


def test_an_unreadable_file_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("here now")
    report = Report()
    files = find_files([tmp_path], report)
    (tmp_path / "a.txt").unlink()
    assert list(read_documents(files, "file", report)) == []
    assert list(report.set_aside) == ["unreadable file (No such file or directory)"]


def test_an_unreadable_directory_is_counted(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("here")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    report = Report()
    assert [file.name for file in find_files([tmp_path], report)] == [f"{tmp_path.name}/a.txt"]
    place = f"{tmp_path.name}/closed"
    assert report.set_aside == {"unreadable directory (Permission denied)": {"count": 1, "first": [place]}}


def test_the_current_directory_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert read(["."])[0] == read([tmp_path])[0]


def test_runs_and_outputs_are_skipped_and_counted(tmp_path):
    for name in ("recipe.json", "metrics.jsonl", "checkpoints/step-00000001/state.json"):
        path = tmp_path / "runs" / "first" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "of a run"}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "half.json").write_text('{"text": "of a run that begins"}')
    (tmp_path / "recipe.json").write_text('{"text": "a dish"}')
    report = Report()
    files = find_files([tmp_path], report, outputs=[tmp_path / "runs" / ".." / "out", tmp_path / "not made yet"])
    assert [file.path.name for file in files] == ["recipe.json"]
    assert report.set_aside == {
        "directory that is written to": {"count": 1, "first": [f"{tmp_path.name}/out"]},
        "directory of a run": {"count": 1, "first": [f"{tmp_path.name}/runs/first"]},
    }
    for named in (tmp_path / "runs" / "first", tmp_path / "out"):
        with pytest.raises(
            ValueError, match=r"data: expected text, got .*, which is a run's directory or to be written"
        ):
            find_files([named], report, outputs=[tmp_path / "out"])


def test_a_manifest_of_another_kind_is_text(tmp_path):
    (tmp_path / "manifest.json").write_text('{"text": "a manifest"}')
    assert [text for _, text in read([tmp_path])[0]] == ["a manifest"]


def test_bad_paths(tmp_path):
    with pytest.raises(ValueError, match=r"data: expected a file or a directory of text, but .*nowhere does not exist"):
        read([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"data: expected text .* but found none"):
        read([tmp_path])
    with pytest.raises(ValueError, match=r"data: expected text .* found none in an empty list"):
        read([])
    for bad in ("", 3, None):
        with pytest.raises(ValueError, match=f"data: expected the path of a file or a directory of text, got {bad!r}"):
            read([bad])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"data: expected a file or a directory of text, but .*pipe is neither"):
        read(tmp_path / "pipe")
    with pytest.raises(ValueError, match="xxx does not exist"):
        read("x" * 300)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match="is prepared already"):
        read(tmp_path)


def test_clean_text():
    dirty = "\ufeffe\u0301t\u0433\x00\x07  a \t b \r\n\r\n\u2028\n    code\u200b  x \ud800\n\n"
    assert clean_text(dirty) == "\u00e9t\u0433 a b\n\n    code x"


@settings(deadline=None)
@given(st.text(st.sampled_from("aé\u0301 \t\n\r\u2000\u2028\x00\ud800\ufeff")) | st.text())
def test_clean_text_is_idempotent_and_encodes(text):
    once = clean_text(text)
    assert clean_text(once) == once
    json.loads(json.dumps(once).encode("utf-8"))
    assert once.encode("utf-8").decode() == once


def test_cleaning_of_long_indentation_is_linear():
    assert clean_text(" " * 1_000_000 + "x") == " " * 1_000_000 + "x"


def test_dropped_documents_are_counted():
    report = Report()
    records = [("1", "a text\r\n"), ("2", "  \n"), ("3", "a text"), ("4", "tiny"), ("5", "another text")]
    assert list(clean_documents(records, report, min_chars=6)) == ["a text", "another text"]
    assert report.kept == 2
    assert {reason: entry["first"] for reason, entry in report.set_aside.items()} == {
        "empty": ["2"],
        "duplicate": ["3"],
        "too short": ["4"],
    }
