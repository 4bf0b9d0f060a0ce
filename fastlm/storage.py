"""Files that are either whole or absent: atomic directories and files, checksums, JSON.

Both are written under a hidden name beside their target, synced, and renamed. A process that is killed at any instant
leaves the target unchanged. The next writer of the same target removes what is left under the hidden name. Where a disk
is full, what was written is removed, and `NoSpace` says in one line what is needed and what is kept.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and tokenizers raise errors of their own with Rust's "(os error 28)"; numpy's has no errno, and says
# "374656 requested and 204736 written" of any short write.
_SAYS_FULL = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b|\d+ requested and \d+ written")


class NoSpace(OSError):
    """A file could not be written: the disk is full, or a quota or a limit on the size of files is reached."""


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


def is_full(error: Exception) -> bool:
    """Whether a write failed since there is no room, by `error` as Python or one of the libraries raises it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return bool(_SAYS_FULL.search(str(error)))


def no_space(
    target: Path, error: Exception, *, what: str, kept: str, need: int | None = None, written: int = 0
) -> NoSpace:
    """The error of one line for a write of `what` to `target` that `error` ended.

    need: bytes; None where only `written`, how far it came, is known. kept: what is still there, and what to do.
    """
    place = target.parent
    while not place.exists():
        place = place.parent
    needs = f"it needs {_megabytes(need)}" if need else f"it needs more than {_megabytes(written)}"
    free = shutil.disk_usage(place).free + written  # what was written is removed
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no space left"
    return NoSpace(f"{target}: {what} cannot be written: {reason}; {needs}, {_megabytes(free)} are free; {kept}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"


def _size(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


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
def partial_of(
    target: Path,
    *,
    directory: bool,
    what: str = "it",
    need: int | Callable[[int], int] | None = None,
    kept: str = "what was there before is unchanged",
) -> Iterator[Path]:
    """A new hidden file or directory beside `target`, locked while it is written, removed at the end if it is left.

    Leftovers of killed writers of `target` are removed first.

    what, need, kept: for the error where there is no room, as of `no_space`; `need` may be a function of the bytes that
        were written until then.
    """
    sweep(target.parent, glob.escape(target.name))
    partial = lock = None
    try:
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
        yield partial
    except Exception as error:
        if isinstance(error, NoSpace) or not is_full(error):
            raise
        written = _size(partial) if partial.exists() else 0
        need = need(written) if callable(need) else need
        raise no_space(target, error, what=what, kept=kept, need=need, written=written) from error
    finally:
        if lock is not None:
            os.close(lock)
        _remove(partial)


@contextmanager
def atomic_file(target: Path, **space) -> Iterator[Path]:
    """Yields the path of a temporary file. When the block ends, the file is synced and replaces `target`.

    After an error `target` is unchanged and the temporary file is removed. space: what, need, kept of `partial_of`.
    """
    with partial_of(target, directory=False, **space) as partial:
        yield partial
        fsync(partial)
        os.replace(partial, target)
        fsync(target.parent)


def replace_json(path: Path, value, **space) -> None:
    """Writes a JSON file atomically."""
    with atomic_file(path, **space) as partial:
        write_json(partial, value)


@contextmanager
def atomic_directory(target: Path, **space) -> Iterator[Path]:
    """Yields a temporary directory. When the block ends without an error, it is synced and becomes `target`.

    `target` must be an empty directory or not exist; a symbolic link is followed. After an error nothing is left.
    space: what, need, kept of `partial_of`.
    FileExistsError: another writer has finished `target` meanwhile; its result stays and ours is removed. OSError: the
    directory cannot be made, or is a mount point, which cannot be replaced.
    """
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):
        raise OSError(
            errno.EBUSY, "is a mount point, which cannot be replaced whole; name a directory in it", str(target)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial_of(target, directory=True, **space) as partial:
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
