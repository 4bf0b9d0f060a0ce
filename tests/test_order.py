"""The order of rows against a second implementation of its definition, in plain Python integers."""

import numpy as np
import pytest

from fastlm.data.order import perm, rows_at

MASK32 = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK32, (a >> 32) ^ c[3] ^ k[1], a & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


def expected(i, n, epoch, seed):
    b = max(2, (n - 1).bit_length())
    h = (b + b % 2) // 2
    key = (seed & MASK32, (seed >> 32 & MASK32) ^ 0x5244524F)
    while True:
        left, right = divmod(i, 2**h)
        for r in range(12):
            left, right = right, left ^ (philox((right, r, epoch, 0), key)[0] % 2**h)
        i = left * 2**h + right
        if i < n:
            return i


def test_second_implementation_gives_the_known_answers():
    # Random123's kat_vectors: philox4x32 10
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((MASK32,) * 4, (MASK32,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


# 1 to 3: smaller than the smallest network. 4, 16, 64, 256: whole networks, no walk. 5, 17, 65, 257: the longest walks,
# one past an even power of two. 10^12: no memory. 2^62: the largest.
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 64, 65, 256, 257, 1000, 10**12, 2**62])
@pytest.mark.parametrize(("epoch", "seed"), [(0, 0), (1, 2**64 - 1), (2**32 - 1, 0x0123456789ABCDEF)])
def test_equals_the_definition(n, epoch, seed):
    i = sorted({*range(min(n, 20)), n // 3, n // 2, n - 1})
    assert perm(np.array(i), n, epoch, seed).tolist() == [expected(x, n, epoch, seed) for x in i]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 1000, 4097])
def test_is_a_bijection(n):
    orders = [perm(np.arange(n), n, epoch, seed) for epoch, seed in ((0, 0), (1, 0), (0, 1), (0, 1 << 40))]
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
    if n >= 17:
        assert len({order.tobytes() for order in orders}) == len(orders), "epoch and all 64 bits of the seed matter"


def test_no_place_depends_on_its_neighbours():
    n, rng = 10**12, np.random.default_rng(0)
    i, epoch = rng.integers(0, n, 200), rng.integers(0, 100, 200)
    together = perm(i.reshape(4, 50), n, epoch.reshape(4, 50), 7)
    assert together.shape == (4, 50)
    assert together.dtype == np.int64
    assert together.ravel().tolist() == [int(perm(int(a), n, int(e), 7)) for a, e in zip(i, epoch)]


def test_rows_cross_epochs():
    epoch, row = rows_at(np.arange(35), 10, 3)
    assert epoch.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 5
    for e in range(3):
        assert row[10 * e : 10 * e + 10].tolist() == [expected(i, 10, e, 3) for i in range(10)]
    epoch, row = rows_at(3 * 10**12 + 5, 10**12, 3)
    assert (int(epoch), int(row)) == (3, expected(5, 10**12, 3, 3))


def test_spreads_neighbours():
    """The first tenth of an epoch samples all of it: a weak network would leave structure."""
    n = 100_000
    head = perm(np.arange(n // 10), n, 0, 0)
    share = np.bincount(head // (n // 20), minlength=20) / (n // 10)
    # a fair draw without replacement has a deviation of 0.0021 here: six of them
    assert np.abs(share - 0.05).max() < 0.0126
    assert abs(np.corrcoef(head[:-1], head[1:])[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("i", "n", "epoch", "name"),
    [(0, 0, 0, "n"), (0, 2**62 + 1, 0, "n"), (5, 5, 0, "i"), (-1, 5, 0, "i"), (0, 5, 2**32, "epoch")],
)
def test_bad_arguments(i, n, epoch, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        perm(i, n, epoch, 0)
