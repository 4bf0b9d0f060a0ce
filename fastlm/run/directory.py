"""The directory of a run: the lock on it, where a run in it starts, and the data in it.

OUT/data/             the text, prepared, where text was given; of a fine-tuning the tokenizer alone
OUT/recipe.json       what the run is
OUT/metrics.jsonl     a line a step; see fastlm.run.metrics
OUT/checkpoints/      see fastlm.run.checkpoint
OUT/cuda_graph.json   on a GPU: whether steps are a CUDA graph; see fastlm.train.graph
OUT/tensorboard/, OUT/wandb/     where asked for; see fastlm.run.tracking
OUT/summary.json, OUT/loss.png, OUT/hf/     at the end
OUT/metrics.json, OUT/curves.png, OUT/confusion.png     of a fine-tuning, at the end; see fastlm.run.reports

With --seeds, OUT/seed-0, OUT/seed-1 and so on are such directories, and OUT has recipe.json, metrics.json and hf alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastlm.data import Dataset, Mixture, is_prepared, open_dataset
from fastlm.data.identity import OtherPreparation, setting_differences
from fastlm.data.labelled import Examples
from fastlm.data.mixture import Joined, parse_weights
from fastlm.data.shards import read_manifest, verify_ahead
from fastlm.data.sources import RUN_FILES
from fastlm.data.tokenizer import parse
from fastlm.run.checkpoint import Checkpoint, load_newest, read_checkpoint
from fastlm.run.progress import prepare_with_progress
from fastlm.run.recipe import FREE_KEYS, TABLES, Recipe
from fastlm.storage import atomic_file, json_checksum, replace_json
from fastlm.tasks import DataTable, find_task
from fastlm.tasks._tables import split_names

DATA = "data"
REPORTS = "metrics.json", "curves.png", "confusion.png"
WRITTEN = *RUN_FILES, "checkpoints", "summary.json", "loss.png", "hf", "cuda_graph.json"  # by a run, beside DATA
RECIPE, METRICS, CHECKPOINTS, SUMMARY, PLOT, MODEL, GRAPH = WRITTEN


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


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    recipe       the run's; what was "auto" is as it was when the run began, and open in a new one
    checkpoint   the one it continues; None for new weights
    origin       the checkpoint of another run that this one was started from, as recipe.json stores it, or None
    branches     whether `checkpoint` is that one
    """

    recipe: Recipe
    checkpoint: Checkpoint | None = None
    origin: str | None = None
    branches: bool = False


def find_start(recipe: Recipe, out: Path, resume: str) -> Start:
    """Where a run in `out` starts; `resume` as of `pretrain`. ValueError where it would overwrite another."""
    if resume == "never":
        if _holds_run(out):
            raise ValueError(f"resume: {out} holds a run, which `never` would overwrite; name another directory")
        return Start(recipe)
    newest, skipped = load_newest(out / CHECKPOINTS)
    stored = read_recipe(out)
    origin = None if stored is None else stored.get("origin")
    named = os.path.realpath(resume)
    if resume == "auto" or (origin is not None and named in (origin, os.path.dirname(os.path.dirname(origin)))):
        for reason in skipped:
            warnings.warn(f"skipped {reason}", stacklevel=2)
        if newest is None and skipped:
            raise ValueError(
                f"resume: no checkpoint in {out} can be used ({'; '.join(skipped)}); restore one, or name another "
                "directory"
            )
        start = newest
        if newest is None and origin is not None:  # killed before its own first checkpoint
            start = _origin(Path(origin), out)
    else:
        start = _named(Path(resume))
        if _holds_run(out) and (newest is None or not newest.path.samefile(start.path)):
            from_where = f", and was started from {origin}" if origin is not None else ""
            raise ValueError(
                f"resume: {out} holds a run that is not at {start.path}{from_where}; continue it with --resume auto, "
                "or name a new directory to start another from there"
            )
        if newest is None:
            origin = os.path.realpath(start.path)
    if start is not None:
        recipe = _as_recorded(recipe, start.state["recipe"], start.path, branches=newest is None)
    elif stored is not None:
        recipe = _as_recorded(recipe, stored, out)
    finished = [name for name in (MODEL, SUMMARY) if (out / name).exists()]
    if newest is None and finished:
        raise ValueError(
            f"out: expected no finished run in {out}, where there is no checkpoint of it to continue from; found "
            f"{' and '.join(finished)}. Delete what is there to train anew, or name another directory"
        )
    return Start(recipe, start, origin, branches=start is not None and newest is None)


def check_series(out: Path, resume: str) -> None:
    """ValueError where runs in OUT/seed-S, and their metrics.json and hf in OUT, would overwrite another run."""
    single = [name for name in (CHECKPOINTS, METRICS, SUMMARY) if (out / name).exists()]
    if single:
        raise ValueError(
            f"out: expected a directory without a run of its own for several seeds, got {out}, which holds "
            f"{' and '.join(single)}; name another directory"
        )
    if resume == "never" and _holds_run(out):
        raise ValueError(f"resume: {out} holds runs, which `never` would overwrite; name another directory")


def _holds_run(out: Path) -> bool:
    return any((out / name).exists() for name in WRITTEN)


def read_recipe(out: Path) -> dict | None:
    """What recipe.json in `out` holds: `Recipe.to_dict()`, its name, and the origin; None where there is none."""
    path = out / RECIPE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(content.get(name, {}), dict) for name in TABLES):
            raise ValueError("it is no recipe")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"out: {path} is damaged ({error}); delete it: a run with checkpoints continues from the newest, one "
            "without starts again"
        ) from error
    return content


def finished_summary(out: Path) -> dict | None:
    """summary.json of the run in `out`, where its model lies beside it: all that a run writes is written."""
    if (out / SUMMARY).is_file() and (out / MODEL).is_dir():
        return json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    return None


def write_recipe(out: Path, recipe: Recipe, origin: str | None) -> None:
    content = {"name": recipe.name, **({} if origin is None else {"origin": origin}), **recipe.to_dict()}
    replace_json(out / RECIPE, content, what="the recipe")


def _origin(path: Path, out: Path) -> Checkpoint:
    try:
        return read_checkpoint(path)
    except ValueError as error:
        raise ValueError(
            f"resume: the run in {out} has no checkpoint of its own yet, and the one that it was started from cannot "
            f"be used ({error}); restore that, or name another directory"
        ) from error


def _named(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest of the run at `path`."""
    if (path / "manifest.json").is_file():
        return read_checkpoint(path)
    newest, skipped = load_newest(path / CHECKPOINTS)
    if newest is None:
        reason = f" ({'; '.join(skipped)})" if skipped else ""
        raise ValueError(f"resume: expected auto, never, or a checkpoint's or a run's directory, got {path}{reason}")
    return newest


def _as_recorded(recipe: Recipe, content: dict, where: Path, *, branches: bool = False) -> Recipe:
    """`recipe`, where it says "auto" with what the run in `where` has; ValueError where they differ.

    content: that run's recipe
    """
    try:
        differences = recipe.differences(content)
    except ValueError as error:
        raise ValueError(
            f"resume: the run in {where} has a recipe that this version of fastlm does not read ({error}); resume it "
            "with the version that started it, or name another directory"
        ) from error
    if differences and branches:
        raise ValueError(
            f"resume: the run in {where} has another recipe: {'; '.join(differences)}. A run that starts from it goes "
            f"on with its optimizer and schedule, so only {' and '.join(sorted(FREE_KEYS))} may differ: give its "
            f"recipe. To train its weights by another recipe, give --init {where} and no --resume"
        )
    if differences:
        raise ValueError(
            f"resume: the run in {where} has another recipe: {'; '.join(differences)}. Resume it with its own, or name "
            "another directory for this one with --out; --init with this run's directory starts that one from its "
            "weights"
        )
    return recipe.settled_as(content)


def adopt_metrics(start: Start, out: Path) -> None:
    """Bring the metrics of the run that `start` is from, where `out` has none."""
    if start.checkpoint is None:
        return
    source = start.checkpoint.path.parent.parent / METRICS
    if source.is_file() and not (out / METRICS).exists():
        with atomic_file(out / METRICS, what="the metrics of the run it starts from") as partial:
            shutil.copyfile(source, partial)


_OTHER_DATA = (
    "data: {directory} is not what the run was started on: {differences}. Resume with the same data. To train on this "
    "data from the run's weights, start another run: --init with this one's directory, --out with a new one"
)


def data_state(dataset: Dataset | Mixture) -> dict:
    """What a checkpoint stores of the data: enough to find it changed, and to say what of it."""
    if isinstance(dataset, Mixture):
        return {"sources": [data_state(source) for source in dataset.sources]}
    manifest = dataset.manifest
    return {
        "manifest": json_checksum(manifest),
        "accepted": dataset.accepted,
        "settings": manifest["settings"],
        "tokenizer": manifest["tokenizer"]["checksum"],
        "documents": dataset.documents,
        "text_bytes": manifest.get("text_bytes"),  # of text, not of labelled examples
    }


def data_differences(manifest: dict, stored: dict) -> list[str]:
    """What is not as in `stored`, as of `data_state`; checkpoints of older versions hold only the first two entries."""
    if json_checksum(manifest) == stored["manifest"]:
        return []
    before = stored.get("settings", manifest["settings"])
    found = setting_differences(manifest["settings"], before)
    if manifest["tokenizer"]["checksum"] != stored.get("tokenizer", manifest["tokenizer"]["checksum"]):
        found.append("its tokenizer is another one")
    text = [(what, manifest.get(key), stored.get(key)) for what, key in _TEXT.items()]
    found += [f"its text has {now:,} {what}, had {was:,}" for what, now, was in text if None is not was != now]
    return found or ["its text or its tokenizer is another one"]


def check_same_data(manifest: dict, stored: dict, named) -> None:
    """ValueError where the data of `manifest`, that the user named so, is not what a checkpoint has: `data_state`."""
    if differences := data_differences(manifest, stored):
        raise ValueError(_OTHER_DATA.format(directory=named, differences="; ".join(differences)))


_TEXT = {"documents": "documents", "bytes": "text_bytes"}


@dataclass(frozen=True)
class Data:
    """The rows that a run trains on, those of held-out text, None without, and those that end a fine-tuning."""

    train: Dataset | Mixture | Examples
    validation: Dataset | Joined | Examples | None
    test: Examples | None = None


def prepare_for(task: str, table: DataTable, paths, directory: Path, outputs: Iterable = (), **executor) -> Dataset:
    """Prepare the text in `paths` as rows for `task`, as its table [data] says, with progress on the terminal.

    executor: `processes`, `executor` and `ray_address` of `fastlm.data.prepare`

    ValueError for `data.weights`, which mix what is prepared already, and for what `fastlm.data.prepare` refuses.
    """
    if table.weights:
        raise ValueError(
            f"data.weights: expected none while text is prepared, got {table.weights}; leave them out here, and give "
            "them to `fastlm pretrain` with the prepared directories"
        )
    return prepare_with_progress(
        paths,
        parse(table.tokenizer, table.tokenizer_sample),
        directory,
        layout=find_task(task).layout(table),
        documents=table.documents,
        cleaning=table.cleaning(),
        near_duplicates=table.near_duplicates,
        fields=split_names(table.field),
        packing=table.packing,
        validation=table.validation or None,
        validation_share=table.validation_share,
        outputs=outputs,
        **executor,
    )


def open_data(recipe: Recipe, data, out: Path, start: Checkpoint | None) -> Data:
    """The data of the run in `out`: prepared already, in one directory or several, or text that is prepared into
    OUT/data. A thread checks the shards.

    ValueError where its rows are not the recipe's, or it is not what `start` was trained on.
    """
    opened = _open(recipe, data, out, start)
    held = () if opened.validation is None else opened.validation.sources
    verify_ahead([*opened.train.sources, *held])
    return opened


def _open(recipe: Recipe, data, out: Path, start: Checkpoint | None) -> Data:
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    text = [path for path in paths if not is_prepared(path)]
    given, stored = " ".join(map(str, paths)), None if start is None else start.state["data"]
    if recipe.data.weights or len(text) < len(paths):
        if len(text) == len(paths):
            raise ValueError(
                f"data.weights: expected prepared directories to mix, got text, {given}, and the weights "
                f"{recipe.data.weights}; leave data.weights out, or prepare each source with `fastlm prepare`"
            )
        if text:
            raise ValueError(
                f"data: expected text alone, or prepared directories alone, which data.weights mixes; got {given}, of "
                f"which {text[0]} is text; prepare that with `fastlm prepare`, and the tokenizer of the others"
            )
        if recipe.data.weights or len(paths) > 1:
            return _open_mix(recipe, list(map(Path, paths)), stored)
        return _open_one(recipe, Path(paths[0]), stored)
    try:
        prepare_for(recipe.task, recipe.data, paths, out / DATA, outputs=[out])
    except OtherPreparation as error:
        raise ValueError(_OTHER_DATA.format(directory=given, differences="; ".join(error.differences))) from error
    return _open_one(recipe, out / DATA, stored)


def _open_mix(recipe: Recipe, directories: list[Path], stored: dict | None) -> Data:
    """Several prepared datasets. Their held-out text is joined: each row of it is evaluated once.

    stored: the `data_state` of the checkpoint that the run continues
    """
    if not recipe.data.weights:
        raise ValueError(
            f"data.weights: expected {len(directories)} numbers by commas, one for each of "
            f"{' '.join(map(str, directories))}, got none; {','.join('1' * len(directories))} mixes equal parts"
        )
    try:
        weights = parse_weights(recipe.data.weights, directories)
    except ValueError as error:
        raise ValueError(f"data.{error}") from error
    states = [None] * len(weights) if stored is None else stored.get("sources", [stored])
    if len(states) != len(weights):
        raise _other_sources(directories, len(states))
    opened = [_open_one(recipe, directory, state) for directory, state in zip(directories, states)]
    held = [data.validation for data in opened if data.validation is not None]
    mixture = Mixture((data.train for data in opened), recipe.data.weights)
    return Data(mixture, Joined(held) if held else None)


def _other_sources(directories: list[Path], before: int) -> ValueError:
    return ValueError(
        _OTHER_DATA.format(
            directory=" ".join(map(str, directories)), differences=f"sources are {len(directories)}, were {before}"
        )
    )


def _open_one(recipe: Recipe, directory: Path, stored: dict | None) -> Data:
    """The prepared data in `directory`. stored: the `data_state` of the checkpoint that the run continues"""
    table, layout = recipe.data, find_task(recipe.task).layout(recipe.data)
    if stored is not None and "sources" in stored:
        raise _other_sources([directory], len(stored["sources"]))
    if stored is not None:
        check_same_data(read_manifest(directory), stored, directory)
    dataset = open_dataset(directory, None if stored is None else stored["accepted"], lazy=True)
    if dataset.layout != layout.name:
        raise ValueError(
            f"data: {directory} was prepared with {dataset.layout} rows, task {recipe.task} needs {layout.name} ones; "
            "prepare the text again, with --recipe"
        )
    for name, wanted in layout.settings().items():
        found = dataset.manifest["settings"].get(name)
        if found != wanted:
            raise ValueError(
                f"data.{name}: {directory} was prepared with {found}, the recipe says {wanted}; set "
                f"data.{name}={found}, or prepare the data again"
            )
    held = bool(dataset.manifest["validation"]["rows"])
    if (table.validation or table.validation_share) and not held:
        raise ValueError(
            f"data.validation: {directory} was prepared without held-out text; prepare it again with --validation or "
            "--validation-share, or leave both out of the recipe"
        )
    return Data(dataset, open_dataset(directory, split="validation", lazy=True) if held else None)
