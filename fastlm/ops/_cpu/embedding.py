"""embedding on a CPU: csrc/cpu/embedding.cpp."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm.ops import _random
from fastlm.ops._shapes import as_float, as_rows, contiguous
from fastlm.ops.embedding import (
    Args,
    BackwardArgs,
    Gradients,
    Lookup,
    Outputs,
    check_ids,
    empty_backward,
    empty_forward,
)


def _lookups(lookup: Lookup) -> list[tuple]:
    """(table, ids, stride, period) of each table, csrc/cpu/embedding.h's Lookup."""
    # The period is used for the positions and types that are not given.
    each = zip(lookup.tables, lookup.ids, (1, lookup.period, 1))
    return [None if table is None else _row(as_rows(table), ids, period) for table, ids, period in each]


def _row(table: torch.Tensor, ids: torch.Tensor | None, period: int) -> tuple:
    return table, contiguous(ids), table.stride(0), period


def embedding_fwd(args: Args) -> Outputs:
    check_ids(args.lookup)
    out, word = empty_forward(args), args.lookup.word
    _native.cpu().embedding_fwd(
        lookup=_lookups(args.lookup),
        weight=as_float(args.weight),
        bias=as_float(args.bias),
        y=out.y,
        mean=out.mean,
        rstd=out.rstd,
        tokens=args.lookup.input_ids.numel(),
        cols=word.shape[1],
        eps=args.eps,
        dropout=_random.row_dropout(args.dropout_p, args.rng, args.site),
        dtype=_native.DTYPE_CODES[word.dtype],
        threads=_native.threads(),
    )
    return out


def _used_rows(lookup: Lookup) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(the rows of a 16-bit word table that some token takes, the index into these of each token).

    None where the whole gradient is summed in float32: where it has that dtype, or too few rows for the tokens. To sort
    30000 ids takes longer than the sums of 30522 rows of 768 save (LOG.md, 2026-11-30).
    """
    word, ids = lookup.word, lookup.input_ids
    if word.dtype == torch.float32 or 2 * word.shape[0] <= 3 * ids.numel():
        return None
    return torch.unique(ids, return_inverse=True)


def embedding_bwd(args: BackwardArgs) -> Gradients:
    """The kernel adds to float32 gradients. `dh` has the gradient of each token, which is word's if `sparse`."""
    saved, lookup, wanted, out = args.saved, args.saved.lookup, args.wanted, empty_backward(args)
    word, tokens, cols, dy = lookup.word, lookup.input_ids.numel(), lookup.word.shape[1], as_rows(args.dy)
    summed = wanted.dword and not saved.sparse, wanted.dposition, wanted.dtoken_type
    # A gradient of all rows in float32, to be rounded at the end, was two thirds of the time (LOG.md, 2026-11-30).
    used = _used_rows(lookup) if summed[0] else None
    rows = [None if table is None else table.shape[0] for table in lookup.tables]
    skipped, of_rows = [saved.padding_idx, -1, -1], [None, None, None]
    if used is not None:
        rows[0], skipped[0], of_rows[0] = len(used[0]), -1, used[1]
    gradients = [word.new_zeros(n, cols, dtype=torch.float32) if want else None for n, want in zip(rows, summed)]
    dweight = None if saved.weight is None else word.new_empty(cols, dtype=torch.float32)
    dh = word.new_empty(tokens, cols, dtype=torch.float32)
    _native.cpu().embedding_bwd(
        lookup=_lookups(lookup),
        dy=dy,
        weight=as_float(saved.weight),
        mean=saved.mean,
        rstd=saved.rstd,
        dweight=dweight,
        dbias=out.dbias if args.has_bias else None,
        dh=dh,
        partial=word.new_empty(2 * _native.cpu().row_blocks(tokens) * cols, dtype=torch.float32),
        gradient=[
            None if g is None else (g, g.shape[0], skip, ids) for g, skip, ids in zip(gradients, skipped, of_rows)
        ],
        tokens=tokens,
        cols=cols,
        stride_dy=dy.stride(0),
        dropout=_random.row_dropout(saved.dropout_p, saved.rng, saved.site),
        dtype=_native.DTYPE_CODES[word.dtype],
        threads=_native.threads(),
    )
    if saved.sparse and wanted.dword:
        padding = lookup.input_ids.reshape(-1, 1) == saved.padding_idx
        gradients[0] = dh if saved.padding_idx < 0 else dh.masked_fill_(padding, 0.0)
    elif used is not None:
        gradients[0] = word.new_zeros(word.shape).index_copy_(0, used[0], gradients[0].to(word.dtype))
        if saved.padding_idx >= 0:
            gradients[0][saved.padding_idx] = 0.0
    dword, dposition, dtoken_type = (word.new_empty(0) if g is None else g.to(word.dtype) for g in gradients)
    dweight = word.new_empty(0) if dweight is None else dweight.to(saved.weight.dtype)
    return Gradients(dword, dposition, dtoken_type, dweight, out.dbias)
