"""embedding on Triton: kernels/embedding.py."""

from __future__ import annotations

from fastlm.kernels import embedding as kernels
from fastlm.ops import _random
from fastlm.ops._shapes import as_rows, contiguous
from fastlm.ops.embedding import Args, BackwardArgs, Gradients, Lookup, Outputs, empty_backward, empty_forward


def limit(word) -> str | None:
    most = kernels.LONGEST
    return None if word.shape[1] <= most else f"its rows have at most {most} columns, word has {word.shape[1]}"


def _lookups(lookup: Lookup) -> tuple[list, list, int]:
    """(tables, ids, period) as kernels/embedding.py takes them."""
    ids = [None if i is None else i.reshape(-1).contiguous() for i in lookup.ids]
    return [as_rows(table) for table in lookup.tables], ids, lookup.period


def embedding_fwd(args: Args) -> Outputs:
    out = empty_forward(args)
    kernels.embedding_fwd(
        *_lookups(args.lookup),
        contiguous(args.weight),
        contiguous(args.bias),
        out.y.view(-1, out.y.shape[-1]),
        out.mean,
        out.rstd,
        eps=args.eps,
        **_random.row_dropout(args.dropout_p, args.rng, args.site)._asdict(),
    )
    return out


def embedding_bwd(args: BackwardArgs) -> Gradients:
    saved, out = args.saved, empty_backward(args)
    tables = out.dword, out.dposition, out.dtoken_type
    kernels.embedding_bwd(
        as_rows(args.dy),
        *_lookups(saved.lookup),
        contiguous(saved.weight),
        saved.mean,
        saved.rstd,
        [d if want else None for d, want in zip(tables, args.wanted)],
        None if saved.weight is None else out.dweight,
        out.dbias if args.has_bias else None,
        **_random.row_dropout(saved.dropout_p, saved.rng, saved.site)._asdict(),
        padding_idx=saved.padding_idx,
    )
    return out
