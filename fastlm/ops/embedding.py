"""embedding: word, position and token-type rows, LayerNorm and dropout, in one pass.

    h = word[input_ids] + position[positions] + token_type[token_type_ids]
    y = dropout(LN(h)),   LN(h) = (h - mean(h)) * rstd * weight + bias,   rstd = 1 / sqrt(var(h) + eps)

over the last dimension, statistics in float32. A table that is not given adds nothing; without a weight there is no LN
(GPT-2, T5). Dropout comes after the norm, as in BERT's embeddings; in layer_norm it comes before the norm.

Backward reads the tables again. With x̂ = (h - mean) rstd and g = dropout mask * dy * weight:
    dh = rstd (g - mean(g) - x̂ mean(g x̂));   dweight = Σ mask dy x̂;   dbias = Σ mask dy
    dword[v] = Σ dh over the tokens of id v, in the order of the tokens (0 for padding_idx); the other tables likewise
With `sparse`, dword is not summed: it is a sparse tensor with the rows dh at the ids.
Saved: the ids and the tables, rstd, (tokens,) float32, and mean, (2, tokens), as in layer_norm.

Source: Devlin et al. 2018 (arXiv:1810.04805), figure 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlm.ops import _checks, _random, _registry
from fastlm.ops.layer_norm import normalize

__all__ = ["embedding", "embedding_reference"]


def embedding_reference(
    input_ids,
    word,
    position=None,
    token_type=None,
    *,
    positions=None,
    token_type_ids=None,
    weight=None,
    bias=None,
    eps=1e-12,
    dropout_p=0.0,
    rng=None,
    site=0,
    padding_idx=None,
    sparse=False,
):
    """y in plain differentiable torch, in the dtype of the tables. Arguments as of `embedding`."""
    h = F.embedding(input_ids, word, padding_idx, sparse=sparse)
    if position is not None:
        h = h + (position[: input_ids.shape[-1]] if positions is None else F.embedding(positions, position))
    if token_type is not None:
        h = h + (token_type[0] if token_type_ids is None else F.embedding(token_type_ids, token_type))
    if weight is not None:
        h = normalize(h, weight, bias, eps)
    return _random.dropout_rows(h, dropout_p, rng, site)


# ---- the raw ops. padding_idx is -1 for none.


class Lookup(NamedTuple):
    """The tables, (.., cols), and for each the row that a token takes: ids int64, like input_ids."""

    input_ids: torch.Tensor
    word: torch.Tensor
    position: torch.Tensor | None
    token_type: torch.Tensor | None
    positions: torch.Tensor | None
    token_type_ids: torch.Tensor | None

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.word, self.position, self.token_type

    @property
    def ids(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.input_ids, self.positions, self.token_type_ids

    @property
    def period(self) -> int:
        """Without positions, token t takes row t % period of `position`."""
        return max(1, self.input_ids.shape[-1])


class Args(NamedTuple):
    lookup: Lookup
    weight: torch.Tensor | None  # (cols,)
    bias: torch.Tensor | None  # (cols,)
    eps: float
    dropout_p: float
    rng: torch.Tensor | None
    site: int
    padding_idx: int
    sparse: bool


class Outputs(NamedTuple):
    y: torch.Tensor  # input_ids.shape + (cols,)
    mean: torch.Tensor  # (2, tokens) float32, means and offsets; empty without a norm
    rstd: torch.Tensor  # (tokens,) float32; empty without a norm


class Saved(NamedTuple):
    lookup: Lookup
    weight: torch.Tensor | None
    mean: torch.Tensor
    rstd: torch.Tensor
    dropout_p: float
    rng: torch.Tensor | None
    site: int
    padding_idx: int
    sparse: bool


class Wanted(NamedTuple):
    """Which gradients of the tables are needed; the others are empty."""

    dword: bool
    dposition: bool
    dtoken_type: bool


class BackwardArgs(NamedTuple):
    dy: torch.Tensor  # like y
    saved: Saved
    wanted: Wanted
    has_bias: bool


class Gradients(NamedTuple):
    dword: torch.Tensor  # like word; sparse: (tokens, cols), a row for each token, 0 for padding_idx's
    dposition: torch.Tensor
    dtoken_type: torch.Tensor
    dweight: torch.Tensor  # empty without a weight
    dbias: torch.Tensor  # (cols,) float32; empty without a bias


def empty_forward(args: Args) -> Outputs:
    ids, word = args.lookup.input_ids, args.lookup.word
    tokens = ids.numel()
    return Outputs(
        y=word.new_empty((*ids.shape, word.shape[1])),
        mean=word.new_empty(0 if args.weight is None else (2, tokens), dtype=torch.float32),
        rstd=word.new_empty(0 if args.weight is None else tokens, dtype=torch.float32),
    )


def empty_backward(args: BackwardArgs) -> Gradients:
    lookup, weight, wanted = args.saved.lookup, args.saved.weight, args.wanted
    word, cols = lookup.word, lookup.word.shape[1]
    dword, dposition, dtoken_type = (
        torch.empty_like(table, memory_format=torch.contiguous_format) if want else word.new_empty(0)
        for table, want in zip(lookup.tables, wanted)
    )
    return Gradients(
        dword=word.new_empty(lookup.input_ids.numel(), cols) if args.saved.sparse and wanted.dword else dword,
        dposition=dposition,
        dtoken_type=dtoken_type,
        dweight=word.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        dbias=word.new_empty(cols if args.has_bias else 0, dtype=torch.float32),
    )


def _save(args: Args, outputs) -> Saved:
    lookup, weight, _bias, _eps, *rest = args
    _y, mean, rstd = outputs
    return Saved(lookup, weight, mean, rstd, *rest)


def _backward(saved: Saved, needs: Args, backend, dy, _dmean, _drstd):
    wanted = Wanted(*needs.lookup.tables)
    args = BackwardArgs(dy, saved, wanted, has_bias=needs.bias)
    dword, dposition, dtoken_type, dweight, dbias = _registry.call("embedding_bwd", args, backend)
    if saved.sparse and wanted.dword:
        ids, shape = saved.lookup.input_ids.reshape(1, -1), saved.lookup.word.shape
        dword = torch.sparse_coo_tensor(ids, dword, shape, check_invariants=False)
    return {
        "word": dword if wanted.dword else None,
        "position": dposition if wanted.dposition else None,
        "token_type": dtoken_type if wanted.dtoken_type else None,
        "weight": dweight if needs.weight else None,
        "bias": dbias if needs.bias else None,  # autograd casts it to bias's dtype
    }


_registry.page(__name__, "embedding")
_registry.define("embedding_fwd", Args, empty_forward)
_registry.define("embedding_bwd", BackwardArgs, empty_backward)
_registry.differentiable("embedding_fwd", _save, _backward, constant=("mean", "rstd"))


def check_ids(lookup: Lookup) -> None:
    """ValueError for an id outside its table, if checking needs no synchronisation."""
    names = ("input_ids", "word"), ("positions", "position"), ("token_type_ids", "token_type")
    for (name, table_name), ids, table in zip(names, lookup.ids, lookup.tables):
        if ids is not None:
            _checks.ids_inside(name, ids, f"rows of {table_name}", table.shape[0])


# ---- public


def _with_int64(lookup: Lookup) -> Lookup:
    ids = (lookup.input_ids, lookup.positions, lookup.token_type_ids)
    if all(i is None or i.dtype == torch.int64 for i in ids):
        return lookup
    input_ids, positions, token_type_ids = (None if i is None else i.to(torch.int64) for i in ids)
    return lookup._replace(input_ids=input_ids, positions=positions, token_type_ids=token_type_ids)


def _check_lookup(lookup: Lookup) -> None:
    input_ids, word, position, token_type, positions, token_type_ids = lookup
    _checks.is_tensor("input_ids", input_ids, dtypes=(torch.int64, torch.int32))
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids: expected (B, S) rows or (T,) packed tokens, got shape {tuple(input_ids.shape)}")
    _checks.is_float("word", word, device=input_ids.device, shape=(None, None))
    cols = word.shape[1]
    if cols == 0:
        raise ValueError(f"word: expected (vocabulary, cols) with cols > 0, got shape {tuple(word.shape)}")
    tables = (
        ("position", position, positions, "positions"),
        ("token_type", token_type, token_type_ids, "token_type_ids"),
    )
    for name, table, ids, ids_name in tables:
        if table is not None:
            _checks.is_float(name, table, device=word.device, shape=(None, cols))
        if ids is not None:
            if table is None:
                raise ValueError(f"{ids_name}: given without its table; give `{name}` too, or leave both out")
            _checks.is_tensor(
                ids_name, ids, device=word.device, dtypes=(torch.int64, torch.int32), shape=input_ids.shape
            )
    if position is not None and positions is None:
        if input_ids.dim() == 1:
            raise ValueError("positions: expected like input_ids for packed tokens, (T,), got None")
        if input_ids.shape[1] > position.shape[0]:
            raise ValueError(
                f"position: expected at least {input_ids.shape[1]} rows for input_ids of shape "
                f"{tuple(input_ids.shape)}, got {position.shape[0]}"
            )
    if token_type is not None and token_type.shape[0] == 0:
        raise ValueError("token_type: expected at least one row, got none")


def embedding(
    input_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor | None = None,
    token_type: torch.Tensor | None = None,
    *,
    positions: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    rng: torch.Tensor | None = None,
    site: int = 0,
    padding_idx: int | None = None,
    sparse: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """y = dropout(LN(word[input_ids] + position[positions] + token_type[token_type_ids])).

    Args:
        input_ids: (B, S) rows or (T,) packed tokens, int64 or int32.
        word: (vocabulary, cols), floating point.
        position: (places, cols), or None for no position rows.
        token_type: (types, cols), or None for no type rows.
        positions: like input_ids. Default: the column for (B, S); required for packed tokens.
        token_type_ids: like input_ids. Default: 0 for every token.
        weight, bias: (cols,), the norm's parameters; any floating-point dtype. weight None: no norm.
        eps: added to the variance.
        dropout_p: probability of dropping an element of y; the kept ones are scaled by 1/(1-p).
        rng: int64 (2,), (seed, step), on the device; None draws from torch's generator. See fastlm.ops._random.
        site: number of this call site; it makes the dropouts of one step differ.
        padding_idx: the id whose row of `word` gets no gradient, as in F.embedding; negative counts from the end.
        sparse: the gradient of `word` is a sparse COO tensor, as in F.embedding: uncoalesced, with a row for each
            token. The rows of padding_idx are zero or left out. Not on backend "triton".
        backend: "auto", "reference", "cpu", "triton".

    Returns y, input_ids.shape + (cols,), in the tables' dtype (the promoted one where they differ).
    The gradients of the tables are dense except with `sparse`. They have the same bits in every run and for any number
    of threads. Raises ValueError for a wrong shape, dtype or device, and for a named backend that cannot run. An id
    outside its table is a ValueError on the CPU. On a device the check would stall: there such a token's y is NaN on
    backend "triton" (but for elements that dropout makes 0), and the reference does as F.embedding.
    """
    lookup = Lookup(input_ids, word, position, token_type, positions, token_type_ids)
    _check_lookup(lookup)
    cols = word.shape[1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _checks.is_float(name, parameter, device=word.device, shape=(cols,))
    if bias is not None and weight is None:
        raise ValueError("bias: given without a weight, and without a weight there is no norm; give both or neither")
    _checks.probability("dropout_p", dropout_p)
    _checks.is_rng(rng, site, word.device)
    if padding_idx is not None:
        if not -word.shape[0] <= padding_idx < word.shape[0]:
            raise ValueError(f"padding_idx: expected an id of the {word.shape[0]} rows of word, got {padding_idx}")
        padding_idx %= word.shape[0]

    dtype = word.dtype
    for table in (position, token_type):
        dtype = dtype if table is None else torch.promote_types(dtype, table.dtype)
    tables = (word, position, token_type)  # Dynamo of torch 2.10 reads no property of a NamedTuple
    if any(table is not None and table.dtype != dtype for table in tables):
        word, position, token_type = (None if t is None else t.to(dtype) for t in (word, position, token_type))
        lookup = lookup._replace(word=word, position=position, token_type=token_type)
    backend = _registry.choose("embedding", backend, word)
    if sparse and backend == "triton":
        raise ValueError("sparse: expected False for backend triton, whose gradients are dense, got True")
    rng = _random.draw_rng(rng, dropout_p, word.device)
    if backend == "reference":
        check_ids(lookup)
        return embedding_reference(
            input_ids,
            word,
            position,
            token_type,
            positions=positions,
            token_type_ids=token_type_ids,
            weight=weight,
            bias=bias,
            eps=eps,
            dropout_p=dropout_p,
            rng=rng,
            site=site,
            padding_idx=padding_idx,
            sparse=sparse,
        )
    args = Args(
        lookup=_with_int64(lookup),
        weight=weight,
        bias=bias,
        eps=eps,
        dropout_p=dropout_p,
        rng=rng,
        site=site,
        padding_idx=-1 if padding_idx is None else padding_idx,
        sparse=sparse,
    )
    return _registry.call("embedding_fwd", args, backend)[0]
