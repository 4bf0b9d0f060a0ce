"""Philox4x32-10, the one source of randomness in fastlm.

It is a counter-based generator: four 32-bit words are a pure function of a 128-bit counter and a 64-bit key.
A mask or a permutation depends only on these, not on the process, the thread or the order of the draws.

    for ten rounds:   (h0, l0) = 0xD2511F53 * c0;   (h1, l1) = 0xCD9E8D57 * c2
                      c = (h1 ^ c1 ^ k0,  l1,  h0 ^ c3 ^ k1,  l0);   k += (0x9E3779B9, 0xBB67AE85)

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
The C++ and CUDA form is `csrc/common/philox.h`.

Words are stored as int64. NumPy and torch both wrap modulo 2^64, so the same code works for both.
"""

from __future__ import annotations

MASK_DOMAIN = 0x4B53414D
DROPOUT_DOMAIN = 0x504F5244
ORDER_DOMAIN = 0x5244524F
SPAN_DOMAIN = 0x4E415053
TEXT_DOMAIN = 0x54584554

_LOW32 = 0xFFFFFFFF


def key(seed: int, domain: int) -> tuple[int, int]:
    """The Philox key of a 64-bit `seed` in one of the domains above: (low 32 bits, high 32 bits XOR domain)."""
    return seed & _LOW32, ((seed >> 32) & _LOW32) ^ domain


def threshold(p: float) -> int:
    """floor(p·2^32): a word r is below it with probability p. 2^32 for p = 1, so it needs 33 bits."""
    return int(p * 4294967296.0)


def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32.

    Every argument is an int64 array (NumPy or torch) of values in [0, 2^32), or a Python int; they broadcast.
    At least one of c0 and c2 should be an array (Python's integers do not wrap, but are masked all the same).
    Returns the four output words, int64 in [0, 2^32).
    """
    for _ in range(10):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        # A product overflows int64 and wraps; its 64 bits still equal those of the unsigned product.
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW32) ^ c1 ^ k0,
            p1 & _LOW32,
            ((p0 >> 32) & _LOW32) ^ c3 ^ k1,
            p0 & _LOW32,
        )
        k0 = (k0 + 0x9E3779B9) & _LOW32
        k1 = (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3
