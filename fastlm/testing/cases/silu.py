"""silu."""

import torch

from fastlm import ops
from fastlm.testing.cases._case import OpCase, Variant


def _make_silu(generator, rows, cols, gate=1):
    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {"x": randn(rows, cols) * 2, "gate": randn(rows, cols) if gate else None}


def _silu_bytes(shape, options, itemsize, backward):
    elements, gate = shape["rows"] * shape["cols"], shape.get("gate", 1)
    # x (and gate) in, y out; backward dy, x (and gate) in, dx (and dgate) out
    return itemsize * elements * (3 + 2 * gate if backward else 2 + gate)


_X = torch.ones(4, 8)

SILU = OpCase(
    op="silu",
    function=ops.silu,
    reference=ops.silu_reference,
    make=_make_silu,
    gradients=("x", "gate"),
    tests=(
        Variant({"rows": 5, "cols": 33}),
        Variant({"rows": 5, "cols": 33, "gate": 0}),
        Variant({"rows": 0, "cols": 8}),
        Variant({"rows": 3, "cols": 0, "gate": 0}),
        Variant({"rows": 3, "cols": 1}),
        Variant({"rows": 70, "cols": 768}),
        Variant({"rows": 35, "cols": 1025, "gate": 0}),
        Variant({"rows": 50, "cols": 2111}),
    ),
    benchmarks=(
        Variant({"rows": 2048, "cols": 5632}),  # TinyLlama's MLP
        Variant({"rows": 4096, "cols": 3072}),
        Variant({"rows": 4096, "cols": 3072, "gate": 0}),
    ),
    benchmarks_cuda=(
        Variant({"rows": 32768, "cols": 5632}),  # TinyLlama
        Variant({"rows": 16384, "cols": 14336}),  # Llama 3 8B
        Variant({"rows": 32768, "cols": 3072, "gate": 0}),
    ),
    production=(
        Variant({"rows": 16, "cols": 5632}),  # TinyLlama
        Variant({"rows": 16, "cols": 14336}),  # Llama 3 8B
    ),
    bytes=_silu_bytes,
    gradcheck=(Variant({"rows": 3, "cols": 5}), Variant({"rows": 3, "cols": 5, "gate": 0})),
    accepted={"x": _X},
    refused=(
        ({"x": _X.int()}, "x: expected a floating-point tensor"),
        ({"x": _X.sum()}, "x: expected at least one dimension, got a scalar"),
        ({"gate": _X[0]}, "gate: expected shape (4, 8), got (8,)"),
        ({"gate": _X.int()}, "gate: expected a floating-point tensor"),
    ),
)
