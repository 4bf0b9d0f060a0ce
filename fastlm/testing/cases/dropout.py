"""dropout."""

import torch

from fastlm import ops
from fastlm.testing.cases._case import OpCase, Variant, draw_rng


def _make_dropout(generator, rows, cols):
    return {
        "x": torch.randn(rows, cols, generator=generator, dtype=torch.float64) * 2,
        "rng": draw_rng(generator),
    }


def _dropout_bytes(shape, options, itemsize, backward):
    # x in, y out; backward dy (and y) in, dx out
    return itemsize * shape["rows"] * shape["cols"] * (2 + bool(backward and options.get("relu")))


_RELU = {"p": 0.1, "relu": True, "site": 3}

_X, _RNG = torch.ones(4, 8), torch.zeros(2, dtype=torch.int64)

DROPOUT = OpCase(
    op="dropout",
    function=ops.dropout,
    reference=ops.dropout_reference,
    make=_make_dropout,
    gradients=("x",),
    tests=(
        Variant({"rows": 5, "cols": 33}, {"p": 0.1}),
        Variant({"rows": 5, "cols": 33}, _RELU),
        Variant({"rows": 0, "cols": 8}, {"p": 0.1}),
        Variant({"rows": 3, "cols": 0}, _RELU),
        Variant({"rows": 3, "cols": 1}, {"p": 0.5, "site": 2**32 - 1}),
        Variant({"rows": 4, "cols": 20}, {"p": 1.0}),
        Variant({"rows": 4, "cols": 20}, {"p": 1.0, "relu": True}),
        Variant({"rows": 4, "cols": 20}, {"p": 0.0, "relu": True}),
        Variant({"rows": 35, "cols": 1025}, {"p": 0.3}),
        Variant({"rows": 50, "cols": 2111}, _RELU),
    ),
    benchmarks=tuple(Variant({"rows": 2048, "cols": 2048}, options) for options in ({"p": 0.1}, _RELU)),  # T5-small
    benchmarks_cuda=tuple(Variant({"rows": 32768, "cols": 2048}, options) for options in ({"p": 0.1}, _RELU)),
    production=tuple(Variant({"rows": 16, "cols": 2048}, options) for options in ({"p": 0.1}, _RELU)),
    bytes=_dropout_bytes,
    gradcheck=(Variant({"rows": 3, "cols": 5}, {"p": 0.3}), Variant({"rows": 3, "cols": 5}, {"p": 0.3, "relu": True})),
    accepted={"x": _X, "p": 0.5, "rng": _RNG},
    refused=(
        ({"x": _X.int()}, "x: expected a floating-point tensor"),
        ({"x": _X.sum()}, "x: expected at least one dimension, got a scalar"),
        ({"p": 1.5}, "p: expected a probability in [0, 1], got 1.5"),
        ({"rng": _RNG[:1]}, "rng: expected shape (2,), got (1,)"),
        ({"site": -1}, "site: "),
    ),
)
