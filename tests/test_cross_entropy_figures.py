"""What the losses return beside the loss: the z loss and the token accuracy; and the softcap."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_cross_entropy import CUDA, running

from fastlm import nn, ops

BACKENDS = ["cpu", "triton", CUDA, "reference"]
ROWS, VOCABULARY = 9, 37
BOTH = {"return_z_loss": True, "return_token_accuracy": True}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def ties(generator, vocabulary, dtype=torch.float32):
    """Logits of few values, so that most rows have several greatest ones, and targets among these."""
    logits = torch.randint(-1, 2, (ROWS, vocabulary), generator=generator).to(dtype)
    target = logits.argmax(-1)
    target[1::3] = vocabulary - 1 - logits[1::3].flip(-1).argmax(-1)  # the last of the greatest
    target[2::6] = -100
    return logits, target


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 16501])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_is_argmax(backend, vocabulary, generator):
    """Of equal logits the first counts, as for torch.argmax; ignored rows do not."""
    weight = torch.rand(vocabulary, generator=generator) + 0.1
    for dtype, reduction, options in (
        (torch.float32, "none", {"softcap": 0.1}),  # tanh makes different logits equal
        (torch.bfloat16, "mean", {"weight": weight}),
    ):
        logits, target = ties(generator, vocabulary, dtype)
        logits[0], logits[3] = -math.inf, 1.0
        target[0] = target[3] = 0
        kept = target != -100
        want = (logits.argmax(-1) == target) & kept
        assert 0 < want.sum() < kept.sum()
        options |= {"reduction": reduction, "return_token_accuracy": True, "backend": backend}
        with running(backend):
            out = ops.cross_entropy(logits, target, **options)
        assert out.z_loss is None
        assert out.token_accuracy.dtype == torch.float32
        assert torch.equal(out.token_accuracy, want.float() if reduction == "none" else want.sum() / kept.sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_with_nan(backend):
    """A NaN is the greatest logit, as for torch.argmax; a target whose own logit is NaN is wrong."""
    logits = torch.tensor([[3.0, 1.0, math.nan], [1.0, math.nan, 0.0], [math.inf, 1.0, 0.0], [-math.inf, 1.0, 2.0]])
    with running(backend):
        out = ops.cross_entropy(logits, torch.tensor([0, 1, 0, 2]), reduction="none", backend=backend, **BOTH)
    assert out.token_accuracy.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_of_the_loss(backend, linear, generator):
    """The loss has the bits and the gradient that it has alone; the z loss is its part; neither has a gradient."""
    hidden = torch.randn(ROWS, 5, generator=generator)
    matrix = torch.randn(VOCABULARY, 5, generator=generator)
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    target[4] = -100
    kept = target != -100
    leaf = (hidden if linear else hidden @ matrix.t()).requires_grad_()
    logits = hidden @ matrix.t()
    for reduction in ("mean",) if linear else ("mean", "sum"):
        options = {"z_loss": 0.1, "label_smoothing": 0.1, "softcap": 4.0, "reduction": reduction, "backend": backend}
        call = (
            (lambda **k: ops.linear_cross_entropy(leaf, matrix, target, **k))
            if linear
            else (lambda **k: ops.cross_entropy(leaf, target, **k))
        )
        with running(backend):
            alone, out = call(**options), call(**options, **BOTH)
            gradients = [torch.autograd.grad(loss.sum() * 3, leaf)[0] for loss in (alone, out.loss)]
        assert isinstance(out, ops.CrossEntropyOutput)
        assert torch.equal(alone, out.loss)
        assert torch.equal(*gradients)
        assert not out.z_loss.requires_grad
        assert not out.token_accuracy.requires_grad
        capped = 4.0 * torch.tanh(logits.detach().double() / 4.0)
        z = 0.1 * capped.logsumexp(-1).square() * kept
        want = z.sum() / kept.sum() if reduction == "mean" else z.sum()
        torch.testing.assert_close(out.z_loss.double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_is_of_tanh(backend, generator):
    """Loss and gradient of cap·tanh(x / cap), written out in torch; small logits are not rounded to the cap's size."""
    for scale, cap in ((1e-4, 30.0), (3.0, 30.0), (100.0, 30.0), (1.0, 0.7)):
        logits = (torch.randn(ROWS, VOCABULARY, generator=generator) * scale).requires_grad_()
        target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
        exact = logits.detach().double().requires_grad_()
        want = F.cross_entropy(cap * torch.tanh(exact / cap), target)
        with running(backend):
            got = ops.cross_entropy(logits, target, softcap=cap, backend=backend)
            (dx,) = torch.autograd.grad(got, logits)
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(dx.double(), torch.autograd.grad(want, exact)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_predict(backend):
    """As the mean of the loss: NaN. The sum of no z losses is 0, the accuracy of no rows NaN."""
    logits, target = torch.randn(3, VOCABULARY), torch.full((3,), -100)
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        with running(backend):
            out = ops.cross_entropy(logits, target, z_loss=0.1, reduction=reduction, backend=backend, **BOTH)
        for got, want in zip(out, (value, value, math.nan)):
            torch.testing.assert_close(got, torch.tensor(want), equal_nan=True)


@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_label_outside_on_a_device(backend, generator):
    """NaN in the figures of its row, and in those of all rows."""
    logits, target = torch.randn(3, VOCABULARY, generator=generator), torch.tensor([1, VOCABULARY, -100])
    for reduction in ("none", "mean"):
        with running(backend):
            out = ops.cross_entropy(logits, target, reduction=reduction, softcap=3.0, backend=backend, **BOTH)
        wanted = [False, True, False] if reduction == "none" else True
        for value in out:
            assert torch.equal(value.isnan(), torch.tensor(wanted))


def test_modules(generator):
    """nn.CrossEntropyLoss and nn.LinearCrossEntropyLoss pass them on."""
    x = torch.randn(2, 11, 7, generator=generator)
    target = torch.randint(0, 11, (2, 7), generator=generator)
    options = {"z_loss": 0.1, "softcap": 2.0, **BOTH}
    got = nn.CrossEntropyLoss(**options)(x, target)
    for a, b in zip(got, ops.cross_entropy(x.movedim(1, -1), target, **options)):
        assert torch.equal(a, b)
    module = nn.LinearCrossEntropyLoss(7, 11, **options)
    got = module(x[0], target[0, :].new_tensor(range(11)))
    want = ops.linear_cross_entropy(x[0], module.linear.weight, torch.arange(11), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_compiles(generator):
    logits = torch.randn(ROWS, VOCABULARY, generator=generator).requires_grad_()
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)

    def call(logits, target):
        out = ops.cross_entropy(logits, target, softcap=3.0, z_loss=0.1, backend="cpu", **BOTH)
        return out.loss * 2, out.z_loss, out.token_accuracy

    torch._dynamo.reset()
    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        out = function(logits, target)
        results.append((*out, *torch.autograd.grad(out[0], logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("softcap", [0.0, -1.0, math.inf, math.nan])
def test_bad_softcap(softcap):
    with pytest.raises(ValueError, match="softcap: expected a positive finite number"):
        ops.cross_entropy(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), softcap=softcap)
