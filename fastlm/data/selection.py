"""Which of the cleaned documents stay: neither duplicates of earlier ones nor of the validation text.

The decision needs the documents' hashes and signatures, not their text. Measured: 24 bytes a document, and 58
more while the hashes are sorted, 94 while near duplicates are looked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastlm.data.duplicates import exact_digest, near_duplicates

# What becomes of a document, and the reason in the report where it is dropped.
TRAINED, HELD_OUT = 0, 1
REASONS = {2: "duplicate", 3: "near duplicate", 4: "in the validation text", 5: "near duplicate of the validation text"}
DUPLICATE, NEAR_DUPLICATE, VALIDATION, NEAR_VALIDATION = REASONS
VERSION = 1  # part of a preparation's identity where there is validation text


def fingerprint(text: str) -> bytes:
    """24 bytes of a document, cleaned: its hash for duplicates, and that by which it may be held out."""
    return exact_digest(text) + _held_out_hash(text)


def _held_out_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()


def is_held_out(text: str, share: float) -> bool:
    """Whether a document, cleaned, is among the `share` that is held out: a function of its text."""
    return bool(share) and int.from_bytes(_held_out_hash(text), "little") < share * 2**64


def choose(
    prints: np.ndarray,
    validation: np.ndarray,
    *,
    share: float = 0.0,
    threshold: float = 0.0,
    signatures: Sequence[Path] = (),
    validation_signatures: Sequence[Path] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of each document: (n,) uint8, and (v,) of the validation text.

    prints, validation   (n, 3), (v, 3) uint64: their `fingerprint`s
    share                of the documents to hold out
    threshold            similarity of near duplicates, whose `signatures` are in these files; 0: all of these stay
    """
    count = len(validation)
    codes = np.zeros(count + len(prints), np.uint8)
    if share:
        codes[count:][prints[:, 2] < np.uint64(math.ceil(share * 2**64))] = HELD_OUT
    if threshold:
        # The validation text comes first, so that a document that is similar to it names it.
        partner = near_duplicates([*validation_signatures, *signatures], threshold=threshold).partner
        codes[partner >= 0] = NEAR_DUPLICATE
        codes[count:][(partner[count:] >= 0) & (partner[count:] < count)] = NEAR_VALIDATION
        del partner
    first = first_equal(np.concatenate([validation[:, :2], prints[:, :2]]))
    codes[first < np.arange(len(first))] = DUPLICATE
    codes[count:][first[count:] < count] = VALIDATION
    return codes[count:], codes[:count]


def first_equal(digests: np.ndarray) -> np.ndarray:
    """(n,) int64: for each of the digests (n, 2) the place of the first that is equal to it."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones keep their order
    new = np.zeros(len(order), bool)
    for column in digests.T:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    place = np.arange(len(order))
    place[~new] = 0
    first = np.empty(len(order), np.int64)
    first[order] = order[np.maximum.accumulate(place, out=place)]
    return first
