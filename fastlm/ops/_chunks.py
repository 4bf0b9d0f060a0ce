"""The raw ops of linear_cross_entropy: torch's matrix products, and a backend's cross_entropy in place.

fastlm/ops/linear_cross_entropy.py explains the chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.ops import _products
from fastlm.ops._losses import Losses, per_row
from fastlm.ops._products import transposed_mm
from fastlm.ops._shapes import as_rows
from fastlm.ops.linear_cross_entropy import Args, BackwardArgs, Gradients, Inputs, Outputs, Wanted

SLICE = 2048  # classes of a product whose result is not the sum itself


def chunk_rows(rows: int, dtype: torch.dtype, device: str) -> int:
    """Rows of a chunk, by the rule in fastlm/ops/linear_cross_entropy.py."""
    if device == "cuda":
        parts = max(1, min(max(4, -(-rows // 4096)), rows // 1024))
        return min(rows, round_up(-(-rows // parts), 128))
    parts = max(2 if dtype == torch.float32 else 4, -(-rows // 512))
    return -(-rows // max(1, min(parts, rows // 256)))


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _add_rows(total, g, first: bool) -> None:
    """total (V,) float32 += Σ g over the rows of g (n, V), or = for the first."""
    if g.is_cpu and g.dtype == torch.bfloat16:
        # Half of the time of a sum; 16 rows are what a product computes at least.
        sums = torch.mm(g.new_ones(16, g.shape[0]), g)[0]
        total.copy_(sums) if first else total.add_(sums)
    elif first:
        torch.sum(g, 0, dtype=torch.float32, out=total)
    else:
        total += g.sum(0, dtype=torch.float32)


def _add_product(total, g, x, first: bool) -> None:
    """total (V, D) float32 += gᵀ x, or = for the first; of another dtype it is of the only chunk."""
    if total.dtype != torch.float32:
        transposed_mm(g, x, out=total)
    elif g.dtype == torch.bfloat16 and not g.is_cuda:
        product = transposed_mm(g, x)
        total.copy_(product) if first else total.add_(product)
    elif g.is_cuda and g.dtype != torch.float32:
        torch.addmm(total, g.t(), x, beta=0.0 if first else 1.0, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, g.float().t(), x.float(), beta=0.0 if first else 1.0, out=total)


def _add_weight_gradient(dweight, dbias, g, x, wanted: Wanted, first: bool) -> None:
    """dweight (V, D) += gᵀ x and dbias (V,) += Σ g for dlogits g (n, V) and hidden x (n, D)."""
    whole = g.is_cuda or g.dtype == torch.float32
    for column in range(0, g.shape[1], g.shape[1] if whole else SLICE):
        columns = slice(column, column + (g.shape[1] if whole else SLICE))
        part = g[:, columns]
        if wanted.dweight:
            _add_product(dweight[columns], part, x, first)
    if wanted.dbias:
        _add_rows(dbias, g, first)


@torch.no_grad()  # products with out=
def _chunks(inputs: Inputs, losses: Losses, dloss, wanted: Wanted, row_bytes: int) -> Gradients:
    """Adds all rows to `losses`; returns the gradients.

    dloss: (rows,) float32 or None. row_bytes: as of raw_ops.
    """
    # Contiguous, since with another leading dimension the BLAS may sum in another order and give other bits.
    hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
    h, w = as_rows(hidden).contiguous(), (weight if inputs.low is None else inputs.low).contiguous()
    rows, vocabulary = h.shape[0], w.shape[0]
    step, classes = chunk_rows(rows, h.dtype, h.device.type), vocabulary
    bfloat16_sum = h.is_cpu and h.dtype == weight.dtype == torch.bfloat16 and wanted.dweight
    if bfloat16_sum and rows <= step + 2 * h.shape[1]:
        step = rows  # one chunk, which takes less memory than a float32 sum (4 bytes an element)
    # cuBLAS has no fast kernel if the bytes of a row of classes are not a multiple of 16. The products then include the
    # padding, whose logits and gradients are 0. The logits are contiguous in either case: only then does torch let
    # cuBLASLt add the bias in the product. Else it copies the bias to all of the logits first, and reads them again.
    if row_bytes and vocabulary * h.element_size() % 16:
        classes = round_up(vocabulary, row_bytes // h.element_size())
        w = F.pad(w, (0, 0, 0, classes - vocabulary))
        bias = None if bias is None else F.pad(bias, (0, classes - vocabulary))
    fused = bias is not None and _products.adds_bias(h)
    buffer = None if fused else h.new_empty(step, classes)
    dhidden = h.new_empty(h.shape if wanted.dhidden else 0)
    dtype = weight.dtype if bfloat16_sum and rows <= step else torch.float32
    dweight = w.new_empty(w.shape if wanted.dweight else 0, dtype=dtype)
    dbias = w.new_empty(classes if wanted.dbias else 0, dtype=torch.float32)
    if rows == 0:
        dweight.zero_()
        dbias.zero_()
    with torch.autocast(h.device.type, enabled=False):  # autocast would make the float32 products bfloat16
        for begin in range(0, rows, max(1, step)):
            chunk = slice(begin, begin + step)
            x = h[chunk]
            g = _products.linear(x, w, bias) if fused else buffer[: x.shape[0]]
            if bias is None:
                torch.mm(x, w.t(), out=g)
            elif not fused:
                torch.addmm(bias, x, w.t(), out=g)
            logits = g[:, :vocabulary]
            losses.add(logits, logits if any(wanted) else None, None if dloss is None else dloss[chunk])
            if wanted.dhidden:
                torch.mm(g, w, out=dhidden[chunk])
            if wanted.dweight or wanted.dbias:
                _add_weight_gradient(dweight, dbias, g, x, wanted, first=begin == 0)
            del g, logits  # else the next chunk is made beside this one
    dweight, dbias = dweight[:vocabulary], dbias[:vocabulary]
    return Gradients(dhidden.view(hidden.shape if wanted.dhidden else 0), dweight.to(weight.dtype), dbias.to(h.dtype))


def raw_ops(losses: type[Losses], row_bytes: int = 0):
    """(forward, backward) of a backend, given its class of Losses.

    row_bytes: a row of logits whose bytes are not a multiple of 16 is padded to a multiple of row_bytes; 0: never.
    """

    def forward(args: Args) -> Outputs:
        chunks = losses(args.inputs.loss, args.inputs.weight.shape[0])
        gradients = _chunks(args.inputs, chunks, None, args.wanted, row_bytes)
        return Outputs(chunks.loss(), *gradients)

    def backward(args: BackwardArgs) -> Gradients:
        chunks = losses(args.inputs.loss._replace(figures=False), args.inputs.weight.shape[0])
        return _chunks(args.inputs, chunks, per_row(args.dloss, chunks.target.numel()), args.wanted, row_bytes)

    return forward, backward
