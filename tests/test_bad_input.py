"""On a device an error comes before any launch: each op's bad input, with the launches that it led to counted."""

from contextlib import contextmanager

import ptx
import pytest
import torch

from fastlm import _native, ops
from fastlm.ops import _registry

X, IDS = torch.ones(4, 8), torch.ones(2, 3, dtype=torch.int64)
ROWS, TARGET = X[0], torch.zeros(4, dtype=torch.int64)
RNG = torch.zeros(2, dtype=torch.int64)
MASK = {"mask_token_id": 3, "vocab_size": 9, "special_ids": (0,), "seed": 0}

# op: arguments that it takes, and in each row what is wrong with them and how the error begins.
BAD = {
    "layer_norm": (
        {"x": X, "weight": ROWS, "bias": ROWS},
        [
            ({"x": X.int()}, "x: expected a floating-point tensor, got torch.int32"),
            ({"weight": ROWS[:7]}, "weight: expected shape (8,), got (7,)"),
            ({"bias": ROWS.int()}, "bias: expected a floating-point tensor"),
            ({"residual": X[:3]}, "residual: expected shape (4, 8), got (3, 8)"),
            ({"dropout_p": 1.5}, "dropout_p: expected a probability in [0, 1], got 1.5"),
            ({"dropout_p": 0.5, "rng": RNG[:1]}, "rng: expected shape (2,), got (1,)"),
        ],
    ),
    "rms_norm": (
        {"x": X, "weight": ROWS},
        [
            ({"weight": X}, "weight: expected shape (8,), got (4, 8)"),
            ({"residual": ROWS}, "residual: expected shape (4, 8), got (8,)"),
        ],
    ),
    "cross_entropy": (
        {"logits": X, "target": TARGET},
        [
            ({"logits": X.int()}, "logits: expected a floating-point tensor"),
            ({"target": TARGET[:3]}, "target: expected shape (4,), got (3,)"),
            ({"target": TARGET.int()}, "target: expected torch.int64, got torch.int32"),
            ({"weight": ROWS[:7]}, "weight: expected shape (8,), got (7,)"),
            ({"label_smoothing": 1.1}, "label_smoothing: expected a probability"),
            ({"reduction": "avg"}, "reduction: expected one of 'none', 'mean', 'sum'"),
        ],
    ),
    "linear_cross_entropy": (
        {"hidden": X, "weight": torch.ones(5, 8), "target": TARGET},
        [
            ({"weight": torch.ones(5, 7)}, "weight: expected shape (*, 8), got (5, 7)"),
            ({"weight": torch.ones(5, 8).bfloat16()}, "weight: expected torch.float32, hidden's dtype"),
            ({"bias": ROWS}, "bias: expected shape (5,), got (8,)"),
            ({"target": TARGET[:3]}, "target: expected shape (4,), got (3,)"),
        ],
    ),
    "gelu": (
        {"x": X},
        [
            ({"x": X.int()}, "x: expected a floating-point tensor"),
            ({"bias": ROWS[:7]}, "bias: expected shape (8,), got (7,)"),
            ({"gate": ROWS}, "gate: expected shape (4, 8), got (8,)"),
            ({"approximate": "erf"}, "approximate: expected one of 'none', 'tanh', got 'erf'"),
        ],
    ),
    "embedding": (
        {"input_ids": IDS, "word": X, "weight": ROWS, "bias": ROWS},
        [
            ({"input_ids": IDS.float()}, "input_ids: expected torch.int64 or torch.int32"),
            ({"word": ROWS}, "word: expected shape"),
            ({"position": X[:2]}, "position: expected at least 3 rows"),
            ({"token_type_ids": IDS}, "token_type_ids: given without its table"),
            ({"padding_idx": 4}, "padding_idx: expected an id of the 4 rows of word, got 4"),
        ],
    ),
    "dropout": (
        {"x": X, "p": 0.5, "rng": RNG},
        [
            ({"x": X.int()}, "x: expected a floating-point tensor"),
            ({"x": X.sum()}, "x: expected at least one dimension, got a scalar"),
            ({"p": 1.5}, "p: expected a probability in [0, 1], got 1.5"),
            ({"rng": RNG[:1]}, "rng: expected shape (2,), got (1,)"),
            ({"site": -1}, "site: "),
        ],
    ),
    "mlm_mask": (
        {"input_ids": IDS, **MASK},
        [
            ({"input_ids": IDS.float()}, "input_ids: expected torch.int64 or torch.int32"),
            ({"mask_token_id": 9}, "mask_token_id: "),
            ({"special_ids": range(9)}, "special_ids: all 9 ids"),
            ({"word_starts": IDS}, "word_starts: expected torch.bool"),
            ({"mlm_probability": 1.5}, "mlm_probability: expected a probability in [0, 1], got 1.5"),
            ({"capacity": -1}, "capacity: "),
        ],
    ),
    "attention": (
        {"q": torch.ones(1, 4, 2, 16), "k": torch.ones(1, 4, 2, 16), "v": torch.ones(1, 4, 2, 16)},
        [
            ({"q": torch.ones(4, 2, 16)}, "q: expected shape (B, S, H, D), or (T, H, D) with cu_seqlens_q"),
            ({"k": torch.ones(1, 4, 2, 8)}, "k: expected shape (1, *, *, 16), got (1, 4, 2, 8)"),
            ({"v": torch.ones(1, 3, 2, 16)}, "v: expected shape (1, 4, 2, 16), got (1, 3, 2, 16)"),
            ({"key_mask": torch.ones(1, 3, dtype=torch.bool)}, "key_mask: expected shape (1, 4), got (1, 3)"),
            ({"dropout_p": -0.1}, "dropout_p: expected a probability in [0, 1], got -0.1"),
        ],
    ),
}
CASES = [
    pytest.param(op, backend, {**good, **wrong}, message, id=f"{backend}-{op}-{next(iter(wrong))}-{k}")
    for op, (good, rows) in BAD.items()
    for backend in ("triton", "cuda")
    if backend in _registry.backends(op)
    for k, (wrong, message) in enumerate(rows)
]


@contextmanager
def launches(backend):
    """A function that says what was launched so far, while the backend takes CPU tensors."""
    if backend == "triton":
        with ptx.triton_on_ptx() as launched:
            yield launched.kernels
        return
    if _native.cuda() is None:
        pytest.skip("fastlm._cuda is not built")
    launched = []
    _native.record_cuda(lambda entry, *_: launched.append(entry))
    try:
        yield lambda: launched
    finally:
        _native.record_cuda(None)


@pytest.mark.parametrize(("op", "backend", "arguments", "message"), CASES)
def test_an_error_comes_before_any_launch(op, backend, arguments, message):
    with launches(backend) as launched:
        with pytest.raises(ValueError) as error:
            getattr(ops, op)(**arguments, backend=backend)
        assert str(error.value).startswith(message)
        assert not launched()


def test_triton_has_no_sparse_gradient():
    good, _ = BAD["embedding"]
    with launches("triton") as launched:
        with pytest.raises(ValueError, match="sparse: expected False for backend triton, whose gradients are dense"):
            ops.embedding(**good, sparse=True, backend="triton")
        assert not launched()


@pytest.mark.parametrize("op", BAD)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_arguments_are_good_but_for_that(op, backend):
    """What is counted above would be seen: the same call without the fault launches."""
    if backend not in _registry.backends(op):
        pytest.skip(f"{op} has no backend {backend}")
    with launches(backend) as launched:
        getattr(ops, op)(**BAD[op][0], backend=backend)
        assert launched()
