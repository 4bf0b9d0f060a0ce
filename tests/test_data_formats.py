"""Sources beside plain text: tables, compressed files, globs, saved datasets, standard input, datasets by name."""

import gzip
import io
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import prepare
from fastlm.data.cleaning import Cleaner, Cleaning
from fastlm.data.duplicates import exact_digest, signature
from fastlm.data.sources import Report, find_files, hub, read_documents, reading, split

TEXTS = ["one", "two\nlines", 'with "quotes", commas\tand tabs', "", "últim – 五"]


def read(paths, documents="file", **options):
    report = Report()
    fields = {"fields": options.pop("fields")} if "fields" in options else {}
    found = list(read_documents(find_files(paths, report, **options), documents, report, **fields))
    return found, report


def csv_bytes(texts, delimiter=",", column="text"):
    cells = ('"' + text.replace('"', '""') + '"' for text in texts)
    return (f"id{delimiter}{column}\n" + "".join(f"7{delimiter}{cell}\r\n" for cell in cells)).encode()


def jsonl_bytes(texts):
    return "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in texts).encode()


def parquet_bytes(texts, rows=2, kind=None):
    sink = io.BytesIO()
    table = pa.table({"id": [7] * len(texts), "text": pa.array(texts, kind or pa.string())})
    pq.write_table(table, sink, row_group_size=rows)
    return sink.getvalue()


def arrow_bytes(texts, new=pa.ipc.new_stream):
    sink = io.BytesIO()
    table = pa.table({"text": pa.array(texts, pa.string())})
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


_FORMATS = {
    "a.csv": csv_bytes(TEXTS),
    "a.tsv": csv_bytes(TEXTS, "\t"),
    "a.jsonl": jsonl_bytes(TEXTS),
    "a.parquet": parquet_bytes(TEXTS),
    "large.parquet": parquet_bytes(TEXTS, kind=pa.large_string()),
    "bytes.parquet": parquet_bytes([text.encode() for text in TEXTS], kind=pa.binary()),
    "words.parquet": parquet_bytes(TEXTS, kind=pa.dictionary(pa.int32(), pa.string())),
    "a.arrow": arrow_bytes(TEXTS),
    "file.arrow": arrow_bytes(TEXTS, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", _FORMATS)
def test_formats_bare_and_compressed(name, tmp_path):
    data = _FORMATS[name]
    expected, places = list(TEXTS), None
    for suffix, packed in (("", data), (".gz", gzip.compress(data)), (".zst", zstd(data[:50]) + zstd(data[50:]))):
        path = tmp_path / (name + suffix)
        path.write_bytes(packed)
        found, report = read([path])
        assert [text for _, text in found] == expected
        assert (report.read, report.set_aside) == (5, {})
        places = places or [place.removeprefix(name) for place, _ in found]
        assert [place.removeprefix(name + suffix) for place, _ in found] == places
        path.unlink()
    assert len(set(places)) == 5


def test_text_compressed(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n") + gzip.compress(b"three\n"))
    (tmp_path / "b.md.zst").write_bytes(zstd(b"four\n"))
    assert [text for _, text in read([tmp_path])[0]] == ["one\ntwo\nthree\n", "four\n"]
    assert [text for _, text in read([tmp_path], "line")[0]] == ["one\n", "two\n", "three\n", "four\n"]


def test_fields(tmp_path):
    (tmp_path / "a.csv").write_bytes(csv_bytes(["x"], column="body"))
    (tmp_path / "b.jsonl").write_text('{"content": "y", "body": "z"}\n{"body": 3, "content": "no"}\n')
    found, report = read([tmp_path], fields=("body", "content"))
    assert [text for _, text in found] == ["x", "z"]
    assert list(report.set_aside) == ['no string under "body" or "content"']
    found, report = read([tmp_path])
    assert not found
    assert report.set_aside['table without a column "text", but id, body']["first"] == [f"{tmp_path.name}/a.csv"]
    with pytest.raises(ValueError, match=r"fields: expected names of fields, as \('text',\), got \(\)"):
        read([tmp_path], fields=())


def test_globs(tmp_path):
    for name in ("b/x.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl_bytes([name]))
    assert [text for _, text in read([f"{tmp_path}/**/*.jsonl"])[0]] == ["a.jsonl", "b/x.jsonl"]
    (tmp_path / "odd[1].txt").write_text("a name with brackets")
    assert [text for _, text in read([tmp_path / "odd[1].txt"])[0]] == ["a name with brackets"]
    with pytest.raises(ValueError, match="expected a glob that matches files, but nothing matches"):
        read([f"{tmp_path}/*.csv"])


def saved_split(folder, shards):
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, texts in zip(names, shards):
        (folder / name).write_bytes(arrow_bytes(texts))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-12.arrow").write_bytes(arrow_bytes(["of a map, not of the dataset"]))


def test_a_saved_dataset(tmp_path):
    saved_split(tmp_path / "one", [["a", "b"], ["c"]])
    saved_split(tmp_path / "several" / "train", [["d"]])
    saved_split(tmp_path / "several" / "test", [["e"]])
    (tmp_path / "several" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found, report = read([tmp_path / "one", tmp_path / "several"])
    assert [text for _, text in found] == ["a", "b", "c", "d"]
    assert report.set_aside == {
        "split other than train of a saved dataset": {"count": 1, "first": ["several/test"]},
    }
    assert [text for _, text in read([tmp_path / "several" / "test"])[0]] == ["e"]
    (tmp_path / "one" / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(ValueError, match=r"found none .*1 damaged state.json of a saved dataset"):
        read([tmp_path / "one"])


def test_standard_input(tmp_path, monkeypatch):
    def give(data):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))

    give(b"some\ntext")
    assert read(["-"], spool=tmp_path)[0] == [("stdin.txt", "some\ntext")]
    give(gzip.compress(jsonl_bytes(["x", "y"])))
    assert read(["-.jsonl.gz"], spool=tmp_path)[0] == [("stdin.jsonl.gz:1", "x"), ("stdin.jsonl.gz:2", "y")]
    with pytest.raises(ValueError, match=r"expected -, or - and a suffix that says the format, .* got -.xml"):
        read(["-.xml"], spool=tmp_path)
    with pytest.raises(ValueError, match="data: - is no file; write it to one first"):
        read(["-"])


class Rows:
    """What `datasets.load_dataset(streaming=True)` returns, as far as it is used; it breaks after `fuse` rows."""

    def __init__(self, texts, fuse):
        self.texts, self.fuse, self.at = texts, fuse, 0

    def __iter__(self):
        while self.at < len(self.texts):
            if self.fuse == 0:
                raise ConnectionError("the network went away")
            self.fuse -= 1
            self.at += 1
            yield {"body": self.texts[self.at - 1], "id": self.at}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_dataset_by_name_is_resumed(tmp_path, monkeypatch):
    texts, asked, fuses = [f"text {i}" for i in range(7)], [], [5, 3, 9]

    def load_dataset(*args, **options):
        asked.append((args, options))
        return Rows(texts, fuses.pop(0))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("fastlm.data.sources.hub.SHARD_ROWS", 2)
    name = "hf:owner/name?config=en&revision=abc"
    with pytest.raises(ConnectionError):
        read([name], spool=tmp_path, fields="body")
    found, _ = read([name], spool=tmp_path, fields="body")  # rows 5 and 6, 7: three more and no end
    assert [text for _, text in found] == texts
    assert found[2][0] == "owner/name/000001.jsonl:1"
    assert read([name], spool=tmp_path, fields="body")[0] == found
    assert len(asked) == 2  # the third time nothing is downloaded
    assert asked[0] == (("owner/name", "en"), {"split": "train", "revision": "abc", "streaming": True})
    for wrong in ("hf:", "hf:a?splits=x", "hf:a?split="):
        with pytest.raises(ValueError, match=r"data: expected hf:owner/name\?split=train with any of config, "):
            read([wrong], spool=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"need the package datasets; pip install fastlm\[datasets\]"):
        read(["hf:other"], spool=tmp_path)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The library itself; with its caches in a directory of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        library = pytest.importorskip("datasets", reason="the package datasets, of the extra of that name")
        library.disable_progress_bars()
        yield library


def test_what_the_library_saves(datasets, tmp_path):
    rows = [{"n": i, "text": f"text {i}"} for i in range(9)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=whole.select([7, 2]), test=whole).save_to_disk(tmp_path / "splits")
    whole.shuffle(seed=1).select(range(3)).save_to_disk(tmp_path / "chosen")
    assert read([tmp_path / "one"])[0] == [
        (f"one/data-{i // 5:05d}-of-00002.arrow:{i % 5 + 1}", f"text {i}") for i in range(9)
    ]
    found, report = read([tmp_path / "splits"])
    assert [text for _, text in found] == ["text 7", "text 2"]
    assert set(report.set_aside) == {"split other than train of a saved dataset"}
    expected = datasets.load_from_disk(tmp_path / "chosen")["text"]
    assert [text for _, text in read([tmp_path / "chosen"])[0]] == list(expected)


def test_the_library_streams_and_resumes(datasets, tmp_path, monkeypatch):
    """From a directory of two files, which it reads without a network as it would a name; killed after two shards."""
    (tmp_path / "source").mkdir()
    texts = [f"text {i} of a dataset" for i in range(25)]
    for name, part in (("a.jsonl", texts[:12]), ("b.jsonl", texts[12:])):
        (tmp_path / "source" / name).write_bytes(jsonl_bytes(part))
    monkeypatch.setattr("fastlm.data.sources.hub.SHARD_ROWS", 4)
    replace_json, states = hub.replace_json, []

    def killed(path, state):
        states.append(state)
        if len(states) == 3:
            raise KeyboardInterrupt
        replace_json(path, state)

    monkeypatch.setattr(hub, "replace_json", killed)
    name = f"hf:{tmp_path / 'source'}?split=train"
    with pytest.raises(KeyboardInterrupt):
        read([name], spool=tmp_path / "spool")
    monkeypatch.setattr(hub, "replace_json", replace_json)
    noted = []
    found, _ = read([name], spool=tmp_path / "spool", note=noted.append)
    assert [text for _, text in found] == texts
    assert noted == [f"{name} is written into {tmp_path / 'spool'} first"]
    monkeypatch.setattr(datasets, "load_dataset", None)  # it is not asked again
    assert read([name], spool=tmp_path / "spool")[0] == found


def test_standard_input_and_a_dataset_by_name_are_prepared(tmp_path, monkeypatch):
    texts = [f"a text with the number {i}" for i in range(30)]
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(jsonl_bytes(texts))))
    fake = types.SimpleNamespace(load_dataset=lambda *_, **__: Rows(texts, 99))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    one = prepare(["-.jsonl"], "train:60", tmp_path / "one", row_tokens=16)
    two = prepare(["hf:owner/name"], "train:60", tmp_path / "two", fields="body", row_tokens=16)
    assert one.accepted == two.accepted
    assert one.documents == 30
    monkeypatch.setitem(sys.modules, "datasets", None)
    again = prepare(["hf:owner/name"], "train:60", tmp_path / "two", fields="body", row_tokens=16)
    assert again.accepted == two.accepted
    assert sorted(path.name for path in tmp_path.iterdir()) == [".one.sources", ".two.sources", "one", "two"]


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")])
def test_a_missing_package_names_its_extra(package, name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(_FORMATS.get(name, zstd(b"x")))
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"need the package {package}; pip install fastlm\[data\]"):
        read([tmp_path / name])


def same_in_parts(path, max_bytes, documents="file"):
    report, whole = Report(), Report()
    (file,) = find_files([path], report)
    expected = list(read_documents([file], documents, whole))
    parts = split(file, max_bytes, documents)
    found, total = [], Report()
    for part in parts:
        each = Report()
        found += read_documents([part], documents, each)
        total.merge(each)
    assert found == expected
    assert total == whole
    return len(parts)


@given(
    st.lists(
        st.sampled_from([b"a line", b"", b" ", b"\xff bad", b'{"text": "x"}', b"{", b"long" * 20, b"\r"]), max_size=30
    ),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 100),
)
@settings(max_examples=150, deadline=None)
def test_parts_of_lines_are_the_file(tmp_path_factory, lines, end, ended, size):
    folder = tmp_path_factory.mktemp("parts", numbered=True)
    for name, documents in (("a.txt", "line"), ("a.txt", "blank"), ("a.jsonl", "file")):
        (folder / name).write_bytes(end.join(lines) + end * ended)
        same_in_parts(folder / name, size, documents)


def test_parts(tmp_path):
    for name, data in _FORMATS.items():
        (tmp_path / name).write_bytes(data)
    assert same_in_parts(tmp_path / "a.jsonl", 40) > 2
    assert same_in_parts(tmp_path / "a.parquet", 1) == 3
    assert same_in_parts(tmp_path / "a.csv", 1) == same_in_parts(tmp_path / "a.arrow", 1) == 1
    (tmp_path / "a.txt").write_bytes(b"text\n" * 100)
    assert same_in_parts(tmp_path / "a.txt", 50) == 1  # it is one document
    assert same_in_parts(tmp_path / "a.txt", 50, "line") == 10
    for name, data in (
        ("binary.txt", b"x\0" * 100),
        ("broken.parquet", b"PAR1 no"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 99)),
    ):
        (tmp_path / name).write_bytes(data)
        assert same_in_parts(tmp_path / name, 10, "line") == 1


@pytest.mark.parametrize("text", ["word " * 40, "a line\n" * 30, "a block\nof lines\n\n" * 12, "五" * 70, "ab" * 64])
def test_a_long_file_is_several_documents(text, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_FILE", 64)
    path = tmp_path / "a.txt"
    for tail in ("", "\n", "x"):
        path.write_text(text + tail, encoding="utf-8")
        found, report = read([path])
        assert "".join(text for _, text in found) == text + tail
        assert not report.set_aside
        assert len(found) > 1
        assert all(len(text.encode()) <= 64 for _, text in found)
        assert found[0][0] == "a.txt"
        assert same_in_parts(path, 60) > 1
    if "\n\n" in text:
        assert all(text.endswith("\n\n") for _, text in found[:-1])


def test_long_records_are_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_RECORD", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"first\n" + b"x" * (3 << 20) + b"\nlast\n" + b"y" * (2 << 20))
    found, report = read([tmp_path / "a.txt"], "line")
    assert found == [("a.txt:1", "first\n"), ("a.txt:3", "last\n")]
    assert report.set_aside == {"line of more than 1 MiB": {"count": 2, "first": ["a.txt:2", "a.txt:4"]}}
    assert report.read == 4
    (tmp_path / "b.txt").write_bytes((b"z" * 99 + b"\n") * 20_000 + b"\nlast")
    found, report = read([tmp_path / "b.txt"], "blank")
    assert found == [("b.txt:20002", "last")]
    assert report.set_aside == {"block of more than 1 MiB": {"count": 1, "first": ["b.txt:1"]}}


def test_a_dirty_corpus_gives_what_its_clean_files_give(tmp_path):
    """Each kind of damage is counted and named, and nothing else of the text changes."""
    clean, dirty = tmp_path / "clean" / "corpus", tmp_path / "dirty" / "corpus"
    story = [
        f"Sentence {i} of a text that is long enough to be kept, with words of its own: {i * i}." for i in range(30)
    ]
    good = {
        "a.jsonl": jsonl_bytes(story[:6]),
        "b.parquet": parquet_bytes(story[6:12]),
        "c.txt.gz": gzip.compress("\n".join(story[12:20]).encode()),
        "d.csv": csv_bytes(story[20:]),
        "e.txt": b"z" * (5 << 20),  # a line of 5 MB, and a megabyte without a space: text, for a tokenizer to judge
    }
    packed, table = gzip.compress("\n".join(story * 50).encode()), bytearray(parquet_bytes(story, rows=99))
    table[40:400] = bytes(360)
    bad = {
        "a2.jsonl": b'{"text": 5}\n{"text": null}\n["x"]\n7\n{"text"\n\xff\n\n',
        "b2.parquet": parquet_bytes(story)[:-9],
        "b3.parquet": bytes(table),
        "b4.parquet": parquet_bytes([1, 2], kind=pa.int64()),
        "c2.txt.gz": packed[: len(packed) // 2],
        "c3.jsonl.zst": zstd(jsonl_bytes(story))[:-20],
        "c4.txt.gz": b"not gzip at all",
        "d2.csv": b'id,text\n1,ok"\n1,a,b\n1,"' + b"never closed",
        "e2.txt": b"\x7fELF\0\0binary",
        "f.txt": "caf\u00e9, but latin-1".encode("latin-1"),
        "g.txt": b"",
        "h.txt": b"\n \n\n",
        "i.png": b"\x89PNG",
        "j.txt": b"tiny",
    }
    for folder, files in ((clean, good), (dirty, good | bad)):
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)

    def kept(folder):
        found, report = read([folder], "line")
        cleaner = Cleaner(Cleaning())
        results = [cleaner(text, ordinal=i, place=place) for i, (place, text) in enumerate(found)]
        return [text for text, _ in results if text is not None], report, cleaner.report

    texts, report, cleaning = kept(clean)
    assert len(texts) == 31
    assert not report.set_aside
    again, report, cleaning = kept(dirty)
    assert again == texts
    assert {reason: entry["count"] for reason, entry in report.set_aside.items()} == {
        'no string under "text"': 4,
        "malformed JSON": 1,
        "not UTF-8": 2,
        "malformed Parquet file": 1,
        "row group of a malformed Parquet file": 1,
        'column "text" without strings': 1,
        "truncated or damaged gzip file": 2,
        "truncated or damaged zstd file": 1,
        "malformed CSV": 1,
        "row of other than 2 columns": 1,
        "binary file": 1,
        "file of another kind (.png)": 1,
    }
    assert {rule: taken.dropped for rule, taken in cleaning.rules.items() if taken.dropped} == {"too short": 2}


def test_text_and_json_lines_need_no_extra(tmp_path, monkeypatch):
    packages = (
        "pyarrow",
        "zstandard",
        "ftfy",
        "xxhash",
        "rensa",
        "py3langid",
        "lingua",
        "phonenumbers",
        "stdnum",
        "datasets",
    )
    for module in [*packages, *(name for name in sys.modules if name.partition(".")[0] in packages)]:
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes(["one document"]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"another one"))
    (tmp_path / "c.csv").write_bytes(csv_bytes(["a third, with a@b.org and 203.0.113.9"]))
    cleaner = Cleaner(Cleaning(filters=("c4", "gopher"), scrub=("email", "ip")))
    found, report = read([tmp_path])
    assert len(found) == 3
    assert not report.set_aside
    assert [cleaner(text)[1] for _, text in found] == ["c4: few sentences"] * 3
    assert Cleaner(Cleaning(scrub=("email", "ip")))(found[2][1])[0] == "a third, with <EMAIL> and <IP>"
    assert len({exact_digest(text) for _, text in found}) == 3
    with pytest.raises(ValueError, match=r"near duplicates need the package rensa; pip install fastlm\[data\]"):
        signature(["text"])
