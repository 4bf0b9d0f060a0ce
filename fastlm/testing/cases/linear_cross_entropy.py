"""linear_cross_entropy."""

import torch

from fastlm import ops
from fastlm.testing.cases._case import OpCase, Variant
from fastlm.testing.cases.cross_entropy import asked_for, make_target


def _make(generator, rows, features, vocabulary, bias=0, ignored=0, class_weight=0, offset=0):
    """offset: added to all biases, and so to all logits."""

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {
        "hidden": randn(rows, features),
        "weight": randn(vocabulary, features) * 2 / features**0.5,
        "target": make_target(generator, rows, vocabulary, ignored),
        "bias": randn(vocabulary) + offset if bias else None,
        "class_weight": torch.rand(vocabulary, generator=generator, dtype=torch.float64) + 0.1
        if class_weight
        else None,
    }


def _function(**arguments):
    return asked_for(ops.linear_cross_entropy(**arguments))


def _reference(**arguments):
    return asked_for(ops.linear_cross_entropy_reference(**arguments))


def _bytes(shape, options, itemsize, backward):
    """hidden and weight in, their gradients out, all in the forward."""
    return 0 if backward else 2 * itemsize * shape["features"] * (shape["rows"] + shape["vocabulary"])


def _flops(shape, options, backward):
    """The forward holds all three products."""
    return 0 if backward else 6 * shape["rows"] * shape["features"] * shape["vocabulary"]


_X, _ROW, _TARGET = torch.ones(4, 8), torch.ones(8), torch.zeros(4, dtype=torch.int64)

LINEAR_CROSS_ENTROPY = OpCase(
    op="linear_cross_entropy",
    function=_function,
    reference=_reference,
    make=_make,
    gradients=("hidden", "weight", "bias"),
    tests=(
        Variant({"rows": 7, "features": 5, "vocabulary": 33}),
        Variant({"rows": 0, "features": 4, "vocabulary": 3, "bias": 1}, {"reduction": "sum"}),
        Variant({"rows": 3, "features": 1, "vocabulary": 1}),
        Variant({"rows": 70, "features": 8, "vocabulary": 2100, "bias": 1, "ignored": 1}, {"label_smoothing": 0.1}),
        Variant({"rows": 530, "features": 9, "vocabulary": 70, "bias": 1, "class_weight": 1}, {"reduction": "none"}),
        Variant({"rows": 70, "features": 16, "vocabulary": 40, "ignored": 2}, {"reduction": "sum"}),
        Variant({"rows": 515, "features": 8, "vocabulary": 50, "bias": 1}, {"z_loss": 1e-3}),
        Variant({"rows": 70, "features": 8, "vocabulary": 50, "bias": 1, "offset": 300}),
        Variant(
            {"rows": 515, "features": 8, "vocabulary": 50, "ignored": 1},
            {"softcap": 3.0, "z_loss": 1e-3, "return_z_loss": True, "return_token_accuracy": True},
        ),
    ),
    benchmarks=tuple(
        Variant({"rows": 1024, "features": features, "vocabulary": 30522, "bias": 1}) for features in (256, 512, 768)
    ),
    benchmarks_cuda=(
        Variant({"rows": 8192, "features": 768, "vocabulary": 30522, "bias": 1}),  # BERT-base
        Variant({"rows": 8192, "features": 768, "vocabulary": 50257}),  # GPT-2
        Variant({"rows": 8192, "features": 1024, "vocabulary": 30522, "bias": 1}),  # BERT-large
        Variant({"rows": 8192, "features": 768, "vocabulary": 32128}),  # T5-base
        Variant({"rows": 8192, "features": 4096, "vocabulary": 128256}),  # a decoder
    ),
    production=(
        Variant({"rows": 16, "features": 16, "vocabulary": 30522, "bias": 1}),
        Variant({"rows": 16, "features": 16, "vocabulary": 30522, "bias": 1}, {"reduction": "none"}),
    ),
    bytes=_bytes,
    flops=_flops,
    gradcheck=(
        Variant({"rows": 4, "features": 3, "vocabulary": 6, "bias": 1, "class_weight": 1}, {"label_smoothing": 0.2}),
    ),
    thread_invariant=False,  # the matrix products are the BLAS's
    accepted={"hidden": _X, "weight": torch.ones(5, 8), "target": _TARGET},
    refused=(
        ({"weight": torch.ones(5, 7)}, "weight: expected shape (*, 8), got (5, 7)"),
        ({"weight": torch.ones(5, 8).bfloat16()}, "weight: expected torch.float32, hidden's dtype"),
        ({"bias": _ROW}, "bias: expected shape (5,), got (8,)"),
        ({"target": _TARGET[:3]}, "target: expected shape (4,), got (3,)"),
    ),
)
