"""Which files hold the text: files, directories, globs and saved `datasets` directories, in a fixed order."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fastlm.data.sources.files import (
    KIND_OF,
    MANIFEST,
    OTHER_TABLES,
    RUN_FILES,
    SAVED_SPLIT,
    SAVED_SPLITS,
    TOKENIZER,
    SourceFile,
    inner_suffix,
    label,
)
from fastlm.data.sources.report import Report
from fastlm.data.sources.streamed import is_stream, materialise


def is_prepared(path) -> bool:
    """Whether `path` is a directory that `prepare` wrote: a manifest.json beside a tokenizer/."""
    return os.path.isfile(os.path.join(path, MANIFEST)) and os.path.isdir(os.path.join(path, TOKENIZER))


def _is_run(path) -> bool:
    return all(os.path.isfile(os.path.join(path, name)) for name in RUN_FILES)


def find_files(
    paths: Iterable,
    report: Report,
    *,
    outputs: Iterable = (),
    spool=None,
    note: Callable[[str], None] = lambda line: None,
) -> list[SourceFile]:
    """The files that `paths` name, in the order given; a directory's in the order of its paths, a glob's sorted.

    paths     files, directories, globs ("corpus/**/*.jsonl.gz"), directories that `datasets` saved; "-", "-.jsonl" and
              so on for standard input; "hf:owner/name?split=train" for a dataset by name (`fastlm.data.sources.hub`)
    outputs   directories that the caller writes: skipped inside a directory, whatever they hold by now
    spool     a directory where standard input and datasets by name are written as files first
    note      called with a line before each of these

    What is skipped inside a directory has an entry in the report, unless it is hidden. ValueError for a missing path,
    an empty list, a table of another kind, or a directory that `prepare`, a run or the caller writes.
    """
    outputs = {os.path.realpath(output) for output in outputs}
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = []
    for given in paths:
        if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
            raise ValueError(f"data: expected the path of a file or a directory of text, got {given!r}")
        if is_stream(given):
            if spool is not None:
                note(f"{given} is written into {spool} first")
            files += materialise(given, spool)
            continue
        matches = glob.glob(os.fspath(given), recursive=True) if _is_glob(given) else [given]
        if not matches:
            raise ValueError(f"data: expected a glob that matches files, but nothing matches {given}")
        for path in sorted(matches):
            files += _named(Path(path), report, outputs)
    if not files:
        kinds = " ".join(sorted(KIND_OF))
        given = ", ".join(map(str, paths)) or "an empty list"
        raise ValueError(f"data: expected text ({kinds}), but found none in {given} ({report.reasons()})")
    return files


def _is_glob(given) -> bool:
    return glob.has_magic(os.fspath(given)) and not os.path.lexists(given)


def _named(given: Path, report: Report, outputs: set[str]) -> Iterable[SourceFile]:
    """The files of one path that the user named, or that a glob matches."""
    if is_prepared(given):
        raise ValueError(f"data: {given} is prepared already; train on it as it is, or name the text it came from")
    if os.path.realpath(given) in outputs or _is_run(given):
        raise ValueError(
            f"data: expected text, got {given}, which is a run's directory or to be written; name the text files "
            "in it, or a directory of text alone"
        )
    if os.path.isdir(given):
        return _walk(given, report, outputs)
    if inner_suffix(given) in OTHER_TABLES and os.path.isfile(given):
        raise ValueError(
            f"data: expected text, got {given}, which is a table of a kind that is not read; write it as .csv, .tsv "
            'or .parquet, or its text column as JSON lines, {"text": "..."} on each line of a .jsonl file'
        )
    if os.path.isfile(given):
        return [SourceFile(label(given.name), given, given.stat().st_size)]
    found = "is neither" if os.path.exists(given) else "does not exist"
    raise ValueError(f"data: expected a file or a directory of text, but {given} {found}")


def _walk(root: Path, report: Report, outputs: set[str]) -> Iterator[SourceFile]:
    parent = os.path.dirname(os.path.abspath(root))

    def place(path) -> str:
        return label(os.path.relpath(os.path.abspath(path), parent))

    def unreadable(error: OSError) -> None:
        report.reject(f"unreadable directory ({error.strerror})", place(error.filename))

    found = []
    for folder, folders, names in os.walk(root, onerror=unreadable):
        entered = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            path = os.path.join(folder, name)
            if os.path.islink(path):
                report.reject("link to a directory", place(path))
            elif is_prepared(path):
                report.reject("prepared directory", place(path))
            elif _is_run(path):
                report.reject("directory of a run", place(path))
            elif os.path.realpath(path) in outputs:
                report.reject("directory that is written to", place(path))
            else:
                entered.append(name)
        if SAVED_SPLITS in names:
            for name in entered:
                if name != "train":
                    report.reject("split other than train of a saved dataset", place(os.path.join(folder, name)))
            entered, names = [name for name in entered if name == "train"], []
        folders[:] = entered
        if set(SAVED_SPLIT) <= set(names):
            names = _saved(folder, report, place)
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    for path in sorted(found, key=lambda path: path.relative_to(root).parts):
        name = place(path)
        if inner_suffix(path) not in KIND_OF:
            report.reject(f"file of another kind ({label(path.suffix.lower()) or 'no suffix'})", name)
        elif not path.is_file():
            report.reject("not a regular file", name)
        else:
            yield SourceFile(name, path, path.stat().st_size)


def _saved(folder: str, report: Report, place: Callable[[str], str]) -> list[str]:
    """The data files of a directory that `datasets.Dataset.save_to_disk` wrote, as its state.json lists them."""
    path = os.path.join(folder, SAVED_SPLIT[0])
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        names = [entry["filename"] for entry in state["_data_files"]]
        indices = state.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError):
        report.reject("damaged state.json of a saved dataset", place(path))
        return []
    if indices:  # written by versions before 2.0: the rows are a selection that only `datasets` applies
        report.reject("saved dataset with a mapping of indices", place(folder))
        return []
    return names
