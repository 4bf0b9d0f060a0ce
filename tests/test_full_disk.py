"""A disk that is full: one line says what, where, how much and what is kept; no traceback, nothing half-written."""

import errno
import re
import resource
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
from training import corpus, set_options

from fastlm import storage
from fastlm.bench import results
from fastlm.data import python_documentation
from fastlm.models import Bert, BertConfig
from fastlm.run.checkpoint import read_checkpoint
from fastlm.run.metrics import MetricsFile, plot_loss, read_metrics
from fastlm.train import load_recipe, pretrain

LINE = re.compile(
    r"error: \S+: the .*: (File too large|No space left on device|no space left); it needs .*, .* are free; "
)


def fastlm(*arguments, most=None):
    """The command, with files of at most `most` bytes where that is given."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    command = [sys.executable, "-m", "fastlm", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, preexec_fn=limit if most is not None else None
    )


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a tmpfs of some MB; skips where mounting is refused."""
    mounted = []

    def mount(megabytes):
        place = tmp_path / "disk"
        place.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "none", place]
        try:
            done = subprocess.run(["mount", *map(str, options)], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is refused: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def fails_in_one_line(done):
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1, done.stderr
    assert LINE.match(errors[0]), errors[0]
    assert "Traceback" not in done.stderr
    return errors[0]


def leftovers(directory):
    return list(Path(directory).rglob(".*partial*"))


def test_a_checkpoint_that_does_not_fit(small_disk, tmp_path):
    """The first one fits, the second does not: the first stays whole, and with more room the run continues from it."""
    disk = small_disk(5)
    text = corpus(tmp_path / "corpus.txt")
    options = set_options(model__hidden_size=96, model__intermediate_size=384, train__checkpoint_every=4)
    error = fails_in_one_line(fastlm("pretrain", "bert-mini", "--data", text, "--out", disk / "run", *options))
    assert "the checkpoint cannot be written" in error
    assert "step-00000004, is whole; make room" in error
    assert read_checkpoint(disk / "run" / "checkpoints" / "step-00000004").step == 4
    assert leftovers(disk) == []
    subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
    recipe = load_recipe("bert-mini").with_settings(options[1:])
    assert pretrain(recipe, text, disk / "run").summary["steps"] == 12
    assert [row["step"] for row in read_metrics(disk / "run" / "metrics.jsonl")] == list(range(1, 13))


def test_prepared_data_that_does_not_fit(tmp_path):
    text = corpus(tmp_path / "corpus.txt", lines=3000)
    options = ["--tokenizer", "train:200", "--row-tokens", 32, "--documents", "line"]
    error = fails_in_one_line(fastlm("prepare", "--data", text, "--out", tmp_path / "rows", *options, most=30_000))
    assert "the prepared data cannot be written" in error
    assert "nothing of it is kept" in error
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.txt"}


def test_metrics_keep_whole_lines(small_disk, tmp_path):
    path = small_disk(1) / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    (path.parent / "filler").write_bytes(bytes(storage.shutil.disk_usage(path.parent).free - 4096))
    message = r"the line of step \d+ cannot be written: No space left on device; it"
    steps = iter(range(1, 10_000))
    with pytest.raises(storage.NoSpace, match=message):
        deque((metrics.add({"step": step, "loss": 1.0}) for step in steps), maxlen=0)
    step = next(steps) - 1
    metrics.close()
    assert path.read_bytes().endswith(b"\n")
    assert [row["step"] for row in read_metrics(path)] == list(range(1, step))


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "x")


def bare(*_, **__):
    raise Exception("No space left on device (os error 28)")  # as tokenizers and safetensors do


def short(*_, **__):
    raise OSError("374656 requested and 204736 written")  # as numpy does


WRITERS = {
    "model": lambda out: Bert(
        BertConfig(
            **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8),
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    ).save_pretrained(out / "hf"),
    "plot": lambda out: plot_loss([{"loss": 1.0, "tokens": 1}], out / "loss.png", levels={}, title=""),
    "json": lambda out: storage.replace_json(out / "recipe.json", {}),
    "results": lambda out: results.write_json(out / "ops.json", []),
    "corpus": lambda out: python_documentation(out / "corpus.jsonl", max_bytes=10_000),
}


@pytest.mark.parametrize("error", [full, bare, short])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer(writer, error, tmp_path, monkeypatch):
    """Whatever a library raises, the error is NoSpace with what is needed, and the old file is as it was."""
    WRITERS[writer](tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files
    monkeypatch.setattr(storage, "fsync", error)
    monkeypatch.setattr("fastlm.models._checkpoint.fsync", error)
    with pytest.raises(storage.NoSpace, match=r"cannot be written: .*; it needs .*, .* are free; ") as caught:
        WRITERS[writer](tmp_path)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), storage.atomic_file(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert list(tmp_path.iterdir()) == []
    assert not storage.is_full(ValueError("128 rows requested"))


def test_a_benchmark_ends_in_one_line(tmp_path, capsys):
    def main(path):
        with storage.atomic_file(path, what="the results", need=10):
            full()

    with pytest.raises(SystemExit) as exit:
        results.exit_with(main, tmp_path / "ops.json")
    assert exit.value.code == 2
    assert LINE.match(capsys.readouterr().err)
