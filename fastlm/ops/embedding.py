"""embedding: word, position and token-type rows, LayerNorm and dropout, in one pass.

    h = word[input_ids] + position[positions] + token_type[token_type_ids]
    y = dropout(LN(h)),   LN(h) = (h - mean(h)) * rstd * weight + bias,   rstd = 1 / sqrt(var(h) + eps)

over the last dimension, statistics in float32. What is not given is left out: the position or type row, and LN where
there is no weight (GPT-2, T5). Dropout comes last, as in BERT: after the norm, where layer_norm's comes before it.

Backward reads the tables again; with x̂ = (h - mean) rstd and g = dropout mask * dy * weight:
    dh = rstd (g - mean(g) - x̂ mean(g x̂));   dweight = Σ mask dy x̂;   dbias = Σ mask dy
    dword[v] = Σ dh over the tokens of id v, in the order of the tokens (0 for padding_idx); the other tables likewise
With `sparse` dword is not summed: dh are its rows, the ids their places.
Saved: the ids and the tables, mean and rstd, (tokens,) float32.

Source: Devlin et al. 2018 (arXiv:1810.04805), figure 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import _native, philox
from fastlm.ops import _checks, _random, _registry
from fastlm.ops._shapes import as_rows, contiguous


def embedding_reference(
    input_ids, word, position=None, token_type=None, *, positions=None, token_type_ids=None, weight=None, bias=None,
    eps=1e-12, dropout_p=0.0, rng=None, site=0, padding_idx=None, sparse=False,
):  # fmt: skip
    """y in plain differentiable torch, in the dtype of the tables. Arguments as of `embedding`."""
    h = F.embedding(input_ids, word, padding_idx, sparse=sparse)
    if position is not None:
        h = h + (position[: input_ids.shape[-1]] if positions is None else F.embedding(positions, position))
    if token_type is not None:
        h = h + (token_type[0] if token_type_ids is None else F.embedding(token_type_ids, token_type))
    if weight is not None:
        h = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return _random.dropout_rows(h, dropout_p, rng, site)


# ---- the raw ops: tables (.., cols); ids int64, all of one shape; padding_idx -1 for none. `wanted`: which tables'
# gradients; the others are empty. sparse: dword is (tokens, cols), a row for each token, 0 for padding_idx's.


def _fake_fwd(
    input_ids, word, position, token_type, positions, token_type_ids, weight, bias, eps, dropout_p, rng, site,
    padding_idx, sparse, backend,
):  # fmt: skip
    rows = 0 if weight is None else input_ids.numel()
    mean = word.new_empty(rows, dtype=torch.float32)
    return word.new_empty((*input_ids.shape, word.shape[1])), mean, torch.empty_like(mean)


def _fake_bwd(
    dy, input_ids, word, position, token_type, positions, token_type_ids, weight, mean, rstd, dropout_p, rng, site,
    padding_idx, has_bias, wanted, sparse, backend,
):  # fmt: skip
    dword, *others = (
        torch.empty_like(table, memory_format=torch.contiguous_format) if want else word.new_empty(0)
        for table, want in zip((word, position, token_type), wanted)
    )
    return (
        word.new_empty(input_ids.numel(), word.shape[1]) if sparse and wanted[0] else dword,
        *others,
        word.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        word.new_empty(word.shape[1] if has_bias else 0, dtype=torch.float32),
    )


_registry.define(
    "embedding_fwd(Tensor input_ids, Tensor word, Tensor? position, Tensor? token_type, Tensor? positions, "
    "Tensor? token_type_ids, Tensor? weight, Tensor? bias, float eps, float dropout_p, Tensor? rng, int site, "
    "int padding_idx, bool sparse, str backend) -> (Tensor y, Tensor mean, Tensor rstd)",
    _fake_fwd,
)
_registry.define(
    "embedding_bwd(Tensor dy, Tensor input_ids, Tensor word, Tensor? position, Tensor? token_type, Tensor? positions, "
    "Tensor? token_type_ids, Tensor? weight, Tensor mean, Tensor rstd, float dropout_p, Tensor? rng, int site, "
    "int padding_idx, bool has_bias, bool[] wanted, bool sparse, str backend) "
    "-> (Tensor dword, Tensor dposition, Tensor dtoken_type, Tensor dweight, Tensor dbias)",
    _fake_bwd,
)


def _setup_context(ctx, args, outputs):
    *tensors, bias, _eps, dropout_p, rng, site, padding_idx, sparse, backend = args
    _y, mean, rstd = outputs
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tensors, mean, rstd, rng)
    ctx.rest = dropout_p, site, padding_idx, bias is not None and bias.dtype, sparse, backend


def _backward(ctx, dy, _dmean, _drstd):
    *tensors, mean, rstd, rng = ctx.saved_tensors
    dropout_p, site, padding_idx, bias_dtype, sparse, backend = ctx.rest
    wanted = [bool(want) for want in ctx.needs_input_grad[2:5]]
    dword, dposition, dtoken_type, dweight, dbias = _registry.call(
        "embedding_bwd", dy, *tensors, mean, rstd, dropout_p, rng, site, padding_idx, bool(bias_dtype), wanted,
        sparse, backend,
    )  # fmt: skip
    if sparse and wanted[0]:
        ids, word = tensors[:2]
        dword = torch.sparse_coo_tensor(ids.view(1, -1), dword, word.shape, check_invariants=False)
    return (
        None,
        *(d if want else None for d, want in zip((dword, dposition, dtoken_type), wanted)),
        None,
        None,
        None if tensors[-1] is None else dweight,
        dbias.to(bias_dtype) if bias_dtype else None,
        *(None,) * 7,
    )


_registry.differentiable("embedding_fwd", _setup_context, _backward)


# ---- CPU C++: csrc/cpu/embedding.cpp


def _float(weight):
    return None if weight is None else weight.float().contiguous()


def _lookups(input_ids, word, position, token_type, positions, token_type_ids):
    """Tables, ids, strides, periods, as csrc/cpu/embedding.h's Lookup has them; and the tensors, to keep them alive."""
    tables = [None if table is None else as_rows(table) for table in (word, position, token_type)]
    ids = [None if i is None else i.contiguous() for i in (input_ids, positions, token_type_ids)]
    strides = [0 if table is None else table.stride(0) for table in tables]
    periods = [1, max(1, input_ids.shape[-1]), 1]  # of the default positions and types
    at = _native.address
    return ([at(t) for t in tables], [at(i) for i in ids], strides, periods), (tables, ids)


def _check_ids(input_ids, word, position, token_type, positions, token_type_ids):
    for name, ids, table_name, table in (
        ("input_ids", input_ids, "word", word),
        ("positions", positions, "position", position),
        ("token_type_ids", token_type_ids, "token_type", token_type),
    ):
        if ids is not None:
            _checks.ids_inside(name, ids, f"rows of {table_name}", table.shape[0])


@_registry.implement("embedding_fwd", "cpu")
def _fwd_cpu(
    input_ids, word, position, token_type, positions, token_type_ids, weight, bias, eps, dropout_p, rng, site,
    padding_idx, sparse,
):  # fmt: skip
    _check_ids(input_ids, word, position, token_type, positions, token_type_ids)
    y, mean, rstd = _fake_fwd(
        input_ids, word, position, token_type, positions, token_type_ids, weight, bias, eps, dropout_p, rng, site,
        padding_idx, sparse, "cpu",
    )  # fmt: skip
    lookups, _alive = _lookups(input_ids, word, position, token_type, positions, token_type_ids)
    weight, bias = _float(weight), _float(bias)
    at = _native.address
    _native.cpu().embedding_fwd(
        *lookups, at(weight), at(bias), at(y), at(mean), at(rstd), input_ids.numel(), word.shape[1], eps,
        philox.threshold(dropout_p), _random.row_scale(dropout_p), at(rng), site,
        _native.DTYPE_CODES[word.dtype], _native.threads(),
    )  # fmt: skip
    return y, mean, rstd


@_registry.implement("embedding_bwd", "cpu")
def _bwd_cpu(
    dy, input_ids, word, position, token_type, positions, token_type_ids, weight, mean, rstd, dropout_p, rng, site,
    padding_idx, has_bias, wanted, sparse,
):  # fmt: skip
    lookups, _alive = _lookups(input_ids, word, position, token_type, positions, token_type_ids)
    tokens, cols, dy2, weight32 = input_ids.numel(), word.shape[1], as_rows(dy), _float(weight)
    float32 = {"dtype": torch.float32}
    gradients = [
        table.new_zeros(table.shape, **float32) if want else None
        for table, want in zip((word, position, token_type), (wanted[0] and not sparse, *wanted[1:]))
    ]
    dweight = None if weight is None else word.new_empty(cols, **float32)
    dbias = word.new_empty(cols if has_bias else 0, **float32)
    dh = word.new_empty(tokens, cols, **float32)
    partial = word.new_empty(2 * _native.cpu().row_blocks(tokens) * cols, **float32)
    at = _native.address
    _native.cpu().embedding_bwd(
        *lookups, at(dy2), at(weight32), at(mean), at(rstd), at(dweight), at(dbias) if has_bias else 0, at(dh),
        at(partial), [at(g) for g in gradients], [0 if g is None else g.shape[0] for g in gradients],
        [padding_idx, -1, -1], tokens, cols, dy2.stride(0),
        philox.threshold(dropout_p), _random.row_scale(dropout_p), at(rng), site,
        _native.DTYPE_CODES[word.dtype], _native.threads(),
    )  # fmt: skip
    if sparse and wanted[0]:
        gradients[0] = dh if padding_idx < 0 else dh.masked_fill_(input_ids.view(-1, 1) == padding_idx, 0.0)
    return (
        *(word.new_empty(0) if g is None else g.to(word.dtype) for g in gradients),
        word.new_empty(0) if weight is None else dweight.to(weight.dtype),
        dbias,
    )


_registry.offer("embedding", "cpu")


# ---- Triton: kernels/embedding.py


@_registry.limit("embedding", "triton")
def _triton_limit(word):
    return None if word.shape[1] <= 8192 else f"its rows have at most 8192 columns, word has {word.shape[1]}"


@_registry.implement("embedding_fwd", "triton")
def _fwd_triton(
    input_ids, word, position, token_type, positions, token_type_ids, weight, bias, eps, dropout_p, rng, site,
    padding_idx, sparse,
):  # fmt: skip
    from fastlm.kernels import embedding as kernels

    y, mean, rstd = _fake_fwd(
        input_ids, word, position, token_type, positions, token_type_ids, weight, bias, eps, dropout_p, rng, site,
        padding_idx, sparse, "triton",
    )  # fmt: skip
    kernels.embedding_fwd(
        *_triton_lookups(input_ids, word, position, token_type, positions, token_type_ids),
        contiguous(weight), contiguous(bias), y.view(-1, word.shape[1]), mean, rstd, eps=eps,
        threshold=philox.threshold(dropout_p), scale=_random.row_scale(dropout_p), rng=rng, site=site,
    )  # fmt: skip
    return y, mean, rstd


@_registry.implement("embedding_bwd", "triton")
def _bwd_triton(
    dy, input_ids, word, position, token_type, positions, token_type_ids, weight, mean, rstd, dropout_p, rng, site,
    padding_idx, has_bias, wanted, sparse,
):  # fmt: skip
    from fastlm.kernels import embedding as kernels

    *gradients, dweight, dbias = out = _fake_bwd(
        dy, input_ids, word, position, token_type, positions, token_type_ids, weight, mean, rstd, dropout_p, rng,
        site, padding_idx, has_bias, wanted, sparse, "triton",
    )  # fmt: skip
    kernels.embedding_bwd(
        as_rows(dy), *_triton_lookups(input_ids, word, position, token_type, positions, token_type_ids),
        contiguous(weight), mean, rstd, [d if want else None for d, want in zip(gradients, wanted)],
        None if weight is None else dweight, dbias if has_bias else None, threshold=philox.threshold(dropout_p),
        scale=_random.row_scale(dropout_p), rng=rng, site=site, padding_idx=padding_idx,
    )  # fmt: skip
    return out


def _triton_lookups(input_ids, word, position, token_type, positions, token_type_ids):
    """(tables, ids, period) as kernels/embedding.py takes them."""
    tables = [None if table is None else as_rows(table) for table in (word, position, token_type)]
    ids = [None if i is None else i.reshape(-1).contiguous() for i in (input_ids, positions, token_type_ids)]
    return tables, ids, max(1, input_ids.shape[-1])


# ---- public


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
        positions: like input_ids. Default: the column for (B, S); for packed tokens they have to be given.
        token_type_ids: like input_ids. Default: 0 for every token.
        weight, bias: (cols,), the norm's parameters; any floating-point dtype. weight None: no norm.
        eps: added to the variance.
        dropout_p: probability of dropping an element of y; the kept ones are scaled by 1/(1-p).
        rng: int64 (2,), (seed, step), on the device; None draws from torch's generator. See fastlm.ops._random.
        site: number of this call site, so that two dropouts of one step differ.
        padding_idx: the id whose row of `word` gets no gradient, as in F.embedding; negative counts from the end.
        sparse: the gradient of `word` is a sparse COO tensor, as F.embedding's: uncoalesced, a row for each token,
            those of padding_idx zeros or left out. Not on backend "triton".
        backend: "auto", "reference", "cpu", "triton".

    Returns y, input_ids.shape + (cols,), in the tables' dtype (the promoted one where they differ).
    The tables' gradients are dense but for `sparse`, and the same bits from run to run and for any number of threads.
    Raises ValueError for a wrong shape, dtype or device, and for a named backend that cannot run. An id outside its
    table is a ValueError on the CPU; on a device, where looking would stall, it is undefined, as in F.embedding.
    """
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
    word = word.to(dtype)
    position = None if position is None else position.to(dtype)
    token_type = None if token_type is None else token_type.to(dtype)
    backend = _registry.choose("embedding", backend, word)
    if sparse and backend == "triton":
        raise ValueError("sparse: expected False for backend triton, whose gradients are dense, got True")
    rng = _random.draw_rng(rng, dropout_p, word.device)
    if backend == "reference":
        _check_ids(input_ids, word, position, token_type, positions, token_type_ids)
        return embedding_reference(
            input_ids, word, position, token_type, positions=positions, token_type_ids=token_type_ids, weight=weight,
            bias=bias, eps=eps, dropout_p=dropout_p, rng=rng, site=site, padding_idx=padding_idx, sparse=sparse,
        )  # fmt: skip
    input_ids, positions, token_type_ids = (
        None if ids is None else ids.to(torch.int64) for ids in (input_ids, positions, token_type_ids)
    )
    return _registry.call(
        "embedding_fwd", input_ids, word, position, token_type, positions, token_type_ids, weight, bias, eps, dropout_p,
        rng, site, -1 if padding_idx is None else padding_idx, sparse, backend,
    )[0]  # fmt: skip
