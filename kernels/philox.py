"""Philox4x32-10 as Triton device functions: the bits of fastlm's dropout and masking on a GPU.

Every word is cast to uint32 here: with int64 counters `tl.philox` silently becomes Philox4x64, which gives other bits.
The definition and its source: fastlm/philox.py; the C++ and CUDA form: csrc/common/philox.h.
"""

import triton
import triton.language as tl

MASK_DOMAIN = tl.constexpr(0x4B53414D)
DROPOUT_DOMAIN = tl.constexpr(0x504F5244)

# Ten rounds in PTX leave a hundred operations fewer to compile at each call; Triton's coalescing pass takes time with
# the square of their number. Triton's interpreter has no PTX and computes the rounds one by one.
_ROUND = """
mul.wide.u32 p, c0, 0xD2511F53; mul.wide.u32 q, c2, 0xCD9E8D57;
xor.b32 c0, c1, k0; xor.b32 c2, c3, k1;
mov.b64 {c3, h0}, p; mov.b64 {c1, h1}, q;
xor.b32 c0, c0, h1; xor.b32 c2, c2, h0;
"""
_NEXT_KEY = "add.u32 k0, k0, 0x9E3779B9; add.u32 k1, k1, 0xBB67AE85;"
_ROUNDS = tl.constexpr(f"""{{
.reg .b32 c0, c1, c2, c3, k0, k1, h0, h1; .reg .b64 p, q;
mov.b32 c0, $4; mov.b32 c1, $5; mov.b32 c2, $6; mov.b32 c3, $7; mov.b32 k0, $8; mov.b32 k1, $9;
{_NEXT_KEY.join([_ROUND] * 10)}
mov.b32 $0, c0; mov.b32 $1, c1; mov.b32 $2, c2; mov.b32 $3, c3;
}}""")
_REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r")
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on a counter (c0..c3) and a key (k0, k1): integers of any type, taken modulo 2^32; they broadcast.

    Returns four uint32 words of the broadcast shape.
    """
    c0, c1, c2, c3 = tl.cast(c0, tl.uint32), tl.cast(c1, tl.uint32), tl.cast(c2, tl.uint32), tl.cast(c3, tl.uint32)
    k0, k1 = tl.cast(k0, tl.uint32), tl.cast(k1, tl.uint32)
    if INTERPRETED:
        m0 = tl.full((), 0xD2511F53, tl.uint32)
        m1 = tl.full((), 0xCD9E8D57, tl.uint32)
        for _ in tl.static_range(10):
            h0, l0 = tl.umulhi(c0, m0), c0 * m0
            h1, l1 = tl.umulhi(c2, m1), c2 * m1
            c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
            k0 += 0x9E3779B9
            k1 += 0xBB67AE85
        return c0, c1, c2, c3
    else:
        words = (c0, c1, c2, c3, k0, k1)
        return tl.inline_asm_elementwise(
            _ROUNDS, _REGISTERS, words, dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1
        )


@triton.jit
def make_key(seed, domain: tl.constexpr):
    """The key of a 64-bit `seed` in one of the domains above: (low 32 bits, high 32 bits XOR domain)."""
    seed = tl.cast(seed, tl.uint64)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32) ^ domain


@triton.jit
def dropout_key(rng_ptr, site):
    """The key of one dropout call: rng_ptr (2,) int64 is (seed, step), `site` the number of the call site."""
    seed = tl.load(rng_ptr)
    step = tl.load(rng_ptr + 1).to(tl.uint64)
    k0, k1 = make_key(seed, DROPOUT_DOMAIN)
    r0, r1, _, _ = philox4x32(step, step >> 32, site, 0, k0, k1)
    return r0, r1


@triton.jit
def keep_rows(row, quad, k0, k1, threshold):
    """Which elements of rows stay: bool (M, 4Q) for row (M,), any integer, and quad = column div 4 (Q,).

    threshold: floor(p·2^32), 1 to 2^32. The comparison is with threshold - 1, which fits into 32 bits.
    """
    row = row.to(tl.int64)[:, None]
    r0, r1, r2, r3 = philox4x32(quad[None, :], row, row >> 32, 0, k0, k1)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # (M, Q, 2, 2), flattened r0 r1 r2 r3
    return tl.reshape(words, (row.shape[0], 4 * quad.shape[0])) > tl.cast(threshold - 1, tl.uint32)
