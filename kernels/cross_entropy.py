"""cross_entropy in Triton: a row's loss and its gradient in one kernel. The maths: fastlm/ops/cross_entropy.py.

A program takes one row. Up to WHOLE classes are held in registers: one read, one exp an element. A longer row is swept
twice in blocks: for Σ exp under a running maximum, then for the gradient. The second sweep goes backward, so it begins
with what the first has just brought into the multiprocessor's cache. Memory is read once and written once.

Rows of an odd vocabulary start at any address. A row is split into a head of less than 16 bytes, a body that starts on
16 bytes and is a multiple of them, and a tail of less than 16. The body moves in 16-byte accesses, with one mask for a
whole access; head and tail together are one scalar access of 2·VEC lanes. Nothing outside the row is touched.

The mean's denominator is summed first, by at most PARTS programs, each of which leaves a partial sum; every row adds
these. The losses are summed last. All sums have a fixed order: the same bits in every run, without atomics.
"""

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cross_entropy_rows import _fwd, edge_columns, split, tile_columns
from .device import multiprocessors, resident
from .rows import Matrix, matrix
from .tuning import choose


@dataclass(frozen=True)
class Config:
    """Elements of a block, and its warps. per_sm: programs a multiprocessor, which loop over the rows and sweep each
    twice; 0: one program a row, which it holds in registers."""

    block_n: int
    num_warps: int
    per_sm: int

    def limit(self) -> dict[str, int]:
        """Registers of a thread with which per_sm programs are resident at once.

        ptxas uses them all only with this limit: for float32 with smoothing it otherwise stops at 32, and spills. With
        it nothing spills on sm_80 and sm_90 (V of 30522, 32128, 50257, 128256, 151936; bfloat16 and float32; each
        option): 48 to 64 registers, all loads and stores of logits 16 bytes wide.
        """
        return {"maxnreg": min(255, 65536 // (32 * self.num_warps * self.per_sm) // 8 * 8)} if self.per_sm else {}


# Longest row in registers: 512 threads hold 32 elements each, and two programs fit a multiprocessor, so one loads while
# the other computes. At twice the length only one would fit.
WHOLE = 16384
# A longer row must stay cached from one sweep to the next. A multiprocessor runs two programs of 512 threads where two
# rows fit its L1 (256 KB on sm_90, less shared memory), else one of 1024. More rows at once would be read from memory
# twice: two rows of 128256 in bfloat16 on each of 132 multiprocessors are 68 MB, and L2 has 50.
L1 = 208 * 1024
# Bytes that a thread loads at once in a sweep, in four accesses: a multiprocessor then has 64 KB in flight, twice the
# product of latency and bandwidth. Class weights are not aligned as the row is: 4-byte loads, each with an address.
# With a softcap, 64 bytes would spill 80 to 216 bytes a thread; tanh, two an element, takes longer than the loads.
SWEEP, SWEEP_WEIGHTED = 64, 16
PARTS = 64  # partial sums at most in what `_sum` adds
SUM_BLOCK = 4096
SCALE_BLOCK, SCALE_REGISTERS = 4096, 80  # of `_scale`: 128 threads, 32 elements each, and no spills


def config(cols: int, itemsize: int, weighted: bool) -> Config:
    """weighted: with class weights or a softcap, for which a thread needs more registers an element."""
    shape = (triton.next_power_of_2(cols) if cols <= WHOLE else cols, itemsize, int(weighted))
    return choose(
        "cross_entropy_fwd", shape, lambda: _rule(cols, itemsize, weighted), lambda: _others(cols, itemsize, weighted)
    )


def _rule(cols: int, itemsize: int, weighted: bool) -> Config:
    """By the constants above; half of SWEEP where the last block, partly filled, would cost more than a tenth."""
    if cols <= WHOLE:
        block_n = max(256, triton.next_power_of_2(cols))
        return Config(block_n, max(1, block_n // 1024), per_sm=0)
    per_sm = 2 if 2 * cols * itemsize <= L1 else 1
    large = 1024 // per_sm * (SWEEP_WEIGHTED if weighted else SWEEP) // itemsize
    padded = [triton.cdiv(cols, block_n) * block_n for block_n in (large, large // 2)]
    return Config(large // 2 if padded[0] > 1.1 * padded[1] else large, 32 // per_sm, per_sm)


def _others(cols: int, itemsize: int, weighted: bool) -> list[Config]:
    rule = _rule(cols, itemsize, weighted)
    if not rule.per_sm:
        return [Config(rule.block_n, w, 0) for w in (1, 2, 4, 8, 16, 32) if 8 <= rule.block_n // (32 * w) <= 64]
    every = itertools.product((8, 16, 32), (1, 2, 3, 4, 6), (16, 32, 64))
    return [Config(32 * w * loaded // itemsize, w, sm) for w, sm, loaded in every if 16 <= w * sm <= 64]


def vec(x: torch.Tensor) -> int:
    """Elements of a 16-byte access."""
    return 16 // x.element_size()


@triton.jit
def _scale(
    x: Matrix,
    dloss_ptr,
    y: Matrix,
    rows,
    cols,
    PER_ROW: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = x dloss. Few programs, which loop: dloss is mostly 1, and in place there is then nothing to do."""
    dloss = tl.load(dloss_ptr)
    group, tile = tile_columns(BLOCK_N, VEC)
    blocks = (cols - 1) // BLOCK_N + 1  # cdiv's sum overflows just below 2^31 elements
    tiles = rows * blocks
    if IN_PLACE and not PER_ROW:
        tiles = tl.where(dloss == 1.0, 0, tiles)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.cast(index, tl.int64) // blocks
        start = tl.cast(index % blocks, tl.int64) * BLOCK_N
        source_ptr = x.ptr + row * x.stride
        out_ptr = y.ptr + row * y.stride
        head, body = split(source_ptr, cols, VEC)
        if PER_ROW:
            dloss = tl.load(dloss_ptr + row)
        body_ptr = tl.multiple_of(source_ptr + head, 16)
        out_body_ptr = out_ptr + head
        if ALIGNED:
            out_body_ptr = tl.multiple_of(out_body_ptr, 16)
        in_body = (start + group < body)[:, None]
        block = tl.load(body_ptr + start + tile, mask=in_body).to(tl.float32)
        tl.store(out_body_ptr + start + tile, (block * dloss).to(y.ptr.dtype.element_ty), mask=in_body)
        if start == 0:
            lane, edge_col = edge_columns(head, body, VEC)
            edge = tl.load(source_ptr + edge_col, mask=lane < cols - body).to(tl.float32)
            tl.debug_barrier()  # every thread has read it before some overwrite it
            tl.store(out_ptr + edge_col, (edge * dloss).to(y.ptr.dtype.element_ty), mask=lane < cols - body)


# ---- sums over the rows


@triton.jit
def _sum(x_ptr, part_ptr, out_ptr, n, share, parts, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[program] = Σ x over the program's share, divided by Σ part unless part_ptr is None."""
    begin = tl.program_id(0) * share
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, min(begin + share, n), BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        sums += tl.load(x_ptr + i, mask=i < n, other=0.0)
    total = tl.sum(sums)
    if part_ptr is not None:
        part = tl.arange(0, PARTS)
        total = tl.div_rn(total, tl.sum(tl.load(part_ptr + part, mask=part < parts, other=0.0)))
    tl.store(out_ptr + tl.program_id(0), total)


@triton.jit
def _count(target_ptr, w_ptr, out_ptr, n, share, cols, ignore_index: tl.int64, BLOCK_N: tl.constexpr):
    """out[program] = Σ w_t over the program's share of the targets, those that are classes and not ignored."""
    begin = tl.program_id(0) * share
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, min(begin + share, n), BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        t = tl.load(target_ptr + i, mask=i < n, other=-1)
        counts = (t >= 0) & (t < cols) & (t != ignore_index)
        if w_ptr is not None:
            sums += tl.load(w_ptr + t, mask=counts, other=0.0).to(tl.float32)
        else:
            sums += tl.where(counts, 1.0, 0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(sums))


# ---- launchers: logits, dlogits (rows, cols) with a unit last stride; target (rows,) int64, weight (cols,) contiguous


def _shares(n: int) -> tuple[int, int]:
    """Programs that sum n elements, and the share of each, a multiple of SUM_BLOCK."""
    share = triton.cdiv(triton.cdiv(max(n, 1), PARTS), SUM_BLOCK) * SUM_BLOCK
    return max(1, triton.cdiv(n, share)), share


def count_targets(target, weight, cols, ignore_index):
    """Parts (at most PARTS,) float32 of Σ w_t over the targets that are classes and not ignored."""
    programs, share = _shares(target.numel())
    parts = target.new_empty(programs, dtype=torch.float32)
    _count[(programs,)](
        target, weight, parts, target.numel(), share, cols, ignore_index, BLOCK_N=SUM_BLOCK, num_warps=8
    )
    return parts


def sum_losses(loss, parts):
    """Σ loss (rows,), divided by Σ parts unless that is None; a scalar."""

    def reduce(x, programs, share, parts):
        out = x.new_empty(programs)
        count = 0 if parts is None else parts.numel()
        _sum[(programs,)](x, parts, out, x.numel(), share, count, PARTS=PARTS, BLOCK_N=SUM_BLOCK, num_warps=8)
        return out

    programs, share = _shares(loss.numel())
    if programs > 1:
        loss = reduce(loss, programs, share, None)
    return reduce(loss, 1, SUM_BLOCK, parts).view(())


def aligned_alike(x, y) -> bool:
    """Whether each row of y (rows, cols) starts as far past a 16-byte boundary as that of x; y None: contiguous."""
    start, stride = (0, x.shape[1]) if y is None else (y.data_ptr(), y.stride(0))
    return (x.data_ptr() - start) % 16 == 0 and (x.shape[0] <= 1 or (x.stride(0) - stride) % vec(x) == 0)


def cross_entropy_fwd(
    logits,
    target,
    weight,
    weight_sum,
    parts,
    dloss,
    loss,
    figures,
    dlogits,
    *,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
):
    """Fills loss (rows,) float32 and dlogits, unless it is None. It may be logits, and must be aligned as they are.

    parts: of the mean's denominator, by count_targets; dloss: (rows,) float32; each may be None, for 1.
    weight_sum: Σ weight, float32, where there is a weight.
    figures: (2, rows) float32, filled with z_loss lse² and whether the target's logit is the first of the greatest; or
        None.
    softcap: the logits are softcap tanh(x / softcap); 0: x.
    """
    rows, cols = logits.shape
    if rows == 0:
        return
    assert dlogits is None or aligned_alike(logits, dlogits)
    c = config(cols, logits.element_size(), weight is not None or softcap > 0.0)
    programs = min(rows, c.per_sm * multiprocessors(logits.device)) if c.per_sm else rows
    tensors = matrix(logits), target, weight, weight_sum, parts, dloss, loss, matrix(figures), matrix(dlogits)
    options = ignore_index, label_smoothing or None, z_loss or None, softcap or None
    constants = {"WHOLE": c.per_sm == 0, "PARTS": PARTS, "VEC": vec(logits), "BLOCK_N": c.block_n}
    count = 0 if parts is None else parts.numel()
    _fwd[(programs,)](*tensors, rows, cols, count, *options, **constants, num_warps=c.num_warps, **c.limit())


def cross_entropy_bwd(dlogits, dloss, out):
    """Fills out, which may be dlogits, with dlogits * dloss, float32, a scalar or (rows,)."""
    if out.numel() == 0:
        return
    per_row = dloss.dim() > 0
    if not per_row and dlogits.is_contiguous() and out.is_contiguous():
        dlogits, out = dlogits.view(1, -1), out.view(1, -1)
    rows, cols = out.shape
    block_n = min(SCALE_BLOCK, max(256, triton.next_power_of_2(cols)))
    in_place, warps = out.data_ptr() == dlogits.data_ptr(), max(1, block_n // 1024)
    programs = min(rows * triton.cdiv(cols, block_n), resident(warps, SCALE_REGISTERS, out.device))
    constants = {"PER_ROW": per_row, "IN_PLACE": in_place, "ALIGNED": aligned_alike(dlogits, out), "VEC": vec(out)}
    shape = {"BLOCK_N": block_n, "num_warps": warps, "maxnreg": SCALE_REGISTERS}
    _scale[(programs,)](matrix(dlogits), dloss, matrix(out), rows, cols, **constants, **shape)
