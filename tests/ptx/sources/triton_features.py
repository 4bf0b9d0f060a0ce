"""Triton kernels that each use some features of the language, for the tests of the interpreter."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# ---- along an axis -------------------------------------------------------------------------------------------------


@triton.jit
def merge_moments(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    """The same bits for (a, b) and (b, a), as long as no product is fused with a sum."""
    n = n_a + n_b
    scale = tl.where(n > 0, 1.0 / n, 0.0)
    delta = mean_b - mean_a
    return (mean_a * n_a + mean_b * n_b) * scale, (m2_a + m2_b) + delta * delta * (n_a * n_b * scale), n


@triton.jit
def reduce_with(x_ptr, mean_ptr, var_ptr, arg_ptr, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mean and variance by a combine function of three tensors, and the place of the maximum."""
    rows, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask = (col < cols)[None, :]
    x = tl.load(x_ptr + rows[:, None] * cols + col[None, :], mask=mask, other=0.0)
    count = tl.where(mask, 1.0, 0.0) + tl.zeros_like(x)
    mean, m2, n = tl.reduce((x, tl.zeros_like(x), count), 1, merge_moments)
    tl.store(mean_ptr + rows, mean)
    tl.store(var_ptr + rows, m2 / n)
    tl.store(arg_ptr + rows, tl.argmax(tl.where(mask, x, float("-inf")), axis=1))


@triton.jit
def affine(a, b, c, d):
    """(c, d) after (a, b), of maps x -> a x + b."""
    return a * c, b * c + d


@triton.jit
def scans(a_ptr, b_ptr, y_ptr, sum_ptr, prod_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y[t] = a[t] y[t-1] + b[t] along rows; a running sum from the end; a running product down the columns."""
    offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    _, y = tl.associative_scan((a, b), 1, affine)
    tl.store(y_ptr + offsets, y)
    tl.store(sum_ptr + offsets, tl.cumsum(b, axis=1, reverse=True))
    tl.store(prod_ptr + offsets, tl.cumprod(a, axis=0))


@triton.jit
def sort_rows(x_ptr, y_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCENDING: tl.constexpr):
    offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(y_ptr + offsets, tl.sort(tl.load(x_ptr + offsets), descending=DESCENDING))


@triton.jit
def histogram(x_ptr, out_ptr, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.store(out_ptr + tl.arange(0, BINS), tl.histogram(x, BINS, mask=i < n))


@triton.jit
def gather(x_ptr, index_ptr, y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """y[i, j] = x[index[i, j], j]"""
    offsets = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(y_ptr + offsets, tl.gather(tl.load(x_ptr + offsets), tl.load(index_ptr + offsets), 0))


@triton.jit
def rearrange(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Pairs swapped by split and join, the whole transposed as (4, BLOCK / 4) and reversed."""
    i = tl.arange(0, BLOCK)
    even, odd = tl.split(tl.reshape(tl.load(x_ptr + i), (BLOCK // 2, 2)))
    swapped = tl.reshape(tl.join(odd, even), (4, BLOCK // 4))
    tl.store(y_ptr + i, tl.flip(tl.reshape(tl.trans(swapped), (BLOCK,)), 0))


# ---- atomics -------------------------------------------------------------------------------------------------------


@triton.jit
def atomics(x_ptr, sum_ptr, max_ptr, or_ptr, last_ptr, n, BLOCK: tl.constexpr):
    """From every block: a sum and a maximum in x's type, bits, and how many blocks came before."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.atomic_add(sum_ptr + i % 4, x, mask=i < n)
    tl.atomic_max(max_ptr, tl.max(x.to(tl.float32), axis=0))
    tl.atomic_or(or_ptr, 1 << tl.program_id(0), sem="relaxed")
    tl.atomic_max(last_ptr, tl.atomic_add(last_ptr + 1, 1, sem="acq_rel"))


@triton.jit
def locked_sum(x_ptr, lock_ptr, sum_ptr, BLOCK: tl.constexpr):
    """Blocks add to one vector in turn, behind a lock of compare-and-swap."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + i)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(sum_ptr + i, tl.load(sum_ptr + i) + x)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


@triton.jit
def functions(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y (13, n): one function a row; x is positive."""
    i = tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask, other=1.0)
    tl.store(y_ptr + i, tl.erf(x), mask=mask)
    tl.store(y_ptr + n + i, tl.exp(-x), mask=mask)
    tl.store(y_ptr + 2 * n + i, tl.exp2(x), mask=mask)
    tl.store(y_ptr + 3 * n + i, tl.math.rsqrt(x), mask=mask)
    tl.store(y_ptr + 4 * n + i, libdevice.tanh(x), mask=mask)
    tl.store(y_ptr + 5 * n + i, tl.log(x), mask=mask)
    tl.store(y_ptr + 6 * n + i, libdevice.log1p(x), mask=mask)
    tl.store(y_ptr + 7 * n + i, tl.sin(x), mask=mask)
    tl.store(y_ptr + 8 * n + i, tl.sigmoid(x), mask=mask)
    tl.store(y_ptr + 9 * n + i, libdevice.pow(x, 1.5), mask=mask)
    tl.store(y_ptr + 10 * n + i, tl.math.div_rn(1.0, x), mask=mask)
    tl.store(y_ptr + 11 * n + i, tl.sqrt_rn(x), mask=mask)
    tl.store(y_ptr + 12 * n + i, libdevice.erfinv(x / 8), mask=mask)


@triton.jit
def integers(x_ptr, y_ptr, hi_ptr, hi64_ptr, n, d, BLOCK: tl.constexpr):
    """Quotient and remainder by d, as C has them, and the high words of products."""
    i = tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask, other=0)
    tl.store(y_ptr + i, x // d, mask=mask)
    tl.store(y_ptr + n + i, x % d, mask=mask)
    tl.store(y_ptr + 2 * n + i, tl.abs(x) >> 3, mask=mask)
    tl.store(hi_ptr + i, tl.umulhi(x.to(tl.uint32, bitcast=True), 0xD2511F53), mask=mask)
    wide = x.to(tl.int64).to(tl.uint64, bitcast=True)
    tl.store(hi64_ptr + i, tl.umulhi(wide, wide), mask=mask)


@triton.jit
def casts(x_ptr, half_ptr, bf16_ptr, f64_ptr, i8_ptr, e5m2_ptr, bits_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(half_ptr + i, x.to(tl.float16))
    tl.store(bf16_ptr + i, x.to(tl.bfloat16))
    tl.store(f64_ptr + i, x.to(tl.float64) / 3)
    tl.store(i8_ptr + i, x.to(tl.int8))
    tl.store(e5m2_ptr + i, x.to(tl.float8e5).to(tl.float32))
    tl.store(bits_ptr + i, x.to(tl.int32, bitcast=True))


@triton.jit
def dot_int8(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(a_ptr + m[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


# ---- addresses, loops and launches ---------------------------------------------------------------------------------


@triton.jit
def pipelined_sum(x_ptr, y_ptr, rows, stride: tl.int64, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Sums over rows in a loop whose loads run ahead; `stride` counts in 64 bits."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(0, rows, num_stages=STAGES):
        acc += tl.load(x_ptr + tl.cast(row, tl.int64) * stride + col)
    tl.store(y_ptr + col, acc)


@triton.jit
def pipelined_matmul(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """c = a b through block pointers, in a loop of STAGES stages."""
    a_tile = tl.make_block_ptr(a_ptr, (M, K), (K, 1), (tl.program_id(0) * BLOCK_M, 0), (BLOCK_M, BLOCK_K), (1, 0))
    b_tile = tl.make_block_ptr(b_ptr, (K, N), (N, 1), (0, tl.program_id(1) * BLOCK_N), (BLOCK_K, BLOCK_N), (1, 0))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        a = tl.load(a_tile, boundary_check=(0, 1), padding_option="zero")
        b = tl.load(b_tile, boundary_check=(0, 1), padding_option="zero")
        acc = tl.dot(a, b, acc)
        a_tile = tl.advance(a_tile, (0, BLOCK_K))
        b_tile = tl.advance(b_tile, (BLOCK_K, 0))
    out = (tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N)
    c_tile = tl.make_block_ptr(c_ptr, (M, N), (N, 1), out, (BLOCK_M, BLOCK_N), (1, 0))
    tl.store(c_tile, acc.to(c_ptr.dtype.element_ty), boundary_check=(0, 1))


@triton.jit
def grid_of_three(y_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(y_ptr + (z * tl.num_programs(1) + y) * tl.num_programs(0) + x, x + 10 * y + 100 * z)


@triton.jit
def far_offsets(x_ptr, y_ptr, far, back, BLOCK: tl.constexpr):
    """Offsets past 32 bits on the way."""
    i = tl.arange(0, BLOCK) + far
    tl.store(y_ptr + (i - back), tl.load(x_ptr + i - back) + 1)


@triton.jit(do_not_specialize=["start"])
def arguments(
    y_ptr,
    keep_ptr,
    bias_ptr,
    n,
    start,
    big,
    unsigned,
    flag,
    scale,
    eps,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every kind of argument that a launcher passes; `bias_ptr` may be None, `keep_ptr` is bool."""
    i = tl.arange(0, BLOCK)
    mask = i < n
    value = i.to(tl.float32) * scale + eps + start
    if bias_ptr is not None:
        value += tl.load(bias_ptr + i, mask=mask, other=0.0)
    if KIND == "wide":
        value += (big >> 40).to(tl.float32) + (unsigned >> 60).to(tl.float32)
    if flag:
        value = -value
    keep = tl.load(keep_ptr + i, mask=mask, other=False)
    tl.store(y_ptr + i, tl.where(keep, value, 0.0), mask=mask)
    tl.store(keep_ptr + i, i % 2 == 0, mask=mask)


@triton.jit
def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride, mask=i < n), mask=i < n)


@triton.jit
def prints(x_ptr, BLOCK: tl.constexpr):
    tl.device_print("x is", tl.load(x_ptr + tl.arange(0, BLOCK)))


@triton.jit
def batched_dot(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr, OUT: tl.constexpr):
    """Two products of 16x16 matrices."""
    rows, cols = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    i = tl.arange(0, 2)[:, None, None] * 256 + rows * 16 + cols
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(c_ptr + i, tl.dot(a, b, input_precision=PRECISION, out_dtype=OUT))


@triton.jit
def descriptors(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y = 2 x through tensor descriptors, which are plain addresses before sm_90."""
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    at = [tl.program_id(0) * BLOCK_M, 0]
    y.store(at, x.load(at) * 2)


@triton.jit
def selection(x_ptr, top_ptr, place_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """The four largest, the place of the largest; y doubles until it reaches 1, in a while loop."""
    i = tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask, other=float("-inf"), cache_modifier=".cg", eviction_policy="evict_first")
    tl.store(top_ptr + tl.arange(0, 4), tl.topk(x, 4))
    largest, place = tl.max(x, axis=0, return_indices=True)
    tl.store(place_ptr, place)
    while largest < 1.0:
        largest *= 2
    tl.device_assert(largest >= 1.0, "too small")
    tl.store(y_ptr + i, tl.clamp(x, -largest, largest), mask=mask, cache_modifier=".wt")
