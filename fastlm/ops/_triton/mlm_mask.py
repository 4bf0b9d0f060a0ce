"""mlm_mask on Triton: kernels/mlm_mask.py."""

from __future__ import annotations

from fastlm.kernels import mlm_mask as kernels
from fastlm.ops._ranges import ranges, token_limit
from fastlm.ops.mlm_mask import Args, MaskedTokens, empty_outputs


def limit(input_ids, left_out=()) -> str | None:
    return token_limit(input_ids)


def mlm_mask(args: Args) -> MaskedTokens:
    out, ids = empty_outputs(args), args.input_ids
    shape = (1, *ids.shape)[-2:]
    ids, special_tokens_mask, word_starts = (
        None if value is None else value.contiguous().view(shape)
        for value in (ids, args.special_tokens_mask, args.word_starts)
    )
    sample_ids, positions, epochs = (
        None if value is None else value.expand(shape) for value in (args.sample_ids, args.positions, args.epochs)
    )
    kernels.mlm_mask(
        ids,
        sample_ids,
        positions,
        epochs,
        args.epoch,
        special_tokens_mask,
        word_starts,
        *out,
        special=ranges(args.special_ids),
        left_out=ranges(args.left_out),
        choices=args.vocab_size - len(args.left_out),
        mask_token_id=args.mask_token_id,
        seed=args.seed,
        select_below=args.select_below,
        mask_below=args.mask_below,
        replace_below=args.replace_below,
    )
    return out
