"""Adds the partial sums that a kernel's programs leave, in order: the same bits in every run, without atomics."""

import triton
import triton.language as tl


@triton.jit
def _sum_partials(partial_ptr, first_ptr, second_ptr, count, cols, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, count, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        mask = (part < count)[:, None] & (col < cols)[None, :]
        first += tl.load(partial_ptr + part[:, None] * cols + col[None, :], mask=mask, other=0.0)
        if second_ptr is not None:
            second += tl.load(partial_ptr + (count + part)[:, None] * cols + col[None, :], mask=mask, other=0.0)
    tl.store(first_ptr + col, tl.sum(first, axis=0).to(first_ptr.dtype.element_ty), mask=col < cols)
    if second_ptr is not None:
        tl.store(second_ptr + col, tl.sum(second, axis=0).to(second_ptr.dtype.element_ty), mask=col < cols)


def sum_partials(partial, first, second=None):
    """first (cols,) = Σ partial[0], second (cols,) = Σ partial[1] over the middle of partial (1 or 2, count, cols)."""
    _, count, cols = partial.shape
    # Few columns a program: each is a chain of loads, so many programs must run at once.
    _sum_partials[(triton.cdiv(cols, 32),)](partial, first, second, count, cols, BLOCK_P=64, BLOCK_N=32, num_warps=4)
