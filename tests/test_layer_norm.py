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


@pytest.mark.parametrize("mean", [100.0, 1000.0, -3456.7])
def test_rows_with_an_offset(mean):
    """The mean's rounding is not in y: the error is at most a tenth of torch's, in gradients at most torch's."""
    x = (mean + torch.arange(16) * abs(mean) * 1e-5)[None].requires_grad_()
    dy = torch.linspace(-1, 1, 16).square()[None]
    results = {}
    for name in ("ours", "torch", "exact"):
        inputs = x.detach().double().requires_grad_() if name == "exact" else x
        y = ops.layer_norm(inputs, backend="cpu") if name == "ours" else F.layer_norm(inputs, (16,))
        results[name] = y, torch.autograd.grad(y, inputs, dy.to(y.dtype))[0]
    for i, share in enumerate((0.1, 1.0)):
        error, theirs = ((results[name][i] - results["exact"][i]).abs().max() for name in ("ours", "torch"))
        assert error <= share * theirs + 2e-7, f"{error} of torch's {theirs}"


def test_constant_rows_are_0():
    for value in (0.1, -1234.567, 3e7):
        x = torch.full((3, 777), value, requires_grad=True)
        y = ops.layer_norm(x, eps=1e-12, backend="cpu")
        assert y.abs().max() < 1e-5
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


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
