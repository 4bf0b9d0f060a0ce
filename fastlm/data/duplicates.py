"""Exact and near duplicates: the first document by ordinal stays.

Exact: a 128-bit hash of the cleaned text (`exact_digest`).

Near: the Jaccard similarity of two documents' sets of shingles is at least `threshold`. A shingle is five words one
after another; a word is a run of letters and digits in lower case, or one character of a script without spaces. Two
passes:

    pass 1, any number of processes    signature(texts).save(path)         a part of the documents each
    pass 2, once                       near_duplicates(paths)

1. `signature`: 64-bit hashes of the shingles, and 128 minima of them under random permutations (MinHash, Broder 1997;
   by `rensa`). The share of equal minima of two documents is an estimate of their similarity.
2. Index: the minima are cut into 16 bands of 8. Documents with an equal band are candidates. A pair of similarity s is
   one with probability 1 - (1 - s^8)^16: 0.9999 for 0.9, 0.95 for 0.8, 0.06 for 0.5. One band is held in memory at a
   time: 24 bytes a document.
3. Verification: the exact similarity of the candidates' sets of hashes, which stay on disk. In the order of ordinals, a
   document is removed if it is similar to a candidate that was kept, or to the document that a removed candidate is
   similar to. So a removed document is always similar to one that was kept, which the result names.

The settings are those of common practice: 5-word shingles and a threshold of 0.8 as in Lee et al. 2022 (arXiv
2107.06499).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlm.data._extras import require
from fastlm.storage import atomic_file

SHINGLE_WORDS = 5
MINIMA, BANDS = 128, 16
THRESHOLD = 0.8
VERSION = 1  # part of a preparation's identity: raise it when the same text gives another signature

# Scripts that do not put spaces between words: Thai to Myanmar, Khmer, Japanese and Chinese.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_SPACED_WORD = re.compile(r"\w+")  # the same where no such character is
_WITHOUT_SPACES = re.compile(f"[{_UNSPACED}]")
_ASCII_WORDS = str.maketrans({c: " " for c in map(chr, range(128)) if not (c.isalnum() or c == "_")})
_SEED = 0x5EED
_AT_ONCE = 2048  # documents whose minima pass through Python's lists, 5 KB each
_OPEN = 48  # files of signatures that are mapped at a time, 6 MB of prose each
_CACHED = 1 << 20  # words whose hash is kept: about 100 MB


def exact_digest(text: str) -> bytes:
    """A hash of 16 bytes: BLAKE2b, as part of Python. Equal documents have equal hashes, in any process."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def words(text: str) -> list[str]:
    """The words of `text`, in lower case."""
    text = text.lower()
    if text.isascii():
        return text.translate(_ASCII_WORDS).split()
    return (_WORD if _WITHOUT_SPACES.search(text) else _SPACED_WORD).findall(text)


class _Hashes(dict):
    """Word -> its 64-bit xxHash: a word occurs again far more often than not, and a look-up is 4 times as fast."""

    def __init__(self):
        self.hash = require("xxhash").xxh3_64_intdigest

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED:
            self.clear()
        value = self[word] = self.hash(word.encode("utf-8", "surrogatepass"))
        return value


def hash_words(found: Sequence[str], hashes: dict[str, int]) -> np.ndarray:
    """(len(found),) uint64."""
    return np.fromiter(map(hashes.__getitem__, found), np.uint64, len(found))


# Odd constants: the fractional bits of the square roots of the first primes.
_MULTIPLIERS = np.array(
    [0x6A09E667F3BCC909, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1, 0x510E527FADE682D1], np.uint64
)


def _shingles(hashed: np.ndarray) -> np.ndarray:
    """The sorted distinct hashes of runs of SHINGLE_WORDS words; of fewer words the hash of them all."""
    if not len(hashed):
        return hashed
    size = min(SHINGLE_WORDS, len(hashed))
    count = len(hashed) - size + 1
    mixed = np.zeros(count, np.uint64)
    for i in range(size):
        mixed += hashed[i : i + count] * _MULTIPLIERS[i]
        mixed ^= mixed >> np.uint64(29)
    mixed *= _MULTIPLIERS[0]
    mixed ^= mixed >> np.uint64(32)
    mixed.sort()
    return mixed[np.concatenate([[True], mixed[1:] != mixed[:-1]])]  # np.unique takes 4 times as long


@dataclass(frozen=True)
class Signatures:
    """Of n documents with m shingles in all.

    minima    (n, MINIMA) uint32
    offsets   (n + 1,) int64; shingles[offsets[i] : offsets[i + 1]] are those of document i
    shingles  (m,) uint64, sorted and distinct in a document; a document without words has none
    """

    minima: np.ndarray
    offsets: np.ndarray
    shingles: np.ndarray

    def __len__(self) -> int:
        return len(self.minima)

    def save(self, path) -> None:
        """Three .npy arrays one after another in the file `path`, which is whole or absent."""
        with atomic_file(Path(path)) as partial, open(partial, "wb") as file:
            for array in (self.minima, self.offsets, self.shingles):
                np.save(file, array)

    @classmethod
    def open(cls, path) -> Signatures:
        """Memory-mapped, but for the offsets. ValueError for another file."""
        minima, offsets, shingles = _stored(path)
        return cls(minima.mapped(), offsets.read(), shingles.mapped())


class _Stored(NamedTuple):
    """An array in a file."""

    path: Path
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def mapped(self) -> np.ndarray:
        if not self.size:  # nothing to map is an error
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    def read(self) -> np.ndarray:
        return np.fromfile(self.path, self.dtype, self.size, offset=self.offset).reshape(self.shape)


def _stored(path) -> tuple[_Stored, ...]:
    """The minima, offsets and shingles that `Signatures.save` wrote to `path`. ValueError for another file."""
    arrays = []
    with open(path, "rb") as file:
        for dtype in (np.uint32, np.int64, np.uint64):
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
                shape, _, found = read(file)
            except (ValueError, TypeError) as error:
                raise ValueError(f"signatures: expected a file that Signatures.save wrote, got {path}") from error
            if found != dtype:
                raise ValueError(f"signatures: expected an array of {np.dtype(dtype)} in {path}, got {found}")
            arrays.append(_Stored(Path(path), found, file.tell(), shape))
            file.seek(arrays[-1].size * found.itemsize, os.SEEK_CUR)
    return tuple(arrays)


def signature(texts: Iterable[str]) -> Signatures:
    """The signatures of cleaned texts. ValueError without `xxhash` and `rensa` (extra `data`)."""
    rensa, hashes = require("rensa"), _Hashes()
    sets = [_shingles(hash_words(words(text), hashes)) for text in texts]
    offsets = np.zeros(len(sets) + 1, np.int64)
    np.cumsum([len(s) for s in sets], out=offsets[1:])
    flat = np.concatenate([np.empty(0, np.uint64), *sets])
    minima = np.empty((len(sets), MINIMA), np.uint32)
    for first in range(0, len(sets), _AT_ONCE):
        at = offsets[first : first + _AT_ONCE + 1]
        tokens, starts = flat[at[0] : at[-1]], (at - at[0]).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(tokens, starts, MINIMA, _SEED)
        minima[first : first + len(at) - 1] = matrix.to_rows()
    return Signatures(minima, offsets, flat)


@dataclass(frozen=True)
class NearDuplicates:
    """partner (n,) int64: -1 for a document that is kept, else the ordinal of the kept one that it is similar to.

    similarity (n,) float32: to the partner, 0 where there is none. candidates: pairs that were compared.
    """

    partner: np.ndarray
    similarity: np.ndarray
    candidates: int

    @property
    def kept(self) -> np.ndarray:
        """(n,) bool."""
        return self.partner < 0


class _Parts:
    """Signatures in memory, or in files of which few are open at a time, one after another.

    offsets   `Signatures.offsets` of each. starts: (parts + 1,) int64, the ordinal of each part's first document
    """

    def __init__(self, parts: Sequence[Signatures | Path]):
        self._parts = parts
        self._stored = [None if isinstance(part, Signatures) else _stored(part) for part in parts]
        self._mapped = lru_cache(_OPEN)(lambda part: self._stored[part][2].mapped())
        self.offsets = [
            part.offsets if stored is None else stored[1].read() for part, stored in zip(parts, self._stored)
        ]
        self.starts = np.cumsum([0, *(len(offsets) - 1 for offsets in self.offsets)])

    def minima(self) -> Iterator[np.ndarray]:
        """Those of each part, read: the pages of mapped files would stay in memory."""
        for part, stored in zip(self._parts, self._stored):
            yield part.minima if stored is None else stored[0].read()

    def shingles(self, ordinal: int) -> np.ndarray:
        part = int(np.searchsorted(self.starts, ordinal, "right")) - 1
        low, high = self.offsets[part][ordinal - self.starts[part] :][:2]
        found = self._parts[part].shingles if self._stored[part] is None else self._mapped(part)
        return found[low:high]


def near_duplicates(parts: Sequence[Signatures | Path] | Signatures, *, threshold: float = THRESHOLD) -> NearDuplicates:
    """Which documents are near duplicates of an earlier one; ordinals go through the parts in their order.

    parts: what `signature` gave, or the paths of files that `Signatures.save` wrote
    """
    if not 0.5 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a similarity from 0.5 to 1, got {threshold!r}")
    opened = _Parts([parts] if isinstance(parts, Signatures) else list(parts))
    return _verify(_pairs(opened), int(opened.starts[-1]), opened.shingles, threshold)


def _pairs(parts: _Parts) -> np.ndarray:
    """(k, 2) int64 distinct candidates, the earlier document second, sorted: each with the first document that has an
    equal band, and with the last one before it. All pairs would be quadratic in a crowd of equal pages."""
    width = MINIMA // BANDS
    found = [np.empty((0, 2), np.int64)]
    filled = np.concatenate([np.empty(0, bool), *(np.diff(offsets) > 0 for offsets in parts.offsets)])
    ordinals = np.flatnonzero(filled)
    for band in range(BANDS):
        columns = slice(band * width, (band + 1) * width)
        mixed = (_mix(minima[:, columns]) for minima in parts.minima())
        keys = np.concatenate([np.empty(0, np.uint64), *mixed])[ordinals]
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        if not same.any():
            continue
        place = np.arange(1, len(order))
        first = np.maximum.accumulate(np.where(np.concatenate([[False], same]), 0, np.arange(len(order))))[1:]
        later = ordinals[order[place[same]]]
        for earlier in (order[first[same]], order[place[same] - 1]):
            found.append(np.stack([later, ordinals[earlier]], 1))
        found = [np.unique(np.concatenate(found), axis=0)]
    return found[0]


def _mix(columns: np.ndarray) -> np.ndarray:
    """(n,) uint64 of (n, w) uint32; equal rows have equal values, others hardly ever."""
    key = np.zeros(len(columns), np.uint64)
    for column in np.ascontiguousarray(columns.T):
        key = (key ^ column) * _MULTIPLIERS[1]
        key ^= key >> np.uint64(31)
    return key


def _verify(pairs: np.ndarray, total: int, shingles: Callable[[int], np.ndarray], threshold: float) -> NearDuplicates:
    partner, similarity = np.full(total, -1, np.int64), np.zeros(total, np.float32)
    later, starts = np.unique(pairs[:, 0], return_index=True)
    compared = 0
    for ordinal, start, stop in zip(later.tolist(), starts.tolist(), [*starts[1:].tolist(), len(pairs)]):
        candidates = pairs[start:stop, 1]
        roots = np.unique(np.where(partner[candidates] < 0, candidates, partner[candidates]))
        ours = shingles(ordinal)
        for root in roots.tolist():
            compared += 1
            value = jaccard(ours, shingles(root))
            if value >= threshold:
                partner[ordinal], similarity[ordinal] = root, value
                break
    return NearDuplicates(partner, similarity, compared)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a and b| / |a or b| of sorted distinct hashes; 0 for two empty sets."""
    if not len(a) or not len(b):
        return 0.0
    at = np.searchsorted(a, b)
    common = int((a[np.minimum(at, len(a) - 1)] == b).sum())
    return common / (len(a) + len(b) - common)
