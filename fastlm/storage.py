"""Files that are either whole or absent: atomic directories and files, checksums, JSON.

Both are written under a hidden name beside their target, synced, and renamed. A process that is killed at any instant
leaves the target unchanged. The next writer of the same target removes what is left under the hidden name.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 20


def file_checksum(*paths: Path) -> str:
    """SHA-256, in hexadecimal, of the bytes of `paths` one after another. OSError where one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def json_checksum(value) -> str:
    """SHA-256, in hexadecimal, of `value` as canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(directory: Path, pattern: str) -> None:
    """Removes what killed writers left in `directory`, for targets that the glob `pattern` matches.

    A running writer holds a lock on what it writes; a killed one does not.
    """
    for stale in directory.glob(f".{pattern}.partial-*"):
        try:
            fd = os.open(stale, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another writer swept it first
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            _remove(stale)
        finally:
            os.close(fd)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


@contextmanager
def partial_of(target: Path, *, directory: bool) -> Iterator[Path]:
    """A new hidden file or directory beside `target`, locked while it is written, removed at the end if it is left.

    Leftovers of killed writers of `target` are removed first.
    """
    sweep(target.parent, glob.escape(target.name))
    while True:
        partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
        partial.mkdir() if directory else partial.touch(exist_ok=False)
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if partial.exists():
            break
        os.close(lock)  # another writer removed it before it was locked
    try:
        yield partial
    finally:
        os.close(lock)
        _remove(partial)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields the path of a temporary file. When the block ends, the file is synced and replaces `target`.

    After an error `target` is unchanged and the temporary file is removed.
    """
    with partial_of(target, directory=False) as partial:
        yield partial
        fsync(partial)
        os.replace(partial, target)
        fsync(target.parent)


def replace_json(path: Path, value) -> None:
    """Writes a JSON file atomically."""
    with atomic_file(path) as partial:
        write_json(partial, value)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory. When the block ends without an error, it is synced and becomes `target`.

    `target` must be an empty directory or not exist; a symbolic link is followed. After an error nothing is left.
    FileExistsError: another writer has finished `target` meanwhile; its result stays and ours is removed. OSError: the
    directory cannot be made, or is a mount point, which cannot be replaced.
    """
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):
        raise OSError(
            errno.EBUSY, "is a mount point, which cannot be replaced whole; name a directory in it", str(target)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial_of(target, directory=True) as partial:
        yield partial
        for path in sorted(partial.rglob("*")):
            fsync(path)
        fsync(partial)
        try:
            os.rename(partial, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise FileExistsError(f"{target} exists already and is not empty; it was left as it is") from error
        fsync(target.parent)
