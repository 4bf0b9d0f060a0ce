"""layer_norm beyond its OpCase: arguments that are left out, and the limits of dropout."""

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops


def test_a_bias_without_a_weight():
    x = torch.randn(3, 8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    y = ops.layer_norm(x, bias=bias, backend="cpu")
    torch.testing.assert_close(y, F.layer_norm(x, (8,), None, bias))
    (dbias,) = torch.autograd.grad(y.sum(), bias)
    assert torch.equal(dbias, torch.full((8,), 3.0))


def test_a_probability_below_one_word_drops_nothing():
    x = torch.randn(3, 8, requires_grad=True)
    grads = [torch.autograd.grad(ops.layer_norm(x, dropout_p=p).square().sum(), x)[0] for p in (0.0, 2.0**-40)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rng_of_any_stride(backend):
    x, table = torch.randn(4, 16), torch.tensor([[3, 9], [4, 9]])
    assert not table[:, 0].is_contiguous()
    arguments = {"dropout_p": 0.5, "return_residual": True, "backend": backend}
    _, h = ops.layer_norm(x, rng=table[:, 0], **arguments)
    assert torch.equal(h, ops.layer_norm(x, rng=torch.tensor([3, 4]), **arguments)[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_dropped_is_zero_whatever_it_was(backend):
    x = torch.full((2, 9), torch.inf)
    _, h = ops.layer_norm(x, dropout_p=1.0, return_residual=True, backend=backend)
    assert torch.equal(h, torch.zeros(2, 9))
