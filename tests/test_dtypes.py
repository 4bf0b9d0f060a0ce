"""Parameters of another dtype than the input: one rule for all ops, on every backend.

A parameter (weight, bias, class weights, the table of relative_bias) does not promote the input: the output has the
input's dtype, and a parameter's gradient the parameter's. A tensor shaped like the input (residual, gate, another
table) promotes it. The operands of a matrix product have one dtype, or the op raises a ValueError with the remedy.
"""

import itertools

import ptx
import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops import _registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS, TARGET = torch.tensor([[3, 0, 5], [1, 5, 2]]), torch.tensor([2, 0, 8])


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, WEIGHT, BIAS = randn(3, 9), 1 + 0.1 * randn(9, seed=1), randn(9, seed=2)


def attention(x, table, *, backend):
    q = x.view(1, 3, 3, 3)
    return ops.attention(q, q, q, relative_bias=ops.RelativeBias(table, max_distance=9), backend=backend)


# op: function of (input, *parameters), the input, the parameters. Class weights get no gradient.
PARAMETERS = {
    "layer_norm": (ops.layer_norm, X, (WEIGHT, BIAS)),
    "rms_norm": (ops.rms_norm, X, (WEIGHT,)),
    "gelu": (ops.gelu, X, (BIAS,)),
    "embedding": (
        lambda word, weight, bias, *, backend: ops.embedding(IDS, word, weight=weight, bias=bias, backend=backend),
        randn(6, 9),
        (WEIGHT, BIAS),
    ),
    "cross_entropy": (
        lambda x, weight, *, backend: ops.cross_entropy(x, TARGET, weight=weight.detach(), backend=backend),
        X,
        (WEIGHT,),
    ),
    "linear_cross_entropy": (
        lambda x, weight, *, backend: ops.linear_cross_entropy(
            x, x.detach(), TARGET % 3, class_weight=weight[:3].detach(), backend=backend
        ),
        X,
        (WEIGHT,),
    ),
    "attention": (attention, X, (randn(8, 3, seed=3),)),
}
# op: function of (input, other), the input, the other tensor, which promotes the input and is promoted.
PROMOTING = {
    "layer_norm": (lambda x, other, *, backend: ops.layer_norm(x, residual=other, backend=backend), X, randn(3, 9)),
    "rms_norm": (lambda x, other, *, backend: ops.rms_norm(x, residual=other, backend=backend), X, randn(3, 9)),
    "gelu": (lambda x, other, *, backend: ops.gelu(x, gate=other, backend=backend), X, randn(3, 9)),
    "silu": (lambda x, other, *, backend: ops.silu(x, gate=other, backend=backend), X, randn(3, 9)),
    "embedding": (
        lambda word, other, *, backend: ops.embedding(IDS, word, other, backend=backend),
        randn(6, 9),
        randn(3, 9),
    ),
}
# op: function of (input, other), whose dtypes must be equal.
EQUAL = {
    "attention": lambda x, other: ops.attention(x.view(1, 3, 3, 3), *2 * (other.view(1, 3, 3, 3),)),
    "linear_cross_entropy": lambda x, other: ops.linear_cross_entropy(x, other, TARGET % 3),
}
WITHOUT = {"dropout", "mlm_mask"}  # ops of a single floating-point input, or of none


def test_every_op_is_here():
    assert PARAMETERS.keys() | PROMOTING.keys() | EQUAL.keys() | WITHOUT == set(_registry.ops())


def results(function, tensors, backend):
    """[output, gradient of each tensor]; None for a tensor that gets none."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, backend=backend)
    return [y, *torch.autograd.grad(y.double().square().sum(), leaves, allow_unused=True)]


def agrees(got, exact, dtypes, tolerance):
    for value, reference, dtype in zip(got, exact, dtypes):
        assert (value is None) == (reference is None)
        if value is not None:
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), reference, atol=tolerance, rtol=tolerance)


def check(function, tensors, dtypes, out, backends):
    """Every backend that takes `out` agrees with float64, and a named one that does not raises a ValueError."""
    tensors = [t.to(dtype) for t, dtype in zip(tensors, dtypes)]
    exact = results(function, [t.double() for t in tensors], "reference")
    tolerance = 40 * max(torch.finfo(dtype).eps for dtype in (*dtypes, out))
    for backend in backends:
        if backend == "cpu" and out not in _registry._FLOATS["cpu"]:
            with pytest.raises(ValueError, match=r'backend="cpu" cannot run'):
                results(function, tensors, backend)
        else:
            agrees(results(function, tensors, backend), exact, (out, *dtypes), tolerance)


PAIRS = list(itertools.product(DTYPES, DTYPES))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of F.rms_norm
@pytest.mark.parametrize(("dtype", "other"), PAIRS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("op", PARAMETERS)
def test_a_parameter_does_not_promote(op, dtype, other):
    function, x, parameters = PARAMETERS[op]
    check(function, (x, *parameters), (dtype, *(other for _ in parameters)), dtype, ("auto", "reference", "cpu"))


@pytest.mark.parametrize("op", [op for op in PARAMETERS if op != "attention"])  # its kernels compile for seconds
def test_a_parameter_does_not_promote_on_triton(op):
    function, x, parameters = PARAMETERS[op]
    with ptx.triton_on_ptx():
        check(
            function,
            (x, *parameters),
            (torch.float32, *(torch.bfloat16 for _ in parameters)),
            torch.float32,
            ("triton",),
        )


@pytest.mark.parametrize("op", ["layer_norm", "embedding"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_weight_and_bias_of_two_dtypes(op, dtype, dtypes):
    function, x, parameters = PARAMETERS[op]
    check(function, (x, *parameters), (dtype, *dtypes), dtype, ("auto", "reference", "cpu"))


@pytest.mark.parametrize(("dtype", "other"), PAIRS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("op", PROMOTING)
def test_a_tensor_like_the_input_promotes(op, dtype, other):
    function, *tensors = PROMOTING[op]
    out = torch.promote_types(dtype, other)
    check(function, tensors, (dtype, other), out, ("auto", "reference", "cpu"))


@pytest.mark.parametrize(("dtype", "other"), [p for p in PAIRS if p[0] != p[1]], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("op", EQUAL)
def test_operands_of_a_product_have_one_dtype(op, dtype, other):
    with pytest.raises(ValueError, match=f"expected {dtype}.*, got {other}; cast it"):
        EQUAL[op](X[:, :9].to(dtype), X.to(other))


def test_autocast_brings_the_operands_of_a_product_to_one_dtype():
    q, k = X.view(1, 3, 3, 3).float(), X.view(1, 3, 3, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.attention(q, k, k), ops.attention(q.bfloat16(), k, k))


def test_the_reference_keeps_torchs_own_layer_norm():
    """Where F.layer_norm takes the dtypes, its bits."""
    for dtype, other in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        x, weight, bias = X.to(dtype), WEIGHT.to(other), BIAS.to(other)
        want = F.layer_norm(x, (9,), weight, bias)
        assert torch.equal(ops.layer_norm(x, weight, bias, backend="reference"), want)
