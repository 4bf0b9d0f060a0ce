"""Sources that cannot be read twice, written as files first: standard input and datasets by name."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from fastlm.data.sources import hub
from fastlm.data.sources.files import KINDS, SourceFile, inner_suffix
from fastlm.storage import atomic_file


def is_stream(given) -> bool:
    """Whether `given` names standard input ("-", "-.jsonl", "-.csv.gz") or a dataset by name ("hf:...")."""
    given = os.fspath(given)
    return isinstance(given, str) and (given == "-" or given.startswith(("-.", hub.PREFIX)))


def materialise(given, spool) -> list[SourceFile]:
    """The files of such a source, written into the directory `spool`.

    ValueError without a directory, for an unknown suffix, and where `hub.materialise` raises it.
    """
    given = os.fspath(given)
    if spool is None:
        raise ValueError(f"data: {given} is no file; write it to one first, and name that")
    if given.startswith(hub.PREFIX):
        return hub.materialise(given, Path(spool))
    suffix = given[1:] or ".txt"
    if inner_suffix(Path("stdin" + suffix)) not in set().union(*KINDS.values()):
        raise ValueError(
            f"data: expected -, or - and a suffix that says the format, as -.jsonl or -.csv.gz, got {given}"
        )
    target = Path(spool, "stdin" + suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as partial, open(partial, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return [SourceFile(target.name, target, target.stat().st_size)]
