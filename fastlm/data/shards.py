"""Prepared data on disk: memory-mapped shards of packed rows, and the manifest that vouches for them.

    OUT/manifest.json            counts, settings, report, and a checksum for every shard
    OUT/tokenizer/               in Transformers' layout
    OUT/00000.tokens.npy         (rows, width) the smallest unsigned type that holds the vocabulary
    OUT/00000.offsets.npy        (rows + 1,) int64
    OUT/00000.pieces.npy         (pieces, 2 or 3) int64; see `fastlm.data.packing.Shard`
    OUT/validation-00000...      the same of text that is held out

Rows are numbered through the accepted shards in the manifest's order. Nothing is pickled. Of many shards, those that
were read last are mapped: memory does not grow with the data, but for 8 bytes a shard and its name. No file stays open.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlm.data.order import Endless
from fastlm.data.packing import Shard, ragged
from fastlm.data.sources import MANIFEST, TOKENIZER
from fastlm.data.tokenizer import Tokenizer
from fastlm.data.verification import Verification, check_ahead
from fastlm.storage import file_checksum, json_checksum

FORMAT = "fastlm rows"
VERSION = 2
SPLITS = ("train", "validation")
_MAPPED = 300  # shards of a split at a time, three mappings each: a process may have 65,530 on Linux
_LOST = (errno.ENOENT, errno.EIO)  # what damage looks like; any other error of reading may be over at the next try


def _paths(directory: Path, name: str) -> list[Path]:
    return [directory / f"{name}.{part}.npy" for part in ("tokens", "offsets", "pieces")]


def write_shard(directory: Path, name: str, shard: Shard) -> dict:
    """Write `shard` under `name`; its entry in the manifest."""
    paths = _paths(directory, name)
    for path, array in zip(paths, (shard.tokens, shard.offsets, shard.pieces), strict=True):
        np.save(path, array, allow_pickle=False)
    return {
        "name": name,
        "rows": len(shard.tokens),
        "pieces": len(shard.pieces),
        "max_pieces": int(np.diff(shard.offsets).max()),
        "used": list(shard.used),
        "checksum": file_checksum(*paths),
    }


def remedy(directory: Path) -> str:
    """What to do about damage that nothing can be restored from."""
    return f"delete {directory} and prepare the data again"


def tokenizer_checksum(directory: Path) -> str:
    """Of the tokenizer's files as they lie there. OSError where one is missing."""
    return file_checksum(*(directory / TOKENIZER / name for name in ("tokenizer.json", "tokenizer_config.json")))


def read_manifest(directory: Path) -> dict:
    """The manifest in `directory`, checked. ValueError where it is missing, damaged, or of another version."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"data: expected a directory that `fastlm prepare` wrote, but {path} does not exist")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"], manifest["version"]
        whole = manifest.pop("checksum") == json_checksum(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data: {path} is damaged ({error!r}); {remedy(directory)}") from error
    if found != (FORMAT, VERSION):
        raise ValueError(f"data: {path} has format {found}, expected {(FORMAT, VERSION)}; {remedy(directory)}")
    if not whole:
        raise ValueError(f"data: {path} does not match its own checksum; {remedy(directory)}")
    return manifest


class Dataset(Endless):
    """Prepared rows, open for reading. Make one with `open_dataset`.

    rows             how many, over the accepted shards
    row_tokens       the recipe's length of each
    width            cells of each, as stored; more than row_tokens for span rows, before their corruption
    layout           "masked", "causal" or "span"; `fastlm.data.layouts`
    max_pieces       the most pieces that one holds, the padding at its end counted as one
    fill             share of the rows that is no padding; with span rows, of the encoder's and of the decoder's
    documents, text_tokens, text_bytes     of the text as a whole; the bytes in UTF-8
    accepted         {shard name: checksum}, in order: a checkpoint stores it, a resume passes it to open_dataset
    set_aside        {shard name: reason}
    unigram_entropy  in nats, of the corpus's tokens, special ones aside: the loss of a model that knows frequencies
    tokenizer        the Tokenizer it was prepared with
    manifest         everything else that preparation recorded
    """

    def __init__(
        self,
        directory: Path,
        manifest: dict,
        accepted: dict[str, str],
        set_aside: dict[str, str],
        split: str,
        verification: Verification | None = None,
    ):
        self.directory, self.manifest, self.split = directory, manifest, split
        self.accepted, self.set_aside = accepted, set_aside
        self.row_tokens: int = manifest["row_tokens"]
        self.width: int = manifest["width"]
        self.layout: str = manifest["settings"]["layout"]
        part = _part(manifest, split)
        self.documents: int = part["documents"]
        self.fill: list[float] = part["fill"]
        self.text_bytes: int = part["text_bytes"]
        self.text_tokens: int = part["text_tokens"]
        self.unigram_entropy: float = part["unigram_entropy"]
        self.tokenizer = Tokenizer.load(directory / TOKENIZER)
        self._verification = verification
        self._names = list(accepted)
        entries = [shard for shard in part["shards"] if shard["name"] in accepted]
        like = [_header(path) for path in _paths(directory, self._names[0])]
        # Not a method: the files of a dataset are unmapped with its last reference, which a cycle would keep.
        self._shard = lru_cache(_MAPPED)(partial(_mapped, directory, entries, like))
        # (shards + 1,) the number of each shard's first row, and after the last the number of rows
        self._first = np.cumsum([0] + [shard["rows"] for shard in entries])
        self.rows = int(self._first[-1])
        self.max_pieces = max(
            shard["max_pieces"] if "max_pieces" in shard else int(np.diff(self._shard(index).offsets).max())
            for index, shard in enumerate(entries)  # older preparations have no such entry
        )

    def _verified(self, shards: Iterable[int]) -> None:
        """ValueError where one of these shards, or another one until now, does not have its checksum.

        The first shard is always checked with them: all are read by its headers.
        """
        if self._verification is not None and (bad := self._verification.need({0, *shards})):
            reasons = "; ".join(f"shard {self._names[index]}: {reason}" for index, reason in sorted(bad.items()))
            raise ValueError(
                f"data: in {self.directory}, {reasons}. Its rows were not used. Restore it, or "
                f"{remedy(self.directory)}; a new run without it starts where its files are moved away"
            )

    @property
    def sources(self) -> tuple[Dataset, ...]:
        """Itself alone: `fastlm.data.mixture` has several."""
        return (self,)

    def shards(self) -> Iterator[Shard]:
        """The accepted shards in the rows' order, memory-mapped."""
        for index in range(len(self._names)):
            self._verified([index])
            yield self._shard(index)

    def nearby(self, rows: np.ndarray, shards: int) -> np.ndarray:
        """(k,) for the random `rows` (k,) as many random ones of the `shards` shards that come first among them.

        They are `rows` themselves where these lie in so few. A row may be there twice.
        """
        homes, first = np.unique(np.searchsorted(self._first, rows, side="right") - 1, return_index=True)
        if len(homes) <= shards:
            return rows
        home = homes[np.argsort(first)[:shards]][np.arange(len(rows)) % shards]
        return self._first[home] + rows % np.diff(self._first)[home]

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the rows numbered `rows` (k,): tokens (k, width), how many pieces in each (k,), the pieces (p, 2 or 3).

        ValueError where `open_dataset` was lazy and a shard does not have its checksum.
        """
        home = np.searchsorted(self._first, rows, side="right") - 1
        homes = np.unique(home).tolist()
        self._verified(homes)
        places = [(index, np.flatnonzero(home == index)) for index in homes]
        places = [(self._shard(index), at, rows[at] - self._first[index]) for index, at in places]
        tokens = np.empty((len(rows), self.width), self._shard(0).tokens.dtype)
        counts = np.empty(len(rows), np.int64)
        for shard, at, local in places:
            tokens[at] = shard.tokens[local]
            counts[at] = shard.offsets[local + 1] - shard.offsets[local]
        ends = np.cumsum(counts)
        pieces = np.empty((ends[-1] if len(ends) else 0, self._shard(0).pieces.shape[1]), np.int64)
        for shard, at, local in places:
            pieces[ragged(ends[at] - counts[at], counts[at])] = shard.pieces[ragged(shard.offsets[local], counts[at])]
        return tokens, counts, pieces


def verify_ahead(datasets: Iterable[Dataset]) -> threading.Thread:
    """The thread that checks all shards' checksums, where `open_dataset` has not: see `fastlm.data.verification`."""
    return check_ahead([dataset._verification for dataset in datasets if dataset._verification is not None])


def _part(manifest: dict, split: str) -> dict:
    return manifest if split == "train" else manifest["validation"]


def open_dataset(
    directory,
    accepted: dict[str, str] | None = None,
    *,
    strict: bool = False,
    split: str = "train",
    lazy: bool = False,
) -> Dataset:
    """Open what `prepare` wrote, after checking every shard's checksum.

    accepted   None: a shard that fails is set aside with a warning, or, if `strict`, raises.
               A dict from `Dataset.accepted` (a checkpoint's): exactly those shards, and any that fails raises.
    split      "train", or "validation": the text that was held out
    lazy       check only that the shards' files are there with their sizes. The checksum of each is checked before a
               row of it is given out, and one that fails raises then; `verify_ahead` has a thread check them

    ValueError where a manifest, a tokenizer or (as above) a shard is missing or damaged, or no shard is left.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    # The files' checksum, not Tokenizer.hash: a later release of `tokenizers` may write the same rules in other words.
    try:
        found = tokenizer_checksum(directory)
    except OSError as error:
        reason = _lost(error, "one of its files")
        raise ValueError(f"data: {directory / TOKENIZER}: {reason}; {remedy(directory)}") from error
    if found != manifest["tokenizer"]["checksum"]:
        raise ValueError(
            f"data: {directory / TOKENIZER} is not the one the data was prepared with; restore it, or "
            f"{remedy(directory)}"
        )
    if split not in SPLITS:
        raise ValueError(f"split: expected {' or '.join(SPLITS)}, got {split!r}")
    entries = {shard["name"]: shard for shard in _part(manifest, split)["shards"]}
    checksums = {name: shard["checksum"] for name, shard in entries.items()}
    if not checksums:
        raise ValueError(
            f"data: {directory} holds no {split} rows; prepare it again with a validation text or a validation_share"
        )
    if accepted is not None:
        for name, checksum in accepted.items():
            if checksums.get(name) != checksum:
                raise ValueError(
                    f"data: the run was started on a shard {name} that {directory} does not list; resume with the data "
                    "it was started on"
                )
        checksums = {name: checksum for name, checksum in checksums.items() if name in accepted}
    good, bad = {}, {}
    for name, checksum in checksums.items():
        if reason := _missing(directory, entries[name]) if lazy else _damage(directory, name, checksum):
            bad[name] = reason
        else:
            good[name] = checksum
    reasons = "; ".join(f"shard {name}: {reason}" for name, reason in bad.items())
    if bad and (strict or accepted is not None):
        raise ValueError(f"data: in {directory}, {reasons}; restore it, or {remedy(directory)}")
    if not good:
        raise ValueError(f"data: no shard in {directory} can be used ({reasons}); {remedy(directory)}")
    if bad:
        message = f"data: set aside, and not trained on, in {directory}: {reasons}; restore it, or {remedy(directory)}"
        warnings.warn(message, stacklevel=2)
    listed = list(good.items())
    verification = Verification(len(good), lambda index: _damage(directory, *listed[index])) if lazy else None
    return Dataset(directory, manifest, good, bad, split, verification)


class _Header(NamedTuple):
    """Of an .npy file: where the array begins, its type and shape."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def size(self, length: int) -> int:
        """Bytes of a file with `length` entries."""
        return self.offset + length * math.prod(self.shape[1:]) * self.dtype.itemsize


def _header(path: Path) -> _Header:
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise ValueError(f"data: expected numbers in {path}, got Python objects, which are pickled")
        return _Header(file.tell(), dtype, shape)


def _lengths(entry: dict) -> tuple[int, int, int]:
    """Of the arrays of a shard, in the order of `_paths`."""
    return entry["rows"], entry["rows"] + 1, entry["pieces"]


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_PROT_READ, _MAP_SHARED, _MAP_FAILED = 1, 1, ctypes.c_void_p(-1).value


class _Mapping:
    """Bytes of a file at `address`, unmapped with the last array on them."""

    def __init__(self, address: int, size: int, like: _Header, length: int):
        self._place = address, size
        place = {"data": (address + like.offset, True), "shape": (length, *like.shape[1:])}  # True: for reading alone
        self.__array_interface__ = {"version": 3, "typestr": like.dtype.str, **place}

    def __del__(self):
        _LIBC.munmap(*self._place)


def _mapped_array(path: Path, length: int, like: _Header) -> np.ndarray:
    """By the C library: Python's `mmap` keeps a descriptor for each file (but with 3.13's trackfd=False), of which a
    process often has 1024."""
    size = like.size(length)
    with open(path, "rb") as file:
        if (found := os.fstat(file.fileno()).st_size) != size:  # beyond its end, reading would end the process
            raise ValueError(f"data: {path} was changed while it was in use: {found:,} bytes, expected {size:,}")
        address = _LIBC.mmap(None, size, _PROT_READ, _MAP_SHARED, file.fileno(), 0)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    return np.asarray(_Mapping(address, size, like, length))


def _mapped(directory: Path, entries: list[dict], like: list[_Header], index: int) -> Shard:
    """All shards have the first one's headers but for the lengths: np.load takes 10 times as long to read one."""
    return Shard(*map(_mapped_array, _paths(directory, entries[index]["name"]), _lengths(entries[index]), like))


def _missing(directory: Path, entry: dict) -> str | None:
    """Why the shard cannot be used, as far as its files' headers and sizes show, or None. OSError as of `_damage`."""
    for path, length in zip(_paths(directory, entry["name"]), _lengths(entry), strict=True):
        try:
            header, found = _header(path), path.stat().st_size
            entries, expected = header.shape[0], header.size(length)
        except OSError as error:
            return _lost(error, path.name)
        except Exception:  # NumPy reads a header as Python source: a flipped bit is a SyntaxError or a TokenError too
            return f"{path.name}: it is not the array that was written"
        if entries != length or found != expected:
            return f"{path.name}: {entries:,} entries in {found:,} bytes, expected {length:,} in {expected:,}"
    return None


def _damage(directory: Path, name: str, checksum: str) -> str | None:
    """Why the shard cannot be used, or None. OSError for an error of reading that does not say that a file is lost."""
    try:
        found = file_checksum(*_paths(directory, name))
    except OSError as error:
        return _lost(error, "one of its files")
    return None if found == checksum else f"checksum {found[:12]}, expected {checksum[:12]}"


def _lost(error: OSError, what: str) -> str:
    """What `error` says of a file that is gone or unreadable for good; any other error is raised again."""
    if error.errno not in _LOST:
        raise error
    return f"{os.path.basename(error.filename or what)}: {error.strerror}"
