"""gelu."""

import torch

from fastlm import ops
from fastlm.testing.cases._case import OpCase, Variant


def _make_gelu(generator, rows, cols, bias=1, gate=0):
    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {
        "x": randn(rows, cols) * 2,
        "bias": randn(cols) if bias else None,
        "gate": randn(rows, cols) if gate else None,
    }


def _gelu_bytes(shape, options, itemsize, backward):
    elements, gate = shape["rows"] * shape["cols"], shape.get("gate", 0)
    # x (and gate) in, y out; backward dy, x (and gate) in, dx (and dgate) out
    return itemsize * elements * (3 + 2 * gate if backward else 2 + gate)


_TANH = {"approximate": "tanh"}

_X, _ROW = torch.ones(4, 8), torch.ones(8)

GELU = OpCase(
    op="gelu",
    function=ops.gelu,
    reference=ops.gelu_reference,
    make=_make_gelu,
    gradients=("x", "bias", "gate"),
    tests=(
        Variant({"rows": 5, "cols": 33}),
        Variant({"rows": 5, "cols": 33, "gate": 1}, _TANH),
        Variant({"rows": 0, "cols": 8, "gate": 1}),
        Variant({"rows": 3, "cols": 0, "bias": 0}),
        Variant({"rows": 3, "cols": 1, "bias": 0, "gate": 1}),
        Variant({"rows": 70, "cols": 768}, float32=("bias",)),
        Variant({"rows": 35, "cols": 1025, "bias": 0}, _TANH),
        Variant({"rows": 50, "cols": 2111, "gate": 1}, float32=("bias",)),
    ),
    benchmarks=tuple(
        Variant({"rows": 4096, "cols": 3072, **gate}, options)
        for gate in ({}, {"bias": 0, "gate": 1})
        for options in ({}, _TANH)
    ),
    benchmarks_cuda=(
        Variant({"rows": 32768, "cols": 3072}),  # BERT-base
        Variant({"rows": 32768, "cols": 2048, "bias": 0, "gate": 1}, _TANH),  # T5 v1.1-base
        Variant({"rows": 32768, "cols": 3072}, _TANH),  # GPT-2
        Variant({"rows": 32768, "cols": 4096}),  # BERT-large
        Variant({"rows": 16384, "cols": 14336, "bias": 0, "gate": 1}, _TANH),  # a decoder of 4096
    ),
    production=(
        Variant({"rows": 16, "cols": 3072}, float32=("bias",)),  # BERT
        Variant({"rows": 16, "cols": 3072}, _TANH, ("bias",)),  # GPT-2
        Variant({"rows": 16, "cols": 2048, "bias": 0, "gate": 1}, _TANH),  # T5 v1.1
    ),
    bytes=_gelu_bytes,
    gradcheck=(Variant({"rows": 3, "cols": 5, "gate": 1}), Variant({"rows": 3, "cols": 5}, _TANH)),
    accepted={"x": _X},
    refused=(
        ({"x": _X.int()}, "x: expected a floating-point tensor"),
        ({"bias": _ROW[:7]}, "bias: expected shape (8,), got (7,)"),
        ({"gate": _ROW}, "gate: expected shape (4, 8), got (8,)"),
        ({"approximate": "erf"}, "approximate: expected one of 'none', 'tanh', got 'erf'"),
    ),
)
