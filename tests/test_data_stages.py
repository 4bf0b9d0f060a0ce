"""`prepare` with rules of cleaning, near duplicates and part files: the same bytes by any number of processes."""

import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastlm.data import Tokenizer, executors, prepare, stages, texts, token_parts
from fastlm.data.cleaning import Cleaning
from fastlm.data.counts import Counts
from fastlm.data.estimate import estimate
from fastlm.data.selection import HELD_OUT, TRAINED, choose, fingerprint, first_equal, is_held_out
from fastlm.data.sources import Report, find_files
from fastlm.data.stages import Reading
from fastlm.run.recipe import Recipe, load_recipe

OPTIONS = {"row_tokens": 32, "documents": "line", "shard_rows": 10}
RULES = {"cleaning": Cleaning(repair=True, scrub=("email",)), "near_duplicates": 0.8}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    words = random.Random(0)
    near = " ".join(f"word{words.randrange(10**6)}" for _ in range(60))
    lines = [f"Line {i} has {words.random()}, and person{i}@example.org wrote it." for i in range(80)]
    lines += [near + " first", near + " second", lines[3], lines[7], "short", "", "caf\u00c3\u00a9 au lait is good"]
    (folder / "a.txt").write_text("\n".join(lines))
    (folder / "b.jsonl").write_text('{"body": "One record of JSON, with a text."}\n{torn\n{"body": 3}\n')
    (folder / "c.txt.gz").write_bytes(gzip.compress(("\n".join(lines[:9]) + "\nA new line, packed.").encode())[:-1])
    (folder / "d.txt").write_bytes(b"\xff\xfe\nA good line after a bad one.\n")
    return folder


def test_part_files_give_the_bytes_of_a_stream(corpus, tmp_path, monkeypatch):
    streamed = prepare([corpus], "train:120", tmp_path / "streamed", validation_share=0.1, **OPTIONS)
    monkeypatch.setattr(stages, "PART_BYTES", 700)
    monkeypatch.setattr("fastlm.data.preparation.SMALL", 100)
    prepare([corpus], "train:120", tmp_path / "parts", validation_share=0.1, **OPTIONS)
    assert files(tmp_path / "parts") == files(tmp_path / "streamed")
    assert "cleaning" not in streamed.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "parts", "streamed"]


def test_rules_are_reported_and_independent_of_processes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "PART_BYTES", 700)
    one = prepare([corpus], "train:120", tmp_path / "one", fields=["text", "body"], **RULES, **OPTIONS)
    two = prepare([corpus], "train:120", tmp_path / "two", fields=["text", "body"], **RULES, **OPTIONS, processes=2)
    assert files(one.directory) == files(two.directory)
    report, rules = one.manifest["report"], one.manifest["cleaning"]["rules"]
    assert rules["scrub: email"]["documents"] == 82  # the exact duplicates were scrubbed too
    assert "<EMAIL>" in rules["scrub: email"]["sample"]["became"]
    assert "@" not in json.dumps(rules)
    assert rules["encoding repair"]["sample"]["became"].startswith("caf\u00e9")
    assert rules["near duplicate"]["dropped"] == report["set_aside"]["near duplicate"]["count"] == 1
    assert rules["near duplicate"]["sample"]["place"] == "corpus/a.txt:82"
    assert rules["duplicate"]["dropped"] == report["set_aside"]["duplicate"]["count"] == 2
    assert report["kept"] == one.manifest["cleaning"]["kept"] == one.documents
    (damaged,) = [reason for reason in report["set_aside"] if "gzip" in reason]  # a file, not a record
    others = [entry["count"] for reason, entry in report["set_aside"].items() if reason != damaged]
    assert report["read"] == report["kept"] + sum(others)
    settings = one.manifest["settings"]
    assert settings["repair"] is True
    assert settings["near_duplicates"] == 0.8
    with pytest.raises(ValueError, match=r"data.near_duplicates is None, was 0.8"):
        prepare([corpus], "train:120", one.directory, **OPTIONS)


def test_the_recipe_names_the_rules():
    table = Recipe().with_settings(["data.filters=gopher, c4", "data.scrub=email,ip", "data.repair=true"]).data
    assert table.cleaning() == Cleaning(repair=True, filters=("gopher", "c4"), scrub=("email", "ip"))
    assert load_recipe("bert-mini").data.cleaning() == Cleaning()
    for wrong, message in (
        ("data.filters=gofer", "data.filters: expected any of c4, gopher"),
        ("data.near_duplicates=0.3", "data.near_duplicates: expected 0, or a similarity from 0.5"),
        ("data.languages=en,", "data.languages: expected codes of two letters"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe().with_settings([wrong])


def test_executors_are_checked_and_ray_is_optional(corpus, tmp_path, monkeypatch):
    for wrong in ({"executor": "rey"}, {"ray_address": "10.0.0.1:6379"}):
        with pytest.raises(ValueError, match="executor: expected one of processes, ray, and ray where ray_address is"):
            prepare([corpus], "train:120", tmp_path / "out", **wrong, **OPTIONS)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"need the package ray; pip install fastlm\[ray\]"):
        prepare([corpus], "train:120", tmp_path / "out", executor="ray", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_an_estimate_comes_first(tmp_path, monkeypatch):
    lines = [f"Line {i} says that {i} times {i} is {i * i}, and nothing else." for i in range(2000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setattr(stages, "PART_BYTES", 20_000)
    monkeypatch.setattr("fastlm.data.preparation.SMALL", 100)
    seen = []
    options = {**OPTIONS, "progress": lambda stage, *_: seen.append(stage), "note": seen.append}
    prepare([tmp_path / "a.txt"], "train:120", tmp_path / "out", **options)
    (line,) = [text for text in seen if " kB " in text]
    assert seen.index(line) < seen.index("cleaning")
    assert re.fullmatch(
        r"about 127 kB of text: cleaning takes about \d+ s in one process; disk: about 295 kB of parts .* free",
        line,
    )
    tasks = stages.CleanedText(
        find_files([tmp_path / "a.txt", tmp_path / "b.txt.gz"], Report()),
        stages.Reading("line", ("text",), Cleaning(filters=("c4",)), 0.8),
        tmp_path,
        "",
    ).tasks
    plain = stages.Reading("line", ("text",), Cleaning())
    found, size = estimate(tasks), (tmp_path / "a.txt").stat().st_size
    assert found.text == pytest.approx(size + 4 * (tmp_path / "b.txt.gz").stat().st_size, rel=0.01)
    assert found.seconds > 0
    parts = stages.CleanedText(find_files([tmp_path / "a.txt"], Report()), plain, tmp_path, "plain-")
    with executors.in_processes(1) as run:
        list(run(stages.clean, parts.tasks))
    written = sum(file.stat().st_size for task in parts.tasks for file in (task.path, task.events, task.prints))
    assert estimate(parts.tasks).parts == pytest.approx(written, rel=0.05)
    assert replace(found, rows=1 << 60).line(tmp_path / "out", None).endswith("free, too few")
    assert estimate([]) is None


def test_documents_in_the_validation_text_are_not_trained_on(tmp_path, monkeypatch):
    words = random.Random(1)
    long = [" ".join(f"word{words.randrange(10**6)}" for _ in range(60)) for _ in range(3)]
    (tmp_path / "held.txt").write_text(
        "\n".join([long[0], "A line that both texts hold.", long[1], long[1] + " again"])
    )
    lines = [f"Line {i} says that {i} times {i} is {i * i}." for i in range(40)]
    lines += ["A line that both texts hold.", long[0] + " first", long[2], long[2] + " second", long[2]]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    options = {**OPTIONS, "validation": tmp_path / "held.txt"}

    def taken(name, **settings):
        dataset = prepare([tmp_path / "text.txt"], "train:120", tmp_path / name, **options, **settings)
        found = {reason: entry["first"] for reason, entry in dataset.manifest["report"]["set_aside"].items()}
        return dataset, found, dataset.manifest["validation"]["documents"]

    streamed, exact, held = taken("streamed")
    assert exact == {"in the validation text": ["text.txt:41"], "duplicate": ["text.txt:45"]}
    assert held == 4
    monkeypatch.setattr("fastlm.data.preparation.SMALL", 0)
    in_parts, found, held = taken("parts")
    assert found == exact
    assert files(in_parts.directory) == files(streamed.directory)
    near, found, held = taken("near", near_duplicates=0.8)
    names = "in the validation text", "near duplicate of the validation text", "near duplicate", "duplicate"
    assert [found[name] for name in names] == [["text.txt:41"], ["text.txt:42"], ["text.txt:44"], ["text.txt:45"]]
    assert (held, near.documents) == (3, 41)
    rules = taken("rules", near_duplicates=0.8, cleaning=Cleaning(repair=True))[0].manifest["cleaning"]["rules"]
    assert {rule: taken["dropped"] for rule, taken in rules.items() if taken["dropped"]} == dict.fromkeys(names, 1)
    assert rules[names[0]]["sample"]["text"] == "A line that both texts hold."
    assert rules[names[1]]["sample"]["place"] == "text.txt:42"


def test_the_first_of_equal_digests():
    digests = np.array([[5, 1], [0, 9], [5, 1], [5, 0], [0, 9], [5, 1]], np.uint64)
    assert first_equal(digests).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_equal(digests[:0]).tolist() == []


def test_what_is_held_out_is_a_function_of_the_text():
    texts = [f"text {i}" for i in range(200)]
    prints = np.frombuffer(b"".join(map(fingerprint, texts)), np.uint64).reshape(-1, 3)
    codes, _ = choose(prints, prints[:0], share=0.3)
    assert (codes == HELD_OUT).tolist() == [is_held_out(text, 0.3) for text in texts]
    assert 30 < codes.sum() < 90


def test_token_files_hold_what_encoding_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(token_parts, "_BLOCK", 7)  # ids that are read at once: fewer than a document has
    texts = ["A document of a few words.", "\u200d", "words " * 30, "another, the last"]
    tokenizer = Tokenizer.train(lambda: texts, 60)
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    codes = np.array([TRAINED, TRAINED, HELD_OUT, TRAINED], np.uint8)
    task = token_parts.TokenTask(tmp_path / "a.jsonl", codes, tmp_path / "tokenizer", tmp_path / "a.tokens", 1)
    token_parts.tokenise(task)
    for path, chosen in ((task.path, [0, 1, 3]), (task.held_out, [2])):
        whole, read = Counts(tokenizer), Counts(tokenizer)
        expected = [ids.tolist() for ids in whole.encode(texts[i] for i in chosen)]
        assert [ids.tolist() for ids in token_parts.read_tokens(path, read)] == expected
        assert np.array_equal(read.as_array(), whole.as_array())
    empty = Report()
    assert len(list(Counts(tokenizer).filled(token_parts.read_tokens(task.path, Counts(tokenizer)), empty))) == 2
    assert empty.set_aside == {"no tokens": {"count": 1, "first": ["kept document 1"]}}


def test_workers_do_not_import_torch(tmp_path):
    (tmp_path / "probing.py").write_text(PROBE)
    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run([sys.executable, tmp_path / "script.py", tmp_path], check=True)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {(tmp_path / name).read_text() for name in "ab"} == {f"[] {threads}"}


PROBE = """
import os, sys
from fastlm.data import token_parts
def probe(task):
    heavy = {"torch", "triton", "transformers", "matplotlib"} & set(sys.modules)
    task.path.write_text(f"{sorted(heavy)} {os.environ['RAYON_NUM_THREADS']}")
    return task
"""
SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from fastlm.data import executors
from probing import probe
if __name__ == "__main__":
    tasks = [SimpleNamespace(path=Path(sys.argv[1], name), name=name) for name in "ab"]
    with executors.in_processes(2) as run:
        assert sorted(task.name for task in run(probe, tasks)) == ["a", "b"]
"""
PREPARE = """
import sys
from fastlm.data import executors, prepare, stages
from fastlm.data.cleaning import Cleaning
stages.PART_BYTES = 700
if __name__ == "__main__":
    prepare([sys.argv[1]], "train:120", sys.argv[2], row_tokens=32, documents="line", shard_rows=10,
            cleaning=Cleaning(repair=True, scrub=("email",)), near_duplicates=0.8,
            processes=int(sys.argv[3]), executor=sys.argv[4])
"""


def killed(corpus, out, after, processes, executor):
    """Whether a preparation was killed after so many seconds, before it was done."""
    child = subprocess.Popen([sys.executable, "-c", PREPARE, corpus, out, str(processes), executor])
    try:
        return child.wait(after) != 0
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
        return True


def test_a_killed_preparation_continues(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "PART_BYTES", 700)
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare([corpus], "train:120", whole, **RULES, **OPTIONS)

    class Killed(BaseException):
        pass

    made = {"clean": [], "tokenise": []}

    def watched(function, most=None):
        def watching(task):
            names = made[function.__name__]
            if len(names) == most:
                raise Killed
            names.append(task.path.name)
            return function(task)

        return watching

    clean, tokenise = stages.clean, token_parts.tokenise
    monkeypatch.setattr(texts, "clean", watched(clean, most=4))
    monkeypatch.setattr(texts, "tokenise", watched(tokenise, most=3))
    for suffix, finished in ((".jsonl", 4), (".tokens", 3)):
        with pytest.raises(Killed):
            prepare([corpus], "train:120", out, **RULES, **OPTIONS)
        (directory,) = tmp_path.glob(".out.parts-*")
        (directory / f".rows-000004{suffix}.partial-0").write_text("half a pa")
        assert len(list(directory.glob(f"[!.]*{suffix}"))) == finished
        monkeypatch.setattr(texts, "clean", watched(clean))
    monkeypatch.setattr(texts, "tokenise", watched(tokenise))
    prepare([corpus], "train:120", out, **RULES, **OPTIONS)
    for names in made.values():
        assert len(names) == len(set(names)) > 4, "a finished part is not made again"
    assert files(out) == files(whole)
    assert not list(tmp_path.glob(".out.*"))


def test_parts_of_another_version_are_not_continued(corpus, tmp_path, monkeypatch):
    clean = stages.clean

    def killed(task):
        clean(task)
        task.prints.unlink()  # which an older version did not write
        raise KeyboardInterrupt

    with monkeypatch.context() as older:
        older.setattr("fastlm.data.preparation.PARTS_VERSION", 0)
        older.setattr(texts, "clean", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], "train:120", tmp_path / "out", near_duplicates=0.8, **OPTIONS)
    assert len(list(tmp_path.glob(".out.parts-*"))) == 1
    assert prepare([corpus], "train:120", tmp_path / "out", near_duplicates=0.8, **OPTIONS).rows
    assert not list(tmp_path.glob(".out.*"))


def test_signatures_are_listed_by_number_without_reading_the_directory(corpus, tmp_path, monkeypatch):
    text = stages.CleanedText(find_files([corpus], Report()), Reading("line", ("text",), Cleaning(), 0.8), tmp_path, "")
    (task,) = text.tasks
    expected = [task.signatures(number) for number in (9998, 9999, 10000)]
    for path in expected:
        path.touch()
    monkeypatch.setattr(Path, "glob", None)
    monkeypatch.setattr(stages, "count", lambda: itertools.count(9998))
    assert text.signatures() == expected


def test_a_workers_error_waits_for_the_other_workers(tmp_path, monkeypatch):
    """Since the directory that they write into is removed then; threads stand for processes."""
    monkeypatch.setattr(executors, "ProcessPoolExecutor", lambda processes, *_, **__: ThreadPoolExecutor(processes))
    begun, done = threading.Event(), []

    def task(number):
        if number:
            begun.set()
            time.sleep(0.3)
            done.append(number)
            return number
        assert begun.wait(60)
        raise ValueError("the first one")

    with pytest.raises(ValueError, match="the first one"), executors.in_processes(2) as run:
        list(run(task, [0, 1]))
    assert done == [1]


def test_an_error_on_ray_waits_for_the_other_tasks(monkeypatch):
    waited = []

    def wait(running, num_returns):
        waited.append((list(running), num_returns))
        return running[:num_returns], running[num_returns:]

    def get(done):
        raise ValueError(f"of task {done}")

    ray = SimpleNamespace(is_initialized=lambda: True, remote=lambda _: SimpleNamespace(remote=lambda _, task: task))
    ray.wait, ray.get = wait, get
    monkeypatch.setattr(executors, "require", lambda name: ray)
    with pytest.raises(ValueError, match="of task 1"), executors.on_ray(3, "") as run:
        list(run(None, [1, 2, 3, 4]))
    assert waited == [([1, 2, 3], 1), ([2, 3], 2)]


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("processes", "executor"), [(1, "processes"), (2, "processes"), (2, "ray")])
def test_twenty_kills(corpus, tmp_path, monkeypatch, processes, executor):
    if executor == "ray":
        pytest.importorskip("ray")
    monkeypatch.setattr(stages, "PART_BYTES", 700)
    prepare([corpus], "train:120", tmp_path / "one", **RULES, **OPTIONS)
    began = time.monotonic()
    assert not killed(corpus, tmp_path / "whole", 300, processes, executor)
    took, moments = time.monotonic() - began, random.Random(processes)
    for _ in range(20):
        killed(corpus, tmp_path / "out", moments.uniform(0, took), processes, executor)
    assert not killed(corpus, tmp_path / "out", 300, processes, executor)
    assert files(tmp_path / "out") == files(tmp_path / "whole") == files(tmp_path / "one")
    assert not list(tmp_path.glob(".out.*"))
