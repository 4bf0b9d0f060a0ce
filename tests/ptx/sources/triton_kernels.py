"""Small known kernels in Triton, for the tests of the interpreter."""

import triton
import triton.language as tl


@triton.jit
def softmax(x_ptr, y_ptr, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * cols + offsets, mask=offsets < cols, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * cols + offsets, e / tl.sum(e, axis=0), mask=offsets < cols)


@triton.jit
def layer_norm(x_ptr, w_ptr, b_ptr, y_ptr, cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < cols
    x = tl.load(x_ptr + row * cols + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / cols
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / cols + eps)
    w = tl.load(w_ptr + offsets, mask=mask)  # no `other`: what is masked stays undefined, and must not matter
    b = tl.load(b_ptr + offsets, mask=mask)
    tl.store(y_ptr + row * cols + offsets, centred * rstd * w + b, mask=mask)


@triton.jit
def matmul(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_am,
    stride_bk,
    stride_cm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * stride_am + depth[None, :]
    b_ptrs = b_ptr + depth[:, None] * stride_bk + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=(rows[:, None] < M) & (k + depth[None, :] < K), other=0.0)
        b = tl.load(b_ptrs, mask=(k + depth[:, None] < K) & (cols[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(c_ptr + rows[:, None] * stride_cm + cols[None, :], acc, mask=mask)


@triton.jit
def row_sums(x_ptr, out_ptr, rows, cols, BLOCK: tl.constexpr):
    """Every block adds its part of a row to the row's sum."""
    row = tl.program_id(1)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * cols + offsets, mask=offsets < cols, other=0)
    tl.atomic_add(out_ptr + row, tl.sum(x, axis=0))


@triton.jit
def philox(out_ptr, seed, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counter = offsets.to(tl.uint32)
    zero = counter * 0
    r0, r1, r2, r3 = tl.philox(seed, counter, zero, zero, zero)
    mask = offsets < n
    tl.store(out_ptr + offsets * 4, r0, mask=mask)
    tl.store(out_ptr + offsets * 4 + 1, r1, mask=mask)
    tl.store(out_ptr + offsets * 4 + 2, r2, mask=mask)
    tl.store(out_ptr + offsets * 4 + 3, r3, mask=mask)


@triton.jit
def scan(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.cumsum(tl.load(x_ptr + offsets), axis=0))


@triton.jit
def sort(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.sort(tl.load(x_ptr + offsets)))


@triton.jit
def attention(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stride_t,
    stride_h,
    tokens,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Flash attention over (tokens, heads, D)."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D)
    base = head * stride_h
    q = tl.load(q_ptr + base + rows[:, None] * stride_t + dims[None, :], mask=rows[:, None] < tokens, other=0.0)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, tokens) if CAUSAL else tokens
    for start in range(0, end, BLOCK_N):
        keys = start + columns
        k = tl.load(k_ptr + base + keys[None, :] * stride_t + dims[:, None], mask=keys[None, :] < tokens, other=0.0)
        s = tl.dot(q, k) * (scale * 1.4426950408889634)
        keep = keys[None, :] < tokens
        if CAUSAL:
            keep = keep & (keys[None, :] <= rows[:, None])
        s = tl.where(keep, s, float("-inf"))
        new = tl.maximum(highest, tl.max(s, axis=1))
        p = tl.exp2(s - new[:, None])
        alpha = tl.exp2(highest - new)
        total = total * alpha + tl.sum(p, axis=1)
        v = tl.load(v_ptr + base + keys[:, None] * stride_t + dims[None, :], mask=keys[:, None] < tokens, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        highest = new
    out = out_ptr + base + rows[:, None] * stride_t + dims[None, :]
    tl.store(out, acc / total[:, None], mask=rows[:, None] < tokens)
