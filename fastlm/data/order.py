"""The order of the rows: a pure function of (seed, epoch), with no state and no memory.

A permutation of n rows is a twelve-round Feistel network over b bits, restricted to [0, n) by cycle walking:

    b = max(2, bits(n - 1)) rounded up to even,   h = b / 2,   i = L·2^h + R
    for r = 0..11:   (L, R) <- (R,  L XOR (r0 AND (2^h - 1))),   r0 the first word of
                     Philox4x32-10(counter = (R, r, epoch, source), key(seed, order))
    repeat while i >= n

Each round is invertible whatever the round function, so the network permutes [0, 2^b); walking a cycle until it comes
back below n permutes [0, n). 2^b is at most 4n, so a walk is short.
Sources: Luby and Rackoff, 1988 (the network); Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.

Row g of the endless stream is row perm(g mod n) of epoch g div n: a batch may cross epochs, a resume is a seek.
`source` is 0 but for the later ones of several (`fastlm.data.mixture`).
"""

from __future__ import annotations

import numpy as np

from fastlm.data._checks import integer
from fastlm.philox import ORDER_DOMAIN, key, philox4x32

ROUNDS = 12
MAX_ROWS = 2**62  # i must fit an int64, and a half of it a Philox word


def perm(i, n: int, epoch, seed: int, source: int = 0) -> np.ndarray:
    """Where the order of `epoch` puts place `i` of `n`: int64, of the shape that `i` and `epoch` broadcast to.

    i       integer or integer array in [0, n)
    epoch   integer or integer array in [0, 2^32)
    source  each has orders of its own
    """
    n = integer("n", n, 1, MAX_ROWS)
    i, epoch = np.broadcast_arrays(np.asarray(i, dtype=np.int64), np.asarray(epoch, dtype=np.int64))
    shape = i.shape
    i, epoch = i.ravel().copy(), epoch.ravel()
    if i.size and (i.min() < 0 or i.max() >= n):
        raise ValueError(f"i: expected places in [0, {n}), got {i.min()} to {i.max()}")
    if i.size and (epoch.min() < 0 or epoch.max() >= 2**32):
        raise ValueError(f"epoch: expected epochs in [0, 2^32), got {epoch.min()} to {epoch.max()}")
    bits = max(2, (n - 1).bit_length())
    half = (bits + 1) // 2
    walking = np.arange(i.size)
    while walking.size:
        i[walking] = _network(i[walking], half, epoch[walking], seed, source)
        walking = walking[i[walking] >= n]
    return i.reshape(shape)


def _network(i: np.ndarray, half: int, epoch: np.ndarray, seed: int, source: int) -> np.ndarray:
    """One pass of the network over [0, 2^(2·half)); i, epoch and the result (m,) int64."""
    k0, k1 = key(seed, ORDER_DOMAIN)
    low = (1 << half) - 1
    left, right = i >> half, i & low
    for r in range(ROUNDS):
        word = philox4x32(right, r, epoch, source, k0, k1)[0]
        left, right = right, left ^ (word & low)
    return (left << half) | right


def rows_at(g, n: int, seed: int, source: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, row), both int64 of g's shape, of the global row numbers `g`, integers of at least 0."""
    g = np.asarray(g, dtype=np.int64)
    epoch, place = g // n, g % n
    return epoch, perm(place, n, epoch, seed, source)


class Endless:
    """What `Batches` asks of data with `rows` rows: their order, epoch after epoch."""

    rows: int

    @property
    def endless_rows(self) -> int:
        """Global rows that the order has: epochs stay below 2^32 and global row numbers below 2^63."""
        return min(self.rows << 32, 2**63)

    def order(self, g, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row), both int64 of g's shape, of the global row numbers `g`; see `rows_at`."""
        return rows_at(g, self.rows, seed)
