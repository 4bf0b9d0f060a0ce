"""mlm_mask in Triton: the definition is fastlm/ops/mlm_mask.py's. No host synchronisation, no atomics.

Three kernels over blocks of tokens of the flattened input, the first for whole words alone:
    _word_starts   the last token of a block that starts a word
    _select        ids and labels, a flag a token, and the number selected in a block
    _compact       a selected token's slot is the number selected before it: those of earlier blocks, then its rank
What crosses blocks, a word's first token and the numbers selected, a program takes from all blocks before its own.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .philox import MASK_DOMAIN, make_key, philox4x32
from .tuning import choose


@dataclass(frozen=True)
class Config:
    """Tokens of a block: 8 a thread. Each block reads one number of every block before it, so more of them cost little
    until there are many: at 16 million tokens a program reads 16 thousand, 64 kB from the second-level cache."""

    block: int = 1024
    num_warps: int = 4


def config() -> Config:
    return choose("mlm_mask", (), Config, lambda: [Config(b, w) for b in (512, 1024, 2048) for w in (2, 4, 8)])


IGNORE_INDEX = tl.constexpr(-100)


@triton.jit
def _is_special(token, ids, special_ptr, mask, HAS_SPECIAL: tl.constexpr, SPECIAL: tl.constexpr):
    if HAS_SPECIAL:
        special = tl.load(special_ptr + token, mask=mask, other=0) != 0
    else:
        special = token < 0
        for k in tl.static_range(0, len(SPECIAL), 2):
            special |= (ids >= SPECIAL[k]) & (ids < SPECIAL[k] + SPECIAL[k + 1])
    return special


@triton.jit
def _at(ptr, token, cols, stride_r, stride_c, mask):
    """A number per token of a (rows, cols) view."""
    row = token // cols
    return tl.load(ptr + row.to(tl.int64) * stride_r + (token - row * cols).to(tl.int64) * stride_c, mask=mask, other=0)


@triton.jit
def _word_start(
    token, ids_ptr, sample_ptr, epoch_ptr, special_ptr, starts_ptr, tokens, cols, stride_sr, stride_sc, stride_er,
    stride_ec, HAS_SAMPLE: tl.constexpr, HAS_EPOCHS: tl.constexpr, HAS_SPECIAL: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """Whether a token starts a word: by word_starts, as the first of a row or a sample, or after a special token."""
    mask, inside = token < tokens, (token < tokens) & (token > 0)
    start = (token % cols == 0) | (tl.load(starts_ptr + token, mask=mask, other=0) != 0)
    before = token - 1
    ids = tl.load(ids_ptr + before, mask=inside, other=0)
    start |= _is_special(before, ids, special_ptr, inside, HAS_SPECIAL, SPECIAL)
    if HAS_SAMPLE:
        start |= _at(sample_ptr, token, cols, stride_sr, stride_sc, mask) != _at(
            sample_ptr, before, cols, stride_sr, stride_sc, inside
        )
    if HAS_EPOCHS:
        start |= _at(epoch_ptr, token, cols, stride_er, stride_ec, mask).to(tl.uint32) != _at(
            epoch_ptr, before, cols, stride_er, stride_ec, inside
        ).to(tl.uint32)
    return start & mask


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _word_starts(
    ids_ptr, sample_ptr, epoch_ptr, special_ptr, starts_ptr, last_ptr, tokens, cols, stride_sr, stride_sc, stride_er,
    stride_ec, HAS_SAMPLE: tl.constexpr, HAS_EPOCHS: tl.constexpr, HAS_SPECIAL: tl.constexpr, SPECIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = _word_start(
        token, ids_ptr, sample_ptr, epoch_ptr, special_ptr, starts_ptr, tokens, cols, stride_sr, stride_sc, stride_er,
        stride_ec, HAS_SAMPLE, HAS_EPOCHS, HAS_SPECIAL, SPECIAL,
    )  # fmt: skip
    tl.store(last_ptr + tl.program_id(0), tl.max(tl.where(start, token, -1), axis=0))


@triton.jit
def _select(
    ids_ptr, sample_ptr, position_ptr, epoch_ptr, special_ptr, starts_ptr, last_ptr,
    out_ptr, labels_ptr, flags_ptr, counts_ptr, tokens, cols,
    stride_sr, stride_sc, stride_pr, stride_pc, stride_er, stride_ec,
    epoch: tl.int64, mask_token_id, choices, seed: tl.int64,
    select_below: tl.int64, mask_below: tl.int64, replace_below: tl.int64,
    HAS_SAMPLE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_EPOCHS: tl.constexpr, HAS_SPECIAL: tl.constexpr,
    WORDS: tl.constexpr, SPECIAL: tl.constexpr, LEFT_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    mask = token < tokens
    ids = tl.load(ids_ptr + token, mask=mask, other=0)
    k0, k1 = make_key(seed, MASK_DOMAIN)
    r0, r1, r2 = _words(
        token, sample_ptr, position_ptr, epoch_ptr, cols, stride_sr, stride_sc, stride_pr, stride_pc, stride_er,
        stride_ec, epoch, k0, k1, mask, HAS_SAMPLE, HAS_POSITIONS, HAS_EPOCHS,
    )  # fmt: skip
    if WORDS:
        start = _word_start(
            token, ids_ptr, sample_ptr, epoch_ptr, special_ptr, starts_ptr, tokens, cols, stride_sr, stride_sc,
            stride_er, stride_ec, HAS_SAMPLE, HAS_EPOCHS, HAS_SPECIAL, SPECIAL,
        )  # fmt: skip
        carry = tl.full((BLOCK,), -1, tl.int32)
        for begin in range(0, block, BLOCK):
            earlier = begin + tl.arange(0, BLOCK)
            carry = tl.maximum(carry, tl.load(last_ptr + earlier, mask=earlier < block, other=-1))
        first = tl.associative_scan(tl.where(start, token, -1), 0, _larger)
        first = tl.maximum(first, tl.max(carry, axis=0))
        r0, _, _ = _words(
            first, sample_ptr, position_ptr, epoch_ptr, cols, stride_sr, stride_sc, stride_pr, stride_pc, stride_er,
            stride_ec, epoch, k0, k1, mask, HAS_SAMPLE, HAS_POSITIONS, HAS_EPOCHS,
        )  # fmt: skip
    selected = mask & (r0.to(tl.int64) < select_below)
    selected &= ~_is_special(token, ids, special_ptr, mask, HAS_SPECIAL, SPECIAL)

    # The j-th id that is left: j, and past every range left out its length more, in ascending order.
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
def _words(
    token, sample_ptr, position_ptr, epoch_ptr, cols, stride_sr, stride_sc, stride_pr, stride_pc, stride_er, stride_ec,
    epoch, k0, k1, mask, HAS_SAMPLE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_EPOCHS: tl.constexpr,
):  # fmt: skip
    """Philox words r0, r1, r2 of tokens."""
    if HAS_SAMPLE:
        sample = _at(sample_ptr, token, cols, stride_sr, stride_sc, mask)
    else:
        sample = (token // cols).to(tl.int64)
    if HAS_POSITIONS:
        position = _at(position_ptr, token, cols, stride_pr, stride_pc, mask)
    else:
        position = token % cols
    if HAS_EPOCHS:
        epoch = _at(epoch_ptr, token, cols, stride_er, stride_ec, mask)
    r0, r1, r2, _ = philox4x32(position, epoch, sample, sample >> 32, k0, k1)
    return r0, r1, r2


@triton.jit
def _compact(
    ids_ptr, flags_ptr, counts_ptr, index_ptr, targets_ptr, count_ptr, tokens, blocks, capacity: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
    # Slots that no token takes: this program's share of all slots.
    slot = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    empty = (slot >= total) & (slot < capacity)
    tl.store(index_ptr + slot, tl.zeros((BLOCK,), tl.int64), mask=empty)
    tl.store(targets_ptr + slot, tl.full((BLOCK,), IGNORE_INDEX, tl.int64), mask=empty)


def mlm_mask(
    input_ids, sample_ids, positions, epochs, epoch, special_tokens_mask, word_starts, out, labels, index, targets,
    count, *, special, left_out, choices, mask_token_id, seed, select_below, mask_below, replace_below,
):  # fmt: skip
    """Fills out, labels (like input_ids), index, targets (capacity,) and count ().

    input_ids, special_tokens_mask, word_starts (rows, cols) contiguous; sample_ids, positions, epochs (rows, cols), any
    strides, or None. special, left_out: ids as ranges (first, length, first, length, ...), ascending, constants of the
    kernel: compared, not looked up. choices: how many ids of the vocabulary are not left out.
    """
    rows, cols = input_ids.shape
    tokens, capacity, c = rows * cols, index.numel(), config()
    blocks = triton.cdiv(tokens, c.block)
    flags = input_ids.new_empty(tokens, dtype=torch.int8)
    counts = input_ids.new_empty(blocks, dtype=torch.int32)
    last = input_ids.new_empty(blocks if word_starts is not None else 0, dtype=torch.int32)
    stride_s, stride_p, stride_e = (
        (0, 0) if value is None else value.stride() for value in (sample_ids, positions, epochs)
    )
    has = {
        "HAS_SAMPLE": sample_ids is not None,
        "HAS_EPOCHS": epochs is not None,
        "HAS_SPECIAL": special_tokens_mask is not None,
        "SPECIAL": special,
    }
    shape = {"BLOCK": c.block, "num_warps": c.num_warps}
    if blocks and word_starts is not None:
        _word_starts[(blocks,)](
            input_ids, sample_ids, epochs, special_tokens_mask, word_starts, last, tokens, cols, *stride_s, *stride_e,
            **has, **shape,
        )  # fmt: skip
    if blocks:
        _select[(blocks,)](
            input_ids, sample_ids, positions, epochs, special_tokens_mask, word_starts, last, out, labels, flags,
            counts, tokens, cols, *stride_s, *stride_p, *stride_e, epoch, mask_token_id, choices,
            seed, select_below, mask_below, replace_below,
            HAS_POSITIONS=positions is not None, WORDS=word_starts is not None, LEFT_OUT=left_out,
            **has, **shape,
        )  # fmt: skip
    _compact[(max(1, blocks, triton.cdiv(capacity, c.block)),)](
        input_ids, flags, counts, index, targets, count, tokens, blocks, capacity, **shape
    )
