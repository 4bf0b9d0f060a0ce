"""Philox4x32-10 against the known answers published by Random123 (tests/kat_vectors, philox4x32 10)."""

import numpy as np
import numpy_philox
import pytest
import torch

from fastlm import _native, philox

# (counter, key, words)
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
CARRIERS = {
    "python": lambda values: values,
    "numpy": lambda values: [np.array([v, 0], dtype=np.int64) for v in values],
    "torch": lambda values: [torch.tensor([v, 0]) for v in values],
}


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(carrier, counter, key, words):
    out = philox.philox4x32(*CARRIERS[carrier](counter), *key)
    assert tuple(int(w) if carrier == "python" else int(w[0]) for w in out) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers_of_the_tests_own_numpy(counter, key, words):
    assert tuple(int(w) for w in numpy_philox.words(counter, key)) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers_cpp(counter, key, words):
    assert _native.cpu().philox(*counter, *key) == words


@pytest.mark.parametrize("n", [1, 7, 16, 255, 256])
def test_many_counters_cpp(n):
    """The vector code of csrc/cpu/philox_many.cpp gives the words of single calls, the known answers among them."""
    counters = np.random.default_rng(n).integers(0, 2**32, (4, n), dtype=np.uint32)
    for counter, key, words in KNOWN_ANSWERS:
        counters[:, n // 2] = counter
        out = counters.copy()
        _native.cpu().philox_many(out.ctypes.data, n, *key)
        assert tuple(out[:, n // 2]) == words
        for i in range(0, n, 5):
            assert tuple(out[:, i]) == _native.cpu().philox(*counters[:, i].tolist(), *key)


def test_key_and_threshold():
    assert philox.key(0x0123456789ABCDEF, 0x11111111) == (0x89ABCDEF, 0x01234567 ^ 0x11111111)
    assert philox.key(-1, 0) == (0xFFFFFFFF, 0xFFFFFFFF)
    assert [philox.threshold(p) for p in (0.0, 0.5, 1.0, 0.15)] == [0, 2**31, 2**32, 644245094]
