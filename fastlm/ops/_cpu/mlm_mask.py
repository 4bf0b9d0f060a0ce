"""mlm_mask on a CPU: csrc/cpu/mlm_mask.cpp."""

from __future__ import annotations

from fastlm import _native
from fastlm.ops._shapes import contiguous, number_per_token
from fastlm.ops.mlm_mask import Args, MaskedTokens, empty_outputs


def mlm_mask(args: Args) -> MaskedTokens:
    out, ids = empty_outputs(args), args.input_ids.contiguous()
    shape = rows, cols = (1, *ids.shape)[-2:]
    outside = _native.cpu().mlm_mask(
        input_ids=ids,
        sample_ids=number_per_token(args.sample_ids, shape),
        positions=number_per_token(args.positions, shape),
        epochs=number_per_token(args.epochs, shape),
        epoch=args.epoch,
        special_tokens_mask=contiguous(args.special_tokens_mask),
        word_starts=contiguous(args.word_starts),
        special_ids=args.special_ids,
        left_out=args.left_out,
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
        rows=rows,
        cols=cols,
        capacity=args.capacity,
        threads=_native.threads(),
    )
    if outside >= 0:
        raise ValueError(
            f"input_ids: expected ids in [0, vocab_size = {args.vocab_size}), got {ids.view(-1)[outside].item()} at "
            f"position {outside} of the flattened input"
        )
    return out
