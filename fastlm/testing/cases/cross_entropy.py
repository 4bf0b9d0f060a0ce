"""cross_entropy."""

import torch

from fastlm import ops
from fastlm.ops import IGNORE_INDEX
from fastlm.testing.cases._case import OpCase, Variant


def make_target(generator, rows, vocabulary, ignored=0):
    """Any classes, the last one among them; ignored: 1 for a fifth of the rows, 2 for all."""
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    target[rows // 2 :][:1] = vocabulary - 1
    if ignored:
        target[:: 5 if ignored == 1 else 1] = IGNORE_INDEX
    return target


def _make(generator, rows, vocabulary, ignored=0, weight=0, scale=3, masked=0, offset=0):
    """offset: added to all logits."""
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale + offset
    target = make_target(generator, rows, vocabulary, ignored)
    if masked:  # a third of the classes cannot be
        impossible = torch.rand(rows, vocabulary, generator=generator) < 1 / 3
        impossible[target != IGNORE_INDEX, target[target != IGNORE_INDEX]] = False
        logits = logits.masked_fill(impossible, -torch.inf)
    return {
        "logits": logits,
        "target": target,
        "weight": torch.rand(vocabulary, generator=generator, dtype=torch.float64) + 0.1 if weight else None,
    }


def _bytes(shape, options, itemsize, backward):
    """The forward's one pass: logits in, gradient out. Backward has nothing to do while dloss is 1."""
    elements = shape["rows"] * shape["vocabulary"]
    return 0 if backward else itemsize * elements * 2


def asked_for(out):
    """The outputs that a call asked for: a loss, or the tensors of a CrossEntropyOutput."""
    return out if isinstance(out, torch.Tensor) else tuple(value for value in out if value is not None)


def _overwriting(*, logits, inplace=False, backend, **arguments):
    # In place needs logits that an op computed; the addition of zero keeps their bits.
    x = logits + 0.0 if inplace else logits
    return asked_for(ops.cross_entropy(x, inplace=inplace, backend=backend, **arguments))


def _reference(*, inplace=False, **arguments):
    return asked_for(ops.cross_entropy_reference(**arguments))


_X, _ROW, _TARGET = torch.ones(4, 8), torch.ones(8), torch.zeros(4, dtype=torch.int64)

CROSS_ENTROPY = OpCase(
    op="cross_entropy",
    function=_overwriting,
    reference=_reference,
    make=_make,
    gradients=("logits",),
    tests=(
        Variant({"rows": 5, "vocabulary": 33}),
        Variant({"rows": 0, "vocabulary": 7}, {"reduction": "sum"}),
        Variant({"rows": 3, "vocabulary": 1}),
        Variant({"rows": 4, "vocabulary": 9, "ignored": 2}, {"reduction": "sum"}),
        Variant({"rows": 6, "vocabulary": 4099, "ignored": 1}, {"inplace": True}),
        Variant({"rows": 20, "vocabulary": 300, "weight": 1, "ignored": 1}, {"label_smoothing": 0.1}),
        Variant({"rows": 12, "vocabulary": 50, "ignored": 1}, {"z_loss": 1e-3, "reduction": "none"}),
        Variant({"rows": 6, "vocabulary": 65, "weight": 1}, {"label_smoothing": 1.0, "z_loss": 1e-4, "inplace": True}),
        Variant({"rows": 6, "vocabulary": 65, "scale": 10000}),
        Variant({"rows": 6, "vocabulary": 300, "offset": 1000}, {"reduction": "none"}),
        Variant({"rows": 6, "vocabulary": 65, "offset": -300}, {"label_smoothing": 0.1}),
        Variant({"rows": 7, "vocabulary": 130, "masked": 1}, {"reduction": "none", "inplace": True}),
        # Past what a Triton program keeps in registers; past where two rows fit an L1, in bfloat16 too.
        Variant({"rows": 3, "vocabulary": 33003, "ignored": 1}, {"inplace": True}),
        Variant({"rows": 3, "vocabulary": 16389, "weight": 1}, {"label_smoothing": 0.1, "z_loss": 1e-4}),
        Variant({"rows": 5, "vocabulary": 54001}),
        Variant({"rows": 7, "vocabulary": 34, "scale": 20, "ignored": 1}, {"softcap": 30.0}),
        Variant(
            {"rows": 9, "vocabulary": 5, "ignored": 1},
            {"return_token_accuracy": True, "return_z_loss": True, "z_loss": 1e-2, "softcap": 2.0, "reduction": "none"},
        ),
        Variant(
            {"rows": 4, "vocabulary": 16403, "weight": 1, "ignored": 1},
            {"softcap": 5.0, "label_smoothing": 0.1, "return_z_loss": True, "z_loss": 1e-3, "inplace": True},
        ),
    ),
    benchmarks=tuple(
        Variant({"rows": rows, "vocabulary": vocabulary}, {"inplace": True} if inplace else {})
        for rows, vocabulary in ((1024, 30522), (1024, 50257), (4096, 32128))
        for inplace in (False, True)
    ),
    benchmarks_cuda=tuple(  # BERT; GPT-2; T5; Llama 3
        Variant({"rows": rows, "vocabulary": vocabulary}, {"inplace": True} if inplace else {})
        for rows, vocabulary, inplace in (
            (8192, 30522, 1),
            (8192, 30522, 0),
            (8192, 50257, 1),
            (8192, 32128, 1),
            (4096, 128256, 1),
        )
    ),
    production=(
        Variant({"rows": 16, "vocabulary": 2}),  # a classifier
        *(Variant({"rows": 16, "vocabulary": n}) for n in (30522, 50257, 32128, 128256)),  # BERT, GPT-2, T5, Llama 3
        Variant({"rows": 16, "vocabulary": 30522}, {"label_smoothing": 0.1, "z_loss": 1e-4}),
        Variant({"rows": 16, "vocabulary": 30522, "weight": 1}, {"label_smoothing": 0.1}),
        Variant({"rows": 16, "vocabulary": 256000}, {"softcap": 30.0, "return_token_accuracy": True}),  # Gemma 2
    ),
    bytes=_bytes,
    gradcheck=(
        Variant({"rows": 5, "vocabulary": 6, "weight": 1, "ignored": 1}, {"label_smoothing": 0.2, "z_loss": 0.1}),
        Variant({"rows": 5, "vocabulary": 6, "ignored": 1}, {"reduction": "none"}),
        Variant({"rows": 5, "vocabulary": 6}, {"softcap": 3.0, "return_z_loss": True, "z_loss": 0.1}),
    ),
    accepted={"logits": _X, "target": _TARGET},
    refused=(
        ({"logits": _X.int()}, "logits: expected a floating-point tensor"),
        ({"target": _TARGET[:3]}, "target: expected shape (4,), got (3,)"),
        ({"target": _TARGET.int()}, "target: expected torch.int64, got torch.int32"),
        ({"weight": _ROW[:7]}, "weight: expected shape (8,), got (7,)"),
        ({"label_smoothing": 1.1}, "label_smoothing: expected a probability"),
        ({"softcap": 0.0}, "softcap: expected a positive finite number"),
        ({"reduction": "avg"}, "reduction: expected one of 'none', 'mean', 'sum'"),
    ),
)
