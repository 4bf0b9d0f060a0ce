"""Gradients of the losses under a loss scale: as exact as torch's, which rounds them after the scale is applied."""

import pytest
import torch
import torch.nn.functional as F
from test_cross_entropy import CUDA, running

from fastlm import ops

BACKENDS = ["cpu", "triton", CUDA, "reference"]
ROWS, VOCABULARY, FEATURES = 8, 131, 16
# dtype -> (reduction, loss scale): as for a batch of 512 rows and the scale 65536.
LOSSES = {
    torch.float16: [("mean", 128.0 * ROWS), ("sum", 128.0), ("none", 128.0)],
    torch.bfloat16: [("mean", 128.0 * ROWS)],
}


def make(dtype):
    """hidden, weight, target; many probabilities are below 2^-14, the least normal number of float16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, FEATURES, generator=generator).to(dtype)
    weight = (0.6 * torch.randn(VOCABULARY, FEATURES, generator=generator)).to(dtype)
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight, target


def errors(got, exact, where):
    """(mean relative error, share of values that became 0), of the values at `where`."""
    got, exact = got.double()[where], exact.double()[where]
    return ((got - exact) / exact).abs().mean().item(), ((got == 0) & (exact != 0)).double().mean().item()


def assert_as_exact_as_torch(got, eager, exact, where=slice(None)):
    (error, flushed), (torch_error, torch_flushed) = (errors(g, exact, where) for g in (got, eager))
    assert error <= 2 * torch_error
    assert flushed <= 2 * torch_flushed
    assert torch_error < 0.02  # the bound means something


def gradients(loss, inputs, scale):
    """Of loss · scale: a scalar, or Σ of the rows' losses."""
    return torch.autograd.grad(loss.sum() * scale, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy(backend, dtype):
    """The gradients of the classes that are not the target, in and outside of the memory of the logits."""
    if backend == "cpu" and dtype == torch.float16:
        backend = "auto"  # the CPU's kernels do not take float16
    hidden, weight, target = make(dtype)
    logits = (hidden.float() @ weight.float().t()).to(dtype)
    where = torch.ones(ROWS, VOCABULARY, dtype=torch.bool).scatter_(1, target[:, None], False)
    for reduction, scale in LOSSES[dtype]:
        exact, eager = logits.double().requires_grad_(), logits.clone().requires_grad_()
        (want,) = gradients(F.cross_entropy(exact, target, reduction=reduction), [exact], scale)
        (theirs,) = gradients(F.cross_entropy(eager.float(), target, reduction=reduction), [eager], scale)
        for inplace in (False, True):
            x = logits.clone().requires_grad_()
            with running(backend):
                with torch.autocast("cpu", dtype):
                    loss = ops.cross_entropy(
                        x + 0.0 if inplace else x, target, reduction=reduction, inplace=inplace, backend=backend
                    )
                (ours,) = gradients(loss, [x], scale)
            assert loss.dtype == torch.float32
            assert ours.dtype == dtype
            assert_as_exact_as_torch(ours, theirs, want, where)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy(backend, dtype):
    if backend == "cpu" and dtype == torch.float16:
        backend = "auto"
    hidden, weight, target = make(dtype)
    for reduction, scale in LOSSES[dtype]:
        exact = [t.double().requires_grad_() for t in (hidden, weight)]
        want = gradients(F.cross_entropy(exact[0] @ exact[1].t(), target, reduction=reduction), exact, scale)
        eager, leaves = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(F.linear(*eager), target, reduction=reduction)
        theirs = gradients(loss, eager, scale)
        with running(backend):
            with torch.autocast("cpu", dtype):
                loss = ops.linear_cross_entropy(*leaves, target, reduction=reduction, backend=backend)
            ours = gradients(loss, leaves, scale)
        for a, b, c in zip(ours, theirs, want):
            assert a.dtype == dtype
            rms = [((g.double() - c).square().mean() / c.square().mean()).sqrt() for g in (a, b)]
            assert rms[0] <= 2 * rms[1]
            assert ((a == 0) & (c != 0)).sum() <= 2 * ((b == 0) & (c != 0)).sum()


@pytest.mark.parametrize("inplace", [False, True])
def test_float16_backward_twice(inplace):
    """A graph that is kept leaves the logits, from which backward computes the gradient, as they are."""
    hidden, weight, target = make(torch.float16)
    weight.requires_grad_()
    with running("triton"):
        loss = ops.cross_entropy(hidden @ weight.t(), target, inplace=inplace, backend="triton")
        linear = ops.linear_cross_entropy(hidden, weight, target, backend="triton")
        for value in (loss, linear):
            first, second = (torch.autograd.grad(value * 8, weight, retain_graph=keep)[0] for keep in (True, False))
            assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match=r"second time|modified by an inplace"):
            torch.autograd.grad(loss, weight)


def test_float16_inplace_memory():
    """Backward overwrites the logits with their gradient; until then they are what they were."""
    hidden, weight, target = make(torch.float16)
    logits = hidden @ weight.requires_grad_().t()
    before, address, seen = logits.detach().clone(), logits.data_ptr(), []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    with running("triton"):
        loss = ops.cross_entropy(logits, target, inplace=True, backend="triton")
        assert torch.equal(logits.detach(), before)
        loss.backward()
    assert seen == [address]
    assert not torch.equal(logits.detach(), before)
