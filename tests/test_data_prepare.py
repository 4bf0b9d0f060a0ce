"""`prepare` and `open_dataset`: deterministic, complete or absent, and a damaged file is never used."""

import fcntl
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastlm.data import Batches, Tokenizer, is_prepared, open_dataset, prepare, python_documentation
from fastlm.data.layouts import CausalRows, SpanRows
from fastlm.data.unigram import smallest_unigram
from fastlm.data.vocabulary import smallest_bpe
from fastlm.storage import atomic_directory, file_checksum, json_checksum

TEXT = "\n".join(f"Line {i} of the text says that {i} times {i} is {i * i}, and nothing else." for i in range(60))
OPTIONS = {"row_tokens": 32, "documents": "line", "shard_rows": 10}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.jsonl").write_text(json.dumps({"text": "One record of JSON, with a text."}) + "\n{torn\n")
    return folder


@pytest.fixture
def prepared(corpus, tmp_path):
    prepare([corpus], "train:120", tmp_path / "out", **OPTIONS)
    return tmp_path / "out"


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


PREPARE = """
import sys
from fastlm.data import prepare
prepare([sys.argv[1]], "train:120", sys.argv[2], row_tokens=32, documents="line", shard_rows=10)
heavy = {"transformers", "triton", "fastlm.ops", "fastlm.models"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_same_bytes_from_another_process(corpus, prepared, tmp_path):
    done = python(PREPARE, corpus, tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "again") == files(prepared)


def test_manifest(corpus, prepared):
    dataset = open_dataset(prepared)
    manifest = dataset.manifest
    assert dataset.rows == manifest["rows"] == sum(shard["rows"] for shard in manifest["shards"])
    assert len(manifest["shards"]) == math.ceil(dataset.rows / 10) > 2
    assert manifest["tokenizer"]["hash"] == dataset.tokenizer.hash
    assert manifest["tokenizer"]["vocab_size"] == dataset.tokenizer.vocab_size
    assert manifest["documents"] == 61
    assert manifest["report"] == {
        "read": 62,
        "kept": 61,
        "set_aside": {"malformed JSON": {"count": 1, "first": ["corpus/b.jsonl:2"]}},
    }
    counts = Counter(id for ids in dataset.tokenizer.encode_batch([*TEXT.split("\n")]) for id in ids)
    counts += Counter(dataset.tokenizer.encode_batch(["One record of JSON, with a text."])[0])
    for id in dataset.tokenizer.special_ids:
        del counts[id]
    total = counts.total()
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert dataset.unigram_entropy == pytest.approx(entropy, rel=1e-12)
    assert is_prepared(prepared)
    assert not is_prepared(corpus)


def test_nothing_is_pickled(prepared):
    assert {path.suffix for path in prepared.rglob("*") if path.is_file()} == {".npy", ".json", ".txt"}
    for path in prepared.glob("*.npy"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        assert isinstance(array, np.memmap)
    # an array of objects is a pickle: it is refused even where its checksum was made to match
    manifest = json.loads((prepared / "manifest.json").read_text())
    name = manifest["shards"][0]["name"]
    parts = [prepared / f"{name}.{part}.npy" for part in ("tokens", "offsets", "pieces")]
    np.save(parts[0], np.array([print], dtype=object), allow_pickle=True)
    manifest["shards"][0]["checksum"] = file_checksum(*parts)
    del manifest["checksum"]
    (prepared / "manifest.json").write_text(json.dumps({**manifest, "checksum": json_checksum(manifest)}))
    with pytest.raises(ValueError, match=r"pickle|objects"):
        open_dataset(prepared)


def test_preparing_again_opens_what_is_there(corpus, prepared, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    os.utime(corpus / "a.txt")  # the content counts, not the date
    again = prepare([corpus], "train:120", prepared, **OPTIONS)
    assert again.rows == open_dataset(prepared).rows
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    refusals = [
        lambda: prepare([corpus], "train:121", prepared, **OPTIONS),
        lambda: prepare([corpus], "train:120", prepared, **{**OPTIONS, "row_tokens": 64}),
        lambda: prepare([corpus / "a.txt"], "train:120", prepared, **OPTIONS),
        lambda: prepare([corpus], "train:120", corpus, **OPTIONS),
        lambda: prepare([corpus], "train:120", corpus / "a.txt", **OPTIONS),
    ]
    (tmp_path / "empty").mkdir()
    assert prepare([corpus], "train:120", tmp_path / "empty", **OPTIONS).rows == again.rows
    for refused in refusals:
        with pytest.raises(ValueError, match=r"out: .* exists and holds .*; name another|preparation: .* Name another"):
            refused()
    (corpus / "a.txt").write_text(TEXT + " More.")
    with pytest.raises(ValueError, match="out: "):
        prepare([corpus], "train:120", prepared, **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_a_loaded_tokenizer_gives_the_same_rows(corpus, prepared, tmp_path):
    loaded = prepare([corpus], prepared / "tokenizer", tmp_path / "loaded", **OPTIONS)
    given = prepare([corpus], Tokenizer.load(prepared / "tokenizer"), tmp_path / "given", **OPTIONS)
    assert loaded.accepted == given.accepted == open_dataset(prepared).accepted


KILLED = """
import os, signal, sys
from fastlm.data import prepare
def progress(stage, done, total):
    if stage == sys.argv[3] and done >= total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
import fastlm.data.packing as packing
packing._BATCH_CHARS = 200
prepare([sys.argv[1]], "train:120", sys.argv[2], row_tokens=32, documents="line", shard_rows=10, progress=progress)
"""


def test_killed_preparation_leaves_no_target_and_is_swept(corpus, prepared, tmp_path):
    out = tmp_path / "killed"
    done = python(KILLED, corpus, out, "rows")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    (left,) = tmp_path.glob(".killed.partial-*")
    assert list(left.glob("*.npy")), "it was killed between two shards"
    prepare([corpus], "train:120", out, **OPTIONS)
    assert files(out) == files(prepared)
    assert not list(tmp_path.glob(".*.partial-*"))


def test_an_error_leaves_nothing_and_a_living_writer_is_left_alone(corpus, tmp_path):
    out = tmp_path / "out"
    seen = []

    def nested(stage, done, total):
        if stage == "rows" and not seen:  # a second preparation while the first is under way
            seen.append(len(list(tmp_path.glob(".out.partial-*"))))
            prepare([corpus], "train:120", out, **OPTIONS)

    dataset = prepare([corpus], "train:120", out, progress=nested, **OPTIONS)  # opens what the second one made
    assert seen == [1]
    assert dataset.accepted == open_dataset(out).accepted
    assert not list(tmp_path.glob(".*.partial-*"))

    shutil.rmtree(out)
    seen.clear()
    with pytest.raises(
        ValueError,
        match=r"preparation: data\.tokenizer is .train:121., was .train:120.",
    ):
        prepare([corpus], "train:121", out, progress=nested, **OPTIONS)
    assert open_dataset(out).accepted == dataset.accepted
    assert not list(tmp_path.glob(".*.partial-*"))

    def failing(stage, done, total):
        if stage == "rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], "train:120", tmp_path / "other", progress=failing, **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_a_damaged_shard_is_set_aside_aloud(prepared):
    whole = open_dataset(prepared)
    flip(prepared / "00001.tokens.npy")
    (prepared / "00002.pieces.npy").unlink()
    with pytest.warns(UserWarning, match=r"set aside, and not trained on, .*shard 00001: checksum .*00002"):
        dataset = open_dataset(prepared)
    assert dataset.set_aside.keys() == {"00001", "00002"}
    assert "00002.pieces.npy" in dataset.set_aside["00002"]
    assert list(dataset.accepted) == [name for name in whole.accepted if name not in ("00001", "00002")]
    assert dataset.rows == whole.rows - 20
    kept = [*range(10), *range(30, whole.rows)]
    assert np.array_equal(dataset.gather(np.arange(dataset.rows))[0], whole.gather(np.array(kept))[0])
    Batches(dataset, batch_rows=dataset.rows, seed=0).at(0)
    with pytest.raises(ValueError, match=r"shard 00001: checksum .* restore it, or delete .* and prepare the data"):
        open_dataset(prepared, strict=True)


def test_a_resume_gets_the_shards_it_started_on(prepared):
    accepted = json.loads(json.dumps(open_dataset(prepared).accepted))  # through a checkpoint
    flip(prepared / "00001.offsets.npy")
    with pytest.raises(ValueError, match=r"shard 00001: checksum"):
        open_dataset(prepared, accepted)
    del accepted["00001"]  # a run that started after the damage
    resumed = open_dataset(prepared, accepted)
    assert resumed.accepted == accepted
    assert resumed.set_aside == {}
    flip(prepared / "00001.offsets.npy")  # restored since: the run goes on without it all the same
    assert open_dataset(prepared, accepted).rows == resumed.rows
    accepted["00000"] = "0" * 64
    with pytest.raises(ValueError, match=r"started on a shard 00000 that .* does not list"):
        open_dataset(prepared, accepted)


def test_no_shard_left(prepared):
    for path in prepared.glob("*.tokens.npy"):
        flip(path)
    with pytest.raises(ValueError, match=r"no shard in .* can be used"):
        open_dataset(prepared)


def test_a_damaged_manifest_or_tokenizer(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"expected a directory that `fastlm prepare` wrote"):
        open_dataset(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    Tokenizer.train(lambda: [TEXT], 60).save(other / "tokenizer")
    with pytest.raises(ValueError, match="is not the one the data was prepared with; restore it, or delete"):
        open_dataset(other)
    (other / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: No such file or directory; delete"):
        open_dataset(other)
    path = prepared / "manifest.json"
    good = path.read_text()
    for bad, message in [
        (good[:-40], "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        (
            good.replace('"version": 2', '"version": 1'),
            r"has format .*, expected .*; delete .* and prepare",
        ),
        (good.replace('"row_tokens": 32', '"row_tokens": 33'), "does not match its own checksum"),
    ]:
        path.write_text(bad)
        with pytest.raises(ValueError, match=message):
            open_dataset(prepared)


def test_the_remedy_for_damage_works(corpus, prepared):
    before = open_dataset(prepared).accepted
    (prepared / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=f"is damaged .* delete {prepared} and prepare the data again"):
        prepare([corpus], "train:120", prepared, **OPTIONS)  # it may hold hours of work: it is not ours to delete
    shutil.rmtree(prepared)
    held = prepare([corpus], "train:120", prepared, validation_share=0.2, **OPTIONS)
    assert open_dataset(prepared, split="validation").rows
    for name in ("00000", "validation-00000"):
        flip(prepared / f"{name}.tokens.npy")
        with pytest.raises(ValueError, match=f"shard {name}: checksum .* delete {prepared} and prepare the data again"):
            prepare([corpus], "train:120", prepared, validation_share=0.2, **OPTIONS)
        flip(prepared / f"{name}.tokens.npy")
    assert prepare([corpus], "train:120", prepared, validation_share=0.2, **OPTIONS).accepted == held.accepted
    shutil.rmtree(prepared)
    assert prepare([corpus], "train:120", prepared, **OPTIONS).accepted == before


def test_another_version_of_bpe_is_another_preparation(corpus, tmp_path, monkeypatch):
    layout = CausalRows(32)
    prepare([corpus], "train:300", tmp_path / "bpe", layout=layout, documents="line")
    prepare([corpus], "train:120", tmp_path / "wordpiece", **OPTIONS)
    monkeypatch.setattr("fastlm.data.tokenizer.VERSION", 0)
    with pytest.raises(ValueError, match="or another version of fastlm prepared it"):
        prepare([corpus], "train:300", tmp_path / "bpe", layout=layout, documents="line")
    prepare([corpus], "train:120", tmp_path / "wordpiece", **OPTIONS)


def test_a_tokenizer_that_a_later_library_words_otherwise_still_opens(prepared, monkeypatch):
    load = Tokenizer.load

    def later(directory):
        tokenizer = load(directory)
        tokenizer.hash = "0" * 64  # to_str() with a field more
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", later)
    assert open_dataset(prepared).rows


def test_prepared_data_inside_the_corpus_is_not_text(corpus, tmp_path):
    first = prepare([corpus], "train:120", tmp_path / "out", **OPTIONS)
    for name in ("a", "b"):  # twice each: the second time finds the first's output in the corpus, and opens it
        for _ in range(2):
            inside = prepare([corpus], "train:120", corpus / name, **OPTIONS)
            assert inside.accepted == first.accepted
    assert inside.manifest["report"]["set_aside"]["prepared directory"]["first"] == ["corpus/a"]


def test_a_file_name_that_is_not_utf8(corpus, tmp_path):
    for name in (b"\xff.bin", b"\xfe.\xff", b"\xfd.txt"):
        Path(corpus, os.fsdecode(name)).write_bytes(b"\0")
    dataset = prepare([corpus], "train:120", tmp_path / "out", **OPTIONS)
    set_aside = dataset.manifest["report"]["set_aside"]
    assert set_aside["file of another kind (.bin)"]["first"] == ["corpus/\ufffd.bin"]
    assert set_aside["binary file"]["first"] == ["corpus/\ufffd.txt"]


def test_where_out_may_be(corpus, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    for name, target in (("link", "real"), ("dangling", "elsewhere")):
        os.symlink(tmp_path / target, tmp_path / name)
        assert prepare([corpus], "train:120", tmp_path / name, **OPTIONS).rows
        assert (tmp_path / name).is_symlink()
        assert is_prepared(tmp_path / target)
    monkeypatch.setattr(Tokenizer, "train", None)  # what follows is refused before any work
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(tmp_path / "mount"))
    for bad, reason in (
        (corpus / "a.txt" / "out", "File exists|Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "mount", "mount point"),
    ):
        with pytest.raises(ValueError, match=rf"out: expected a directory that can be written, got .* \(.*({reason})"):
            prepare([corpus], "train:120", bad, **OPTIONS)


def test_leftovers_are_matched_by_name_not_by_pattern(corpus, tmp_path):
    for name in (".o[1].partial-0123", ".o1.partial-0123", ".o[1]x.partial-0123"):
        (tmp_path / name).mkdir()
    prepare([corpus], "train:120", tmp_path / "o[1]", **OPTIONS)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".o1.partial-0123", ".o[1]x.partial-0123"]


def test_a_directory_swept_before_its_lock_is_made_again(tmp_path, monkeypatch):
    flock, swept = fcntl.flock, []

    def sweep_first(fd, how):
        if not swept:
            swept.extend(tmp_path.glob(".out.partial-*"))
            swept[0].rmdir()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    with atomic_directory(tmp_path / "out") as partial:
        assert partial not in swept
        (partial / "file").write_text("whole")
    assert files(tmp_path) == {"out/file": b"whole"}


def test_nothing_left_of_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n")
    (tmp_path / "b.jsonl").write_text("{\n")
    message = r"data: no text is left of 2 records .* 1 empty \(first: .*a\.txt\), 1 malformed JSON"
    unigram = ["unigram:1000"] if importlib.util.find_spec("sentencepiece") else []
    for tokenizer in ("train:100", "bpe:300", *unigram, Tokenizer.train(lambda: [TEXT], 100)):
        with pytest.raises(ValueError, match=message):
            prepare([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.jsonl"]
    (tmp_path / "c.txt").write_text("\u0301" * 20)  # BERT's normaliser strips lone accents: text without a token
    with pytest.raises(ValueError, match="1 no tokens"):
        prepare([tmp_path / "c.txt"], Tokenizer.train(lambda: [TEXT], 100), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_tokens": 7}, "row_tokens: expected an integer of at least 8, got 7"),
        ({"row_tokens": 64.0}, r"row_tokens: expected an integer of at least 8, got 64\.0"),
        ({"documents": "page"}, "documents: expected one of file, line, blank, got 'page'"),
        ({"shard_rows": 0}, "shard_rows: expected an integer of at least 1, got 0"),
        ({"shard_rows": 2.5}, r"shard_rows: expected an integer of at least 1, got 2\.5"),
        ({"min_chars": "8"}, "min_chars: expected an integer of at least 0, got '8'"),
        ({"tokenizer": "train:many"}, "tokenizer: expected train:N, as train:8192, .* got 'train:many'"),
        ({"tokenizer": "train:3"}, "tokenizer: expected train:N"),
        ({"tokenizer": "train:99999999999"}, "tokenizer: expected train:N, .* from 16 to 16777216"),
        ({"tokenizer": None}, "tokenizer: expected `train:8192`, a tokenizer's directory or a Tokenizer, got None"),
        ({"tokenizer": ""}, "tokenizer: expected `train:8192`, a tokenizer's directory or a Tokenizer, got ''"),
        ({"tokenizer": "bert-base"}, "tokenizer: expected `train:8192` or a tokenizer's directory, got 'bert-base'"),
        ({"tokenizer": "bpe:100"}, r"tokenizer: expected at least 261 tokens for a byte-level BPE .*masked.*, got 100"),
        ({"paths": "nowhere.txt"}, r"data: expected a file or a directory of text, but nowhere\.txt does not exist"),
    ],
)
def test_bad_arguments(corpus, tmp_path, change, message):
    arguments = {"paths": [corpus], "tokenizer": "train:100", "out": tmp_path / "out", **change}
    with pytest.raises(ValueError, match=message):
        prepare(**arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_a_tokenizer_that_does_not_fit_is_refused_before_the_text_is_read(kind, corpus, tmp_path):
    smallest = {"bpe": smallest_bpe("span"), "unigram": smallest_unigram("span"), "wordpiece": 301}[kind]
    if kind == "unigram":
        pytest.importorskip("sentencepiece", reason="the package sentencepiece, of the extra unigram")

    def progress(stage, done, total):
        raise AssertionError(stage)

    with pytest.raises(ValueError, match="tokenizer: expected"):
        prepare([corpus], f"{kind}:{smallest - 1}", tmp_path / "out", layout=SpanRows(32), progress=progress)
    if kind != "wordpiece":
        made = prepare([corpus], f"{kind}:{smallest}", tmp_path / "out", layout=SpanRows(32), documents="line")
        assert made.tokenizer.vocab_size <= smallest


def test_progress(corpus, tmp_path):
    calls = []
    prepare([corpus], "train:100", tmp_path / "out", progress=lambda *call: calls.append(call), **OPTIONS)
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["checksums", "tokenizer", "rows"]
    total = sum(path.stat().st_size for path in corpus.iterdir())
    assert {call[2] for call in calls} == {total}
    assert calls[-1] == ("rows", total, total)


def test_real_text_pads_next_to_nothing(tmp_path):
    """Python's documentation, a paragraph a document: most are shorter than a row."""
    python_documentation(tmp_path / "docs.jsonl", max_bytes=500_000)
    rows = map(json.loads, (tmp_path / "docs.jsonl").read_text().splitlines())
    (tmp_path / "docs.txt").write_text("\n\n".join(row["text"] for row in rows))
    dataset = prepare([tmp_path / "docs.txt"], "train:2048", tmp_path / "out", documents="blank")
    assert dataset.manifest["documents"] > 1500
    batch = Batches(dataset, batch_rows=dataset.rows, seed=0).at(0)
    # What is left: tails shorter than MIN_PIECE, and rows that are full of very short documents.
    assert batch.tokens / batch.input_ids.numel() > 0.98


def test_python_documentation(tmp_path):
    """The standard library alone gives 2 MB of prose, the same each time, that `prepare` takes whole."""
    written = python_documentation(tmp_path / "docs.jsonl", max_bytes=2_000_000)
    assert 2_000_000 <= written < 2_500_000
    rows = [json.loads(line) for line in (tmp_path / "docs.jsonl").read_text().splitlines()]
    library = Path(json.__file__).parent.parent
    for name in (row["source"] for row in rows):
        assert name.startswith(("help/", "builtin/")) or (library / name).exists(), "site-packages is not needed"
    paragraphs = [paragraph for row in rows for paragraph in row["text"].split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    text = " ".join(paragraphs)
    assert text.count(">>>") < 100
    assert text.count(" the ") > 10_000
    assert not list(tmp_path.glob(".*partial*"))
    python_documentation(tmp_path / "again.jsonl", max_bytes=200_000)
    head = (tmp_path / "again.jsonl").read_bytes()
    assert (tmp_path / "docs.jsonl").read_bytes().startswith(head)
