"""Philox4x32-10 in NumPy, for tests: written from the definition, independent of fastlm/philox.py."""

import numpy as np

_LOW32 = np.uint64(0xFFFFFFFF)


def words(counter, key):
    """r0..r3, uint64 arrays, of four counter words (arrays or integers; their low 32 bits) and two integers as key."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c).astype(np.uint64) & _LOW32 for c in counter))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW32, p0 & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def domain_key(seed, domain):
    """key(seed, domain): the low half of the 64-bit seed, and its high half XOR the domain."""
    seed %= 2**64
    return seed % 2**32, (seed >> 32) ^ domain
