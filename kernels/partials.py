"""Adds the partial sums that a kernel's programs leave, in order: the same bits in every run, without atomics."""

import triton
import triton.language as tl


@triton.jit
def _sum_one(partial_ptr, out_ptr, count, cols, col, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, count, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        mask = (part < count)[:, None] & (col < cols)[None, :]
        total += tl.load(partial_ptr + part[:, None] * cols + col[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=col < cols)


@triton.jit
def _sum_partials(
    partial_ptr, first_ptr, second_ptr, third_ptr, count, cols, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    partial_ptr += which * count * cols
    if which == 0:
        _sum_one(partial_ptr, first_ptr, count, cols, col, BLOCK_P, BLOCK_N)
    elif which == 1:
        if second_ptr is not None:
            _sum_one(partial_ptr, second_ptr, count, cols, col, BLOCK_P, BLOCK_N)
    else:
        if third_ptr is not None:
            _sum_one(partial_ptr, third_ptr, count, cols, col, BLOCK_P, BLOCK_N)


def sum_partials(partial, first, second=None, third=None):
    """first (cols,) = Σ partial[0] over the middle of partial (1 to 3, count, cols), and so on."""
    outs, count, cols = partial.shape
    # Few columns a program: each is a chain of loads, so many programs must run at once.
    _sum_partials[(triton.cdiv(cols, 32), outs)](
        partial, first, second, third, count, cols, BLOCK_P=64, BLOCK_N=32, num_warps=4
    )
