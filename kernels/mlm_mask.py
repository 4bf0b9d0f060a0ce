"""mlm_mask in Triton: the definition is fastlm/ops/mlm_mask.py's. No host synchronisation, no atomics.

Three kernels over blocks of tokens of the flattened input; only whole words need the first:
    _word_starts   the last token of a block that starts a word
    _select        ids and labels, a flag a token, and the number selected in a block
    _compact       a selected token's slot is the number selected before it: those of earlier blocks, then its rank
A word's first token and the numbers selected cross blocks: a program reads them from all blocks before it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .philox import MASK_DOMAIN, make_key, philox4x32
from .tuning import choose


@dataclass(frozen=True)
class Config:
    """Tokens of a block: 8 a thread. A block reads one number of every block before it, which costs little: at 16
    million tokens a program reads 16 thousand numbers, 64 kB, from the second-level cache."""

    block: int = 1024
    num_warps: int = 4


def config() -> Config:
    return choose("mlm_mask", (), Config, lambda: [Config(b, w) for b in (512, 1024, 2048) for w in (2, 4, 8)])


IGNORE_INDEX = tl.constexpr(-100)


class PerToken(NamedTuple):
    """A number per token: (rows, cols), any strides."""

    ptr: tl.tensor
    stride_r: tl.tensor
    stride_c: tl.tensor


@triton.jit
def _is_special(token, ids, special_ptr, mask, SPECIAL: tl.constexpr):
    """By special_ptr, or where that is None by the ranges of ids SPECIAL."""
    if special_ptr is not None:
        special = tl.load(special_ptr + token, mask=mask, other=0) != 0
    else:
        special = token < 0
        for k in tl.static_range(0, len(SPECIAL), 2):
            special |= (ids >= SPECIAL[k]) & (ids < SPECIAL[k] + SPECIAL[k + 1])
    return special


@triton.jit
def _at(x: PerToken, token, cols, mask):
    row = token // cols
    at = row.to(tl.int64) * x.stride_r + (token - row * cols).to(tl.int64) * x.stride_c
    return tl.load(x.ptr + at, mask=mask, other=0)


@triton.jit
def _word_start(
    token, ids_ptr, sample: PerToken, epochs: PerToken, special_ptr, starts_ptr, tokens, cols, SPECIAL: tl.constexpr
):
    """Whether a token starts a word: by word_starts, as the first of a row or a sample, or after a special token."""
    mask, inside = token < tokens, (token < tokens) & (token > 0)
    start = (token % cols == 0) | (tl.load(starts_ptr + token, mask=mask, other=0) != 0)
    before = token - 1
    ids = tl.load(ids_ptr + before, mask=inside, other=0)
    start |= _is_special(before, ids, special_ptr, inside, SPECIAL)
    if sample is not None:
        start |= _at(sample, token, cols, mask) != _at(sample, before, cols, inside)
    if epochs is not None:
        start |= _at(epochs, token, cols, mask).to(tl.uint32) != _at(epochs, before, cols, inside).to(tl.uint32)
    return start & mask


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _word_starts(
    ids_ptr,
    sample: PerToken,
    epochs: PerToken,
    special_ptr,
    starts_ptr,
    last_ptr,
    tokens,
    cols,
    SPECIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = _word_start(token, ids_ptr, sample, epochs, special_ptr, starts_ptr, tokens, cols, SPECIAL)
    tl.store(last_ptr + tl.program_id(0), tl.max(tl.where(start, token, -1), axis=0))


@triton.jit
def _select(
    ids_ptr,
    sample: PerToken,
    positions: PerToken,
    epochs: PerToken,
    special_ptr,
    starts_ptr,
    last_ptr,
    out_ptr,
    labels_ptr,
    flags_ptr,
    counts_ptr,
    tokens,
    cols,
    epoch: tl.int64,
    mask_token_id,
    choices,
    seed: tl.int64,
    select_below: tl.int64,
    mask_below: tl.int64,
    replace_below: tl.int64,
    SPECIAL: tl.constexpr,
    LEFT_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """starts_ptr None: tokens are masked one by one, not by words."""
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    mask = token < tokens
    ids = tl.load(ids_ptr + token, mask=mask, other=0)
    k0, k1 = make_key(seed, MASK_DOMAIN)
    r0, r1, r2 = _words(token, sample, positions, epochs, epoch, cols, k0, k1, mask)
    if starts_ptr is not None:
        start = _word_start(token, ids_ptr, sample, epochs, special_ptr, starts_ptr, tokens, cols, SPECIAL)
        carry = tl.full((BLOCK,), -1, tl.int32)
        for begin in range(0, block, BLOCK):
            earlier = begin + tl.arange(0, BLOCK)
            carry = tl.maximum(carry, tl.load(last_ptr + earlier, mask=earlier < block, other=-1))
        first = tl.associative_scan(tl.where(start, token, -1), 0, _larger)
        first = tl.maximum(first, tl.max(carry, axis=0))
        r0, _, _ = _words(first, sample, positions, epochs, epoch, cols, k0, k1, mask)
    selected = mask & (r0.to(tl.int64) < select_below)
    selected &= ~_is_special(token, ids, special_ptr, mask, SPECIAL)

    # The j-th id that is not left out: j, plus the length of each range left out below it, in ascending order.
    drawn = tl.umulhi(r2, tl.cast(choices, tl.uint32)).to(tl.int64)
    for k in tl.static_range(0, len(LEFT_OUT), 2):
        drawn += tl.where(drawn >= LEFT_OUT[k], LEFT_OUT[k + 1], 0)
    replacement = tl.where(r1.to(tl.int64) < replace_below, drawn, ids)
    replacement = tl.where(r1.to(tl.int64) < mask_below, mask_token_id, replacement)
    tl.store(out_ptr + token, tl.where(selected, replacement, ids), mask=mask)
    tl.store(labels_ptr + token, tl.where(selected, ids, IGNORE_INDEX), mask=mask)
    tl.store(flags_ptr + token, selected.to(tl.int8), mask=mask)
    tl.store(counts_ptr + block, tl.sum(selected.to(tl.int32), axis=0))


@triton.jit
def _words(token, sample: PerToken, positions: PerToken, epochs: PerToken, epoch, cols, k0, k1, mask):
    """Philox words r0, r1, r2 of tokens."""
    if sample is not None:
        sample_id = _at(sample, token, cols, mask)
    else:
        sample_id = (token // cols).to(tl.int64)
    if positions is not None:
        position = _at(positions, token, cols, mask)
    else:
        position = token % cols
    if epochs is not None:
        epoch = _at(epochs, token, cols, mask)
    r0, r1, r2, _ = philox4x32(position, epoch, sample_id, sample_id >> 32, k0, k1)
    return r0, r1, r2


@triton.jit
def _compact(
    ids_ptr,
    flags_ptr,
    counts_ptr,
    index_ptr,
    targets_ptr,
    count_ptr,
    tokens,
    blocks,
    capacity: tl.int64,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    before, all_of_them = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, blocks, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + other, mask=other < blocks, other=0)
        before += tl.where(other < block, counts, 0)
        all_of_them += counts
    total = tl.sum(all_of_them, axis=0)
    tl.store(count_ptr, total.to(tl.int64), mask=block == 0)

    token = block * BLOCK + tl.arange(0, BLOCK)
    selected = tl.load(flags_ptr + token, mask=token < tokens, other=0).to(tl.int32)
    slot = tl.sum(before, axis=0) + tl.cumsum(selected, axis=0) - 1
    kept = (selected != 0) & (slot < capacity)
    tl.store(index_ptr + slot, token.to(tl.int64), mask=kept)
    tl.store(targets_ptr + slot, tl.load(ids_ptr + token, mask=kept, other=0), mask=kept)
    # This program's share of the slots that no token takes.
    slot = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    empty = (slot >= total) & (slot < capacity)
    tl.store(index_ptr + slot, tl.zeros((BLOCK,), tl.int64), mask=empty)
    tl.store(targets_ptr + slot, tl.full((BLOCK,), IGNORE_INDEX, tl.int64), mask=empty)


def mlm_mask(
    input_ids,
    sample_ids,
    positions,
    epochs,
    epoch,
    special_tokens_mask,
    word_starts,
    out,
    labels,
    index,
    targets,
    count,
    *,
    special,
    left_out,
    choices,
    mask_token_id,
    seed,
    select_below,
    mask_below,
    replace_below,
):
    """Fills out, labels (like input_ids), index, targets (capacity,) and count ().

    input_ids, special_tokens_mask, word_starts (rows, cols) contiguous; sample_ids, positions, epochs (rows, cols), any
    strides, or None. special, left_out: ids as ranges (first, length, first, length, ...), ascending. They are
    constants of the kernel, compared and not looked up. choices: how many ids of the vocabulary are not left out.
    """
    rows, cols = input_ids.shape
    tokens, capacity, c = rows * cols, index.numel(), config()
    blocks = triton.cdiv(tokens, c.block)
    flags = input_ids.new_empty(tokens, dtype=torch.int8)
    counts = input_ids.new_empty(blocks, dtype=torch.int32)
    last = input_ids.new_empty(blocks if word_starts is not None else 0, dtype=torch.int32)
    sample, position, epochs = (
        None if x is None else PerToken(x, *x.stride()) for x in (sample_ids, positions, epochs)
    )
    shape = {"BLOCK": c.block, "num_warps": c.num_warps}
    if blocks and word_starts is not None:
        _word_starts[(blocks,)](
            *(input_ids, sample, epochs, special_tokens_mask, word_starts, last, tokens, cols), SPECIAL=special, **shape
        )
    if blocks:
        inputs = input_ids, sample, position, epochs, special_tokens_mask, word_starts, last
        below = select_below, mask_below, replace_below
        _select[(blocks,)](
            *(*inputs, out, labels, flags, counts, tokens, cols, epoch, mask_token_id, choices, seed, *below),
            SPECIAL=special,
            LEFT_OUT=left_out,
            **shape,
        )
    _compact[(max(1, blocks, triton.cdiv(capacity, c.block)),)](
        input_ids, flags, counts, index, targets, count, tokens, blocks, capacity, **shape
    )
