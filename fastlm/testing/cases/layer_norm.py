"""layer_norm and rms_norm."""

import dataclasses

import torch

from fastlm import ops
from fastlm.testing.cases._case import OpCase, Variant, draw_rng


def _make_norm(generator, rows, cols, weight=1, bias=1, residual=0, offset=0, x_bias=0):
    """x_bias: 1: given. offset: the mean of each row of h; the standard deviation is 1e-5 of it, so the rounding of the
    mean matters."""

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, kept = randn(rows, cols) * 2 + 0.5, randn(rows, cols) if residual else None
    if offset:
        x *= offset * 1e-5
        if residual:
            kept += offset
        else:
            x += offset
    return {
        "x": x,
        "weight": randn(cols) if weight else None,
        **({"bias": randn(cols)} if bias else {}),
        **({"x_bias": randn(cols)} if x_bias else {}),
        "residual": kept,
        "rng": draw_rng(generator),
    }


def _norm_bytes(shape, options, itemsize, backward):
    elements, extra = shape["rows"] * shape["cols"], shape.get("residual", 0)
    if not backward:  # x, residual in; y, h out
        return itemsize * elements * (2 + 2 * extra)
    dropped = options.get("dropout_p", 0.0) > 0.0
    return itemsize * elements * (3 + extra + dropped)  # dy, h (and dh) in; dresidual (and dx) out


_NORM_TESTS = (
    Variant({"rows": 5, "cols": 33}),
    Variant({"rows": 0, "cols": 8, "x_bias": 1}),
    Variant({"rows": 3, "cols": 1}),
    Variant({"rows": 70, "cols": 768, "residual": 1, "x_bias": 1}, float32=("weight", "bias")),
    Variant({"rows": 9, "cols": 50, "residual": 1, "x_bias": 1}, {"dropout_p": 0.1, "site": 7}),
    Variant({"rows": 4, "cols": 5}, {"dropout_p": 1.0}),
    Variant({"rows": 2, "cols": 4099, "weight": 0, "bias": 0, "x_bias": 1}, {"eps": 1e-12}),
    Variant(
        {"rows": 3, "cols": 16411, "residual": 1, "x_bias": 1}, {"dropout_p": 0.1}
    ),  # longer than a GPU's registers hold
    Variant({"rows": 3, "cols": 16411, "offset": 1000}),
    Variant({"rows": 70, "cols": 768, "offset": 1000}),
    Variant({"rows": 9, "cols": 50, "residual": 1, "offset": -100}, {"dropout_p": 0.1, "site": 7}),
    Variant({"rows": 5, "cols": 16, "offset": 100}),
)
_NORM_BENCHMARKS = tuple(
    Variant({"rows": rows, "cols": cols, "residual": residual}, {"dropout_p": p} if p else {})
    for rows, cols in ((8192, 768), (8192, 1024), (4096, 4096))
    for residual, p in ((0, 0.0), (1, 0.0), (1, 0.1))
)
# T5-small, BERT-base and GPT-2 (whose norms take no dropout), BERT-large, and decoders.
_NORM_CUDA = tuple(
    Variant({"rows": 32768, "cols": cols, "residual": residual}, {"dropout_p": p} if p else {})
    for cols, residual, p in (
        (768, 1, 0.1),
        (768, 0, 0.0),
        (1024, 1, 0.1),
        (512, 1, 0.1),
        (4096, 1, 0.0),
        (8192, 1, 0.0),
    )
)
_NORM_PRODUCTION = (
    *(
        Variant({"rows": 16, "cols": cols, "residual": residual}, {"dropout_p": p} if p else {}, ("weight", "bias"))
        for cols, residual, p in (
            (256, 1, 0.1),
            (512, 1, 0.1),
            (768, 0, 0.0),
            (768, 1, 0.1),
            (1024, 0, 0.0),
            (1024, 1, 0.1),
            (4096, 1, 0.0),
            (8192, 1, 0.0),
            (16384, 1, 0.0),
        )
    ),
    Variant({"rows": 16, "cols": 768, "residual": 1, "x_bias": 1}, {"dropout_p": 0.1}, ("weight", "bias")),  # BERT
)


def _without_bias(variants):
    shapes = ({name: n for name, n in v.shape.items() if name != "x_bias"} for v in variants)
    return tuple(dataclasses.replace(v, shape={**shape, "bias": 0}) for v, shape in zip(variants, shapes))


def _return_residual(function):
    def call(*, backend, **arguments):
        return function(**arguments, return_residual=True, backend=backend)

    return call


_X, _ROW, _RNG = torch.ones(4, 8), torch.ones(8), torch.zeros(2, dtype=torch.int64)

LAYER_NORM = OpCase(
    op="layer_norm",
    function=_return_residual(ops.layer_norm),
    reference=ops.layer_norm_reference,
    make=_make_norm,
    gradients=("x", "weight", "bias", "residual", "x_bias"),
    tests=_NORM_TESTS,
    benchmarks=_NORM_BENCHMARKS,
    benchmarks_cuda=_NORM_CUDA,
    production=_NORM_PRODUCTION,
    bytes=_norm_bytes,
    gradcheck=(Variant({"rows": 3, "cols": 6, "residual": 1}, {"dropout_p": 0.3}),),
    accepted={"x": _X, "weight": _ROW, "bias": _ROW},
    refused=(
        ({"x": _X.int()}, "x: expected a floating-point tensor, got torch.int32"),
        ({"weight": _ROW[:7]}, "weight: expected shape (8,), got (7,)"),
        ({"bias": _ROW.int()}, "bias: expected a floating-point tensor"),
        ({"residual": _X[:3]}, "residual: expected shape (4, 8), got (3, 8)"),
        ({"x_bias": _ROW[:7]}, "x_bias: expected shape (8,), got (7,)"),
        ({"dropout_p": 1.5}, "dropout_p: expected a probability in [0, 1], got 1.5"),
        ({"dropout_p": 0.5, "rng": _RNG[:1]}, "rng: expected shape (2,), got (1,)"),
    ),
)
RMS_NORM = dataclasses.replace(
    LAYER_NORM,
    op="rms_norm",
    function=_return_residual(ops.rms_norm),
    reference=ops.rms_norm_reference,
    gradients=("x", "weight", "residual"),
    tests=_without_bias(_NORM_TESTS),
    benchmarks=_without_bias(_NORM_BENCHMARKS),
    benchmarks_cuda=_without_bias(_NORM_CUDA),
    production=_without_bias([v for v in _NORM_PRODUCTION if v.shape["cols"] in (512, 1024, 4096)]),
    gradcheck=_without_bias(LAYER_NORM.gradcheck),
    accepted={"x": _X, "weight": _ROW},
    refused=(
        ({"weight": _X}, "weight: expected shape (8,), got (4, 8)"),
        ({"residual": _ROW}, "residual: expected shape (4, 8), got (8,)"),
    ),
)
