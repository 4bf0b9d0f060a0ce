"""The directory of a run: who may write it, and where a run in it starts."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlm.data import Dataset, is_prepared, open_dataset
from fastlm.data.storage import json_checksum, write_json
from fastlm.train.checkpoint import Checkpoint, load_newest, read_checkpoint
from fastlm.train.progress import prepare_with_progress
from fastlm.train.recipe import Recipe

DATA = "data"
WRITTEN = "checkpoints", "metrics.jsonl", "recipe.json", "summary.json", "loss.png", "hf"  # by a run, beside DATA
CHECKPOINTS, METRICS, RECIPE, SUMMARY, PLOT, MODEL = WRITTEN


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Holds the directory `out`, made if need be; ValueError where another process trains in it.

    After an error, a directory that was made here and is still empty goes again.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"out: expected a directory, or a name for a new one, got {out}; a file is in its way"
        ) from error
    lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"out: another process trains in {out}; wait for it, or name another directory") from error
        yield
    except BaseException:
        for path in made:
            if any(path.iterdir()):
                break
            path.rmdir()
        raise
    finally:
        os.close(lock)


def find_start(recipe: Recipe, out: Path, resume: str) -> Checkpoint | None:
    """The checkpoint that a run in `out` goes on from, None for a new run. `resume` as of `pretrain`."""
    holds_run = any((out / name).exists() for name in WRITTEN)
    if resume == "never":
        if holds_run:
            raise ValueError(f"resume: {out} holds a run, which `never` would overwrite; name another directory")
        return None
    newest, skipped = load_newest(out / CHECKPOINTS)
    if resume == "auto":
        for reason in skipped:
            warnings.warn(f"skipped {reason}", stacklevel=2)
        if newest is None and skipped:
            raise ValueError(
                f"resume: no checkpoint in {out} can be used ({'; '.join(skipped)}); restore one, or name another "
                "directory"
            )
        if newest is not None:
            _same_recipe(recipe, newest.state["recipe"], newest.path)
        elif (out / RECIPE).exists():
            _same_recipe(recipe, json.loads((out / RECIPE).read_text(encoding="utf-8")), out)
        return newest
    start = _named(Path(resume))
    _same_recipe(recipe, start.state["recipe"], start.path)
    if holds_run and (newest is None or newest.path.resolve() != start.path.resolve()):
        raise ValueError(
            f"resume: {out} holds a run that is not at {start.path}; to start another from there, name a new directory"
        )
    return start


def _named(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest of the run at `path`."""
    if (path / "manifest.json").is_file():
        return read_checkpoint(path)
    newest, skipped = load_newest(path / CHECKPOINTS)
    if newest is None:
        reason = f" ({'; '.join(skipped)})" if skipped else ""
        raise ValueError(f"resume: expected auto, never, or a checkpoint's or a run's directory, got {path}{reason}")
    return newest


def _same_recipe(recipe: Recipe, tables: dict, where: Path) -> None:
    if differences := recipe.differences(tables):
        raise ValueError(
            f"resume: the run in {where} has another recipe: {'; '.join(differences)}. Resume it with its own, or name "
            "another directory for this one"
        )


def adopt_metrics(start: Checkpoint, out: Path) -> None:
    """Bring the metrics of the run that `start` is from, where `out` has none."""
    source = start.path.parent.parent / METRICS
    if source.is_file() and not (out / METRICS).exists():
        shutil.copyfile(source, out / METRICS)


def open_data(recipe: Recipe, data, out: Path, start: Checkpoint | None) -> Dataset:
    """The data of the run in `out`: prepared already, or text that is prepared into OUT/data.

    ValueError where its rows are not the recipe's, or it is not what `start` was trained on.
    """
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    table, prepared = recipe.data, [path for path in paths if is_prepared(path)]
    if prepared and len(paths) > 1:
        raise ValueError(f"data: {prepared[0]} is prepared and stands alone; expected one such directory, or text")
    if prepared:
        directory = prepared[0]
    else:
        directory = out / DATA
        prepare_with_progress(
            paths, table.tokenizer, directory,
            row_tokens=table.row_tokens, documents=table.documents, min_chars=table.min_chars,
        )  # fmt: skip
    dataset = open_dataset(directory, None if start is None else start.state["data"]["accepted"])
    if start is not None and json_checksum(dataset.manifest) != start.state["data"]["manifest"]:
        raise ValueError(f"data: {directory} is not what the run was started on; resume with the same data")
    if dataset.row_tokens != table.row_tokens:
        raise ValueError(
            f"data.row_tokens: {directory} was prepared with rows of {dataset.row_tokens} tokens, the recipe says "
            f"{table.row_tokens}; set data.row_tokens={dataset.row_tokens}, or prepare the data again"
        )
    return dataset


def replace_json(path: Path, value) -> None:
    """Write a JSON file that is never seen half-written."""
    partial = path.with_name(f".{path.name}.partial")
    write_json(partial, value)
    os.replace(partial, path)
