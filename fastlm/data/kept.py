"""The hidden directory beside the output, whose finished files survive a preparation that was killed."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT = "the finished parts are kept; make room and rerun the same command"


@contextmanager
def kept_parts(out: Path, identity: str) -> Iterator[Path]:
    """The hidden directory beside `out` for the parts of the preparation `identity`, which a killed one may have left.

    It is removed at the end, where `out` exists meanwhile (FileExistsError), and after a ValueError, which the same
    command would meet again. Other errors keep it.
    Those of other preparations of `out` are removed. Another process that prepares the same is waited for.
    """
    out = Path(os.path.realpath(out))
    directory = out.parent / f".{out.name}.parts-{identity[:16]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    for other in out.parent.glob(f".{glob.escape(out.name)}.parts-*"):
        if other != directory and (lock := _lock(other, fcntl.LOCK_NB)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    lock = None
    while lock is None:
        directory.mkdir(exist_ok=True)
        lock = _lock(directory)
    try:
        yield directory
        shutil.rmtree(directory)
    except (ValueError, FileExistsError):
        shutil.rmtree(directory)
        raise
    finally:
        os.close(lock)


def _lock(directory: Path, flag: int = 0) -> int | None:
    """A descriptor that holds the lock of `directory`; None where another has it, with LOCK_NB, or removed it."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | flag)
    except OSError:
        os.close(fd)
        return None
    if directory.exists() and os.path.samestat(os.fstat(fd), os.stat(directory)):
        return fd
    os.close(fd)
    return None
