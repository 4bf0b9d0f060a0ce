"""mlm_mask: masked-language-model targets, as a pure function of (seed, epoch, sample, position).

A sample is one piece of a document, with special tokens; position counts from 0 within it. For every token

    r0, r1, r2, _ = Philox4x32-10(counter = (position, epoch, sample low 32, sample high 32), key(seed, MASK_DOMAIN))

    selected:  not special, and r0 < floor(mlm_probability · 2^32)
    replaced:  r1 < floor(mask_replace · 2^32)                      by mask_token_id
               r1 < floor((mask_replace + random_replace) · 2^32)   by id number j of the vocabulary without the special
                                                                    ids and mask_token_id, j = (r2 · how many) >> 32
               else                                                 by itself

The mask of a token does not depend on its batch, the backend, the number of ranks or a resume.
Each counter word is the low 32 bits of its value; mask_replace + random_replace is rounded to float64 before the floor.

Whole words (`word_starts`): all tokens of a word are selected by the r0 of the first one; r1 and r2 are drawn for each
token. A token starts a word if word_starts is True for it, if it is the first of a row or of a sample (its sample id or
epoch differs from that of the token before), or if it follows a special token. So a special token ends a word, and a
word does not cross rows.

Nothing is saved and nothing is differentiable. Sources: Devlin et al. 2018 (arXiv:1810.04805), section 3.1, for the
task and its 80/10/10; Salmon et al. 2011 for Philox.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from fastlm import philox
from fastlm.ops import _checks, _registry
from fastlm.ops._args import SymInt
from fastlm.ops._labels import IGNORE_INDEX

__all__ = ["MaskedTokens", "mlm_mask", "mlm_mask_reference"]

_LOW32 = 0xFFFFFFFF


class MaskedTokens(NamedTuple):
    """The result of `mlm_mask`; all int64, on the device of the input.

    input_ids: like the input, selected tokens replaced.
    labels: like the input: the original id of a selected token, -100 for the others.
    index: (capacity,) the first selected positions of the flattened input, ascending; then 0.
    targets: (capacity,) the original ids at `index`; then -100.
    count: () how many tokens are selected, even where that exceeds the capacity.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    targets: torch.Tensor
    count: torch.Tensor


def default_capacity(tokens: int, mlm_probability: float, whole_words: bool = False) -> int:
    """Mean + 6σ of the number of selected tokens, rounded up to 128, at most `tokens`. For whole words: `tokens`."""
    if whole_words:  # one draw selects many tokens: the spread is not that of independent ones
        return tokens
    sqrt, least = (math.sqrt, min) if type(tokens) is int else (torch.sym_sqrt, torch.sym_min)  # the latter take 2 µs
    sigma = sqrt(tokens * mlm_probability * (1.0 - mlm_probability))
    return least(tokens, math.ceil((tokens * mlm_probability + 6.0 * sigma) / 128) * 128)


def _per_token(value, shape):
    """One number per token, as a view: of a single number, of one per row, or of one per token."""
    return (value[:, None] if value.dim() == 1 and len(shape) == 2 else value).expand(shape)


def mlm_mask_reference(
    input_ids,
    *,
    mask_token_id,
    vocab_size,
    special_ids,
    seed,
    epoch=0,
    sample_ids=None,
    positions=None,
    special_tokens_mask=None,
    mlm_probability=0.15,
    mask_replace_prob=0.8,
    random_replace_prob=0.1,
    word_starts=None,
    capacity=None,
):
    """MaskedTokens in plain torch, without a host sync, on any device. Arguments as of `mlm_mask`."""
    shape, device, tokens = input_ids.shape, input_ids.device, input_ids.numel()
    if capacity is None:
        capacity = default_capacity(tokens, mlm_probability, word_starts is not None)
    if sample_ids is None:
        sample_ids = torch.arange(shape[0], device=device) if len(shape) == 2 else input_ids.new_zeros(())
    if positions is None:
        positions = torch.arange(shape[-1], device=device)
    if not isinstance(epoch, torch.Tensor):
        epoch = input_ids.new_full((), epoch)
    sample_ids, epoch, positions = _per_token(sample_ids, shape), _per_token(epoch, shape), positions.expand(shape)
    epoch = epoch & _LOW32
    counter = positions & _LOW32, epoch, sample_ids & _LOW32, (sample_ids >> 32) & _LOW32
    r0, r1, r2, _ = philox.philox4x32(*counter, *philox.key(seed, philox.MASK_DOMAIN))

    special = special_tokens_mask
    if special is None:
        special = torch.zeros(shape, dtype=torch.bool, device=device)
        for special_id in sorted(set(special_ids)):
            special = special | (input_ids == special_id)
    if word_starts is not None:
        starts = word_starts.clone()
        starts[..., :1] = True
        starts[..., 1:] |= special[..., :-1] | (sample_ids.diff() != 0) | (epoch.diff() != 0)
        here = torch.arange(tokens, device=device).view(shape)
        first = torch.where(starts, here, 0).flatten().cummax(0).values
        r0 = r0.flatten()[first].view(shape)
    selected = ~special & (r0 < philox.threshold(mlm_probability))

    # The j-th of the remaining ids: j, plus one for every left-out id that is not above it, in ascending order.
    left_out = sorted({*special_ids, mask_token_id})
    random_ids = (r2 * (vocab_size - len(left_out))) >> 32
    for left in left_out:
        random_ids = random_ids + (random_ids >= left)
    replacement = torch.where(r1 < philox.threshold(mask_replace_prob + random_replace_prob), random_ids, input_ids)
    replacement = torch.where(r1 < philox.threshold(mask_replace_prob), mask_token_id, replacement)
    labels = torch.where(selected, input_ids, IGNORE_INDEX)

    # Compaction: a selected token goes to the slot of its rank; all others to one slot past the end, cut off.
    flat = selected.flatten()
    rank = flat.cumsum(0) - 1
    slot = torch.where(flat & (rank < capacity), rank, capacity)
    index = input_ids.new_zeros(capacity + 1).scatter_(0, slot, torch.arange(tokens, device=device))[:capacity]
    targets = input_ids.new_full((capacity + 1,), IGNORE_INDEX).scatter_(0, slot, input_ids.flatten())[:capacity]
    return MaskedTokens(torch.where(selected, replacement, input_ids), labels, index, targets, flat.sum())


# ---- the raw op


class Args(NamedTuple):
    input_ids: torch.Tensor  # (B, S) or (T,), int64
    sample_ids: torch.Tensor | None  # like input_ids, any strides; so are positions and epochs
    positions: torch.Tensor | None
    epochs: torch.Tensor | None
    epoch: int  # of every token, if epochs is None
    special_tokens_mask: torch.Tensor | None  # like input_ids, bool
    word_starts: torch.Tensor | None  # like input_ids, bool
    special_ids: list[int]  # sorted and unique
    left_out: list[int]  # special_ids and the mask id, sorted and unique: never drawn as a replacement
    mask_token_id: int
    vocab_size: int
    seed: int  # signed
    select_below: int  # floor(p·2^32) of the probabilities
    mask_below: int
    replace_below: int
    capacity: SymInt


def empty_outputs(args: Args) -> MaskedTokens:
    ids = args.input_ids
    index = ids.new_empty(args.capacity)
    return MaskedTokens(
        input_ids=torch.empty_like(ids, memory_format=torch.contiguous_format),
        labels=torch.empty_like(ids, memory_format=torch.contiguous_format),
        index=index,
        targets=torch.empty_like(index),
        count=ids.new_empty(()),
    )


_registry.page(__name__, "mlm_mask")
_registry.define("mlm_mask", Args, empty_outputs)


# ---- public


def _integer(name, value, low, high):
    if not isinstance(value, (int, torch.SymInt)) or not low <= value < high:
        raise ValueError(f"{name}: expected an integer in [{low}, {high}), got {value!r}")


def _integers(name, value, input_ids, *, per_row):
    """Checks a tensor of integers, like input_ids or, with `per_row`, one number per row; returns it as int64."""
    _checks.is_tensor(name, value, device=input_ids.device, dtypes=(torch.int64, torch.int32))
    rows = input_ids.shape[:1] if per_row and input_ids.dim() == 2 else input_ids.shape
    if value.shape not in (input_ids.shape, rows):
        wanted = f"{tuple(input_ids.shape)}, like input_ids" + (f", or {tuple(rows)}, one per row" if per_row else "")
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(value.shape)}")
    return value.to(torch.int64)


def _check_ids(input_ids) -> None:
    _checks.is_tensor("input_ids", input_ids, dtypes=(torch.int64, torch.int32))
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids: expected (B, S) rows or (T,) packed tokens, got shape {tuple(input_ids.shape)}")


def _check_vocabulary(mask_token_id, vocab_size, special_ids) -> tuple[list[int], list[int]]:
    """The special ids, and with the mask's the ids that are never drawn; both sorted and unique."""
    _integer("vocab_size", vocab_size, 1, 2**31)
    _integer("mask_token_id", mask_token_id, 0, vocab_size)
    special_ids = sorted({int(special_id) for special_id in special_ids})
    if special_ids and not (special_ids[0] >= 0 and special_ids[-1] < vocab_size):
        outside = [special_id for special_id in special_ids if not 0 <= special_id < vocab_size]
        raise ValueError(
            f"special_ids: expected ids in [0, vocab_size = {vocab_size}), got {outside}; vocab_size counts added "
            "tokens too, len(tokenizer)"
        )
    left_out = sorted({*special_ids, mask_token_id})
    if len(left_out) == vocab_size:
        raise ValueError(f"special_ids: all {vocab_size} ids of the vocabulary are special or [MASK], none is left")
    return special_ids, left_out


def _check_probabilities(mlm_probability, mask_replace_prob, random_replace_prob) -> int:
    """The threshold below which a selected token is replaced, by [MASK] or by a random id."""
    for name, p in (
        ("mlm_probability", mlm_probability),
        ("mask_replace_prob", mask_replace_prob),
        ("random_replace_prob", random_replace_prob),
    ):
        _checks.probability(name, p)
    replace_below = philox.threshold(mask_replace_prob + random_replace_prob)
    if replace_below > 2**32:
        raise ValueError(
            "mask_replace_prob, random_replace_prob: expected a sum of at most 1, "
            f"got {mask_replace_prob} + {random_replace_prob}"
        )
    return replace_below


def _check_per_token(input_ids, epoch, sample_ids, positions):
    """The three, tensors among them in int64."""
    if isinstance(epoch, torch.Tensor):
        epoch = _integers("epoch", epoch, input_ids, per_row=True)
    else:
        _integer("epoch", epoch, 0, 2**32)
    if sample_ids is not None:
        sample_ids = _integers("sample_ids", sample_ids, input_ids, per_row=True)
    if positions is not None:
        positions = _integers("positions", positions, input_ids, per_row=False)
    return epoch, sample_ids, positions


def _check_masks(input_ids, **masks) -> None:
    for name, mask in masks.items():
        if mask is not None:
            _checks.is_tensor(name, mask, device=input_ids.device, dtypes=(torch.bool,), shape=input_ids.shape)


def mlm_mask(
    input_ids: torch.Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Iterable[int],
    seed: int,
    epoch: int | torch.Tensor = 0,
    sample_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    special_tokens_mask: torch.Tensor | None = None,
    mlm_probability: float = 0.15,
    mask_replace_prob: float = 0.8,
    random_replace_prob: float = 0.1,
    word_starts: torch.Tensor | None = None,
    capacity: int | None = None,
    backend: str = "auto",
) -> MaskedTokens:
    """Selects tokens for prediction and replaces most of them, for masked-language modelling.

    Args:
        input_ids: (B, S) rows or (T,) packed tokens, int64 (int32 is converted), any strides. Not written.
        mask_token_id: id of [MASK], in [0, vocab_size).
        vocab_size: number of ids, added tokens included; in [1, 2^31).
        special_ids: ids that are never selected and never drawn as a replacement; any order, repeats allowed.
            mask_token_id is never drawn either.
        seed: 64-bit integer.
        epoch: an integer in [0, 2^32), or a tensor: one per row (B,), or per token.
        sample_ids: int64, one per row (B,) or per token; which document piece a token is of. Default: the row number
            (0 for packed tokens, which are one row).
        positions: int64 like input_ids, the position within the sample. Default: the column.
        special_tokens_mask: bool like input_ids, True for a token that must not be selected. special_ids then decides
            only which ids are drawn.
        mlm_probability: the probability that a token is selected.
        mask_replace_prob, random_replace_prob: the probabilities that a selected token becomes [MASK], or a random id;
            together at most 1. The other selected tokens stay.
        word_starts: bool like input_ids, True where a word starts: whole words are selected.
        capacity: length of `index` and `targets`. Default: mean + 6σ of the count for these probabilities, rounded up
            to 128, at most all tokens; all tokens for whole words.
        backend: "auto", "reference", "cpu", "triton", "cuda".

    Returns MaskedTokens(input_ids, labels, index, targets, count). `capacity` does not change input_ids, labels or
    count; if count exceeds it, index lacks the difference.
    Raises ValueError for a wrong shape, dtype, device or range, and for a named backend that cannot run. An id outside
    [0, vocab_size) in input_ids is a ValueError on the CPU. On a device, where the check would stall, it is treated as
    any other token. No host synchronisation.
    """
    _check_ids(input_ids)
    special_ids, left_out = _check_vocabulary(mask_token_id, vocab_size, special_ids)
    _integer("seed", seed, -(2**63), 2**64)
    replace_below = _check_probabilities(mlm_probability, mask_replace_prob, random_replace_prob)
    _check_masks(input_ids, special_tokens_mask=special_tokens_mask, word_starts=word_starts)
    epoch, sample_ids, positions = _check_per_token(input_ids, epoch, sample_ids, positions)
    if capacity is None:
        capacity = default_capacity(input_ids.numel(), mlm_probability, word_starts is not None)
    else:
        _integer("capacity", capacity, 0, 2**63)

    backend = _registry.choose("mlm_mask", backend, input_ids, left_out=left_out)
    input_ids = input_ids.to(torch.int64)
    if backend == "reference":
        _checks.ids_inside("input_ids", input_ids, "vocab_size", vocab_size)
        return mlm_mask_reference(
            input_ids,
            mask_token_id=mask_token_id,
            vocab_size=vocab_size,
            special_ids=special_ids,
            seed=seed,
            epoch=epoch,
            sample_ids=sample_ids,
            positions=positions,
            special_tokens_mask=special_tokens_mask,
            mlm_probability=mlm_probability,
            mask_replace_prob=mask_replace_prob,
            random_replace_prob=random_replace_prob,
            word_starts=word_starts,
            capacity=capacity,
        )
    shape = input_ids.shape
    epochs, epoch = (_per_token(epoch, shape), 0) if isinstance(epoch, torch.Tensor) else (None, epoch)
    args = Args(
        input_ids=input_ids,
        sample_ids=None if sample_ids is None else _per_token(sample_ids, shape),
        positions=positions,
        epochs=epochs,
        epoch=epoch,
        special_tokens_mask=special_tokens_mask,
        word_starts=word_starts,
        special_ids=special_ids,
        left_out=left_out,
        mask_token_id=mask_token_id,
        vocab_size=vocab_size,
        seed=(seed + 2**63) % 2**64 - 2**63,
        select_below=philox.threshold(mlm_probability),
        mask_below=philox.threshold(mask_replace_prob),
        replace_below=replace_below,
        capacity=capacity,
    )
    return MaskedTokens(*_registry.call("mlm_mask", args, backend))
