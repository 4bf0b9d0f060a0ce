"""Files that are either whole or absent: atomic directories, checksums, JSON.

A directory is written under a hidden name beside its target, synced, and renamed: a process killed at any instant
leaves the target as it was. What it leaves under the hidden name is swept by the next writer of the same target.
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


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sweep(target: Path) -> None:
    """Remove what killed writers of `target` left. A living one holds a lock on its directory, a dead one none."""
    for stale in target.parent.glob(glob.escape(f".{target.name}.partial-") + "*"):
        try:
            fd = os.open(stale, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another writer swept it first
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(stale, ignore_errors=True)
        finally:
            os.close(fd)


def _locked_directory(target: Path) -> tuple[Path, int]:
    """A new hidden directory beside `target`, and the descriptor whose lock says that its writer lives."""
    while True:
        partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if partial.exists():
            return partial, lock
        os.close(lock)  # another writer took it for a dead one's, between mkdir and the lock


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target`, complete and synced, when the block ends without an error.

    `target` must not exist, or be an empty directory; a symbolic link is followed. After an error nothing is left.
    FileExistsError where another writer finished `target` meanwhile: its work stays, ours is dropped. OSError where
    the directory cannot be made, or is a mount point, which nothing can be renamed to.
    """
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):
        raise OSError(
            errno.EBUSY, "is a mount point, which cannot be replaced whole; name a directory in it", str(target)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    partial, lock = _locked_directory(target)
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            _fsync(path)
        _fsync(partial)
        try:
            os.rename(partial, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise FileExistsError(f"{target} exists already and is not empty; it was left as it is") from error
        _fsync(target.parent)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)
