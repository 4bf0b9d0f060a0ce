"""mlm_mask on CUDA: csrc/cuda/mlm_mask.cu."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm.ops._ranges import ranges, token_limit
from fastlm.ops._shapes import contiguous, number_per_token
from fastlm.ops.mlm_mask import Args, MaskedTokens, empty_outputs

MOST_RANGES = 64  # kMaskRanges of csrc/cuda/mlm_mask.h: they are in the kernel's parameters


def limit(input_ids, left_out=()) -> str | None:
    have = len(ranges(left_out)) // 2
    if have > MOST_RANGES:
        return f"it compares ids with at most {MOST_RANGES} ranges of special ids, and there are {have}"
    return token_limit(input_ids)


def mlm_mask(args: Args) -> MaskedTokens:
    out, ids, module = empty_outputs(args), args.input_ids.contiguous(), _native.cuda()
    shape = rows, cols = (1, *ids.shape)[-2:]
    blocks = -(-ids.numel() // module.MASK_BLOCK)
    module.mlm_mask(
        input_ids=ids,
        sample_ids=number_per_token(args.sample_ids, shape),
        positions=number_per_token(args.positions, shape),
        epochs=number_per_token(args.epochs, shape),
        epoch=args.epoch,
        special_tokens_mask=contiguous(args.special_tokens_mask),
        word_starts=contiguous(args.word_starts),
        special_ids=ranges(args.special_ids),
        left_out=ranges(args.left_out),
        mask_token_id=args.mask_token_id,
        vocab_size=args.vocab_size,
        seed=args.seed,
        select_below=args.select_below,
        mask_below=args.mask_below,
        replace_below=args.replace_below,
        input_ids_out=out.input_ids,
        labels=out.labels,
        index=out.index,
        targets=out.targets,
        count=out.count,
        flags=ids.new_empty(ids.numel(), dtype=torch.uint8),
        counts=ids.new_empty(blocks, dtype=torch.int32),
        last=ids.new_empty(blocks, dtype=torch.int32),
        rows=rows,
        cols=cols,
        capacity=args.capacity,
        place=_native.cuda_place(ids),
    )
    return out
