"""cross_entropy(inplace=True) and autograd: the gradient lies where the logits were."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_head import ROWS, VOCABULARY, eager_gradient, make_head

from fastlm import ops


@pytest.fixture
def head():
    return make_head(torch.Generator().manual_seed(0))


def test_inplace_memory(head):
    """The gradient lies in the memory of the logits, from the forward on, and stays there in backward."""
    hidden, weight, target = head
    logits = hidden @ weight.t()
    address, seen = logits.data_ptr(), []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    (want,) = torch.autograd.grad(F.cross_entropy(other := logits.detach().clone().requires_grad_(), target), other)
    loss = ops.cross_entropy(logits, target, inplace=True, backend="cpu")
    torch.testing.assert_close(logits.detach(), want)
    (loss * 0.5).backward()
    assert seen == [address] == [logits.data_ptr()]
    torch.testing.assert_close(logits.detach(), want * 0.5)
    torch.testing.assert_close(weight.grad, eager_gradient(hidden, weight, target) * 0.5)


def test_inplace_strides(head):
    """Rows of a wider tensor, and columns that lie together, where the memory has no rows to overwrite."""
    hidden, weight, target = head
    for wide in ((hidden @ weight.t()).repeat(1, 2)[:, :VOCABULARY], (weight @ hidden.t()).t()):
        assert wide._base is not None
        loss = ops.cross_entropy(wide, target, inplace=True, backend="cpu")
        (gradient,) = torch.autograd.grad(loss * 3, weight)
        torch.testing.assert_close(gradient, 3 * eager_gradient(hidden, weight, target))


def test_inplace_other_uses(head):
    """Logits that are used elsewhere in the graph, before or after, or written, raise; they are never wrong."""
    hidden, weight, target = head

    def losses(view):
        logits = hidden @ weight.t()
        return logits, lambda: ops.cross_entropy(logits.view(1, ROWS, -1) if view else logits, t, inplace=True)

    for view in (False, True):
        t = target.view(1, ROWS) if view else target
        logits, loss = losses(view)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (logits.square().sum() + loss()).backward()
        logits, loss = losses(view)
        with pytest.raises(RuntimeError, match="overwritten its logits"):
            (loss() + logits.sum()).backward()
        logits, loss = losses(view)
        value = loss()
        with torch.no_grad():
            logits.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
        _, loss = losses(view)
        loss().backward()  # and without another use there is no error


def test_inplace_leaf_and_no_grad(head):
    hidden, weight, target = head
    logits = (hidden @ weight.t()).detach()
    before = logits.clone()
    for leaf in (logits.clone().requires_grad_(), logits.clone().requires_grad_().view(ROWS, VOCABULARY)):
        with pytest.raises(ValueError, match=r"inplace: .* leaf"):
            ops.cross_entropy(leaf, target, inplace=True)
    ops.cross_entropy(logits, target, inplace=True)  # no gradient, nothing to write
    assert torch.equal(logits, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_backward_twice(head, inplace):
    """A graph that is kept gives the right gradient every time."""
    hidden, weight, target = head
    want = eager_gradient(hidden, weight, target)
    loss = ops.cross_entropy(hidden @ weight.t(), target, inplace=inplace, backend="cpu")
    linear = ops.linear_cross_entropy(hidden, weight, target, backend="cpu")
    for keep in (True, True, False):
        for value in (loss, linear):
            (gradient,) = torch.autograd.grad(value * 2, weight, retain_graph=keep)
            torch.testing.assert_close(gradient, 2 * want)
    with pytest.raises(RuntimeError, match=r"second time|modified by an inplace"):
        torch.autograd.grad(loss, weight)


def test_inplace_compiles(head):
    """Within a graph, and with the logits as its input, whose memory then holds the gradient."""
    hidden, weight, target = head
    want = eager_gradient(hidden, weight, target)

    def whole(hidden, weight, target):
        return ops.cross_entropy(hidden @ weight.t(), target, inplace=True, backend="cpu") * 2

    def loss_alone(logits, target):
        return ops.cross_entropy(logits, target, inplace=True, backend="cpu") * 2

    torch._dynamo.reset()
    (gradient,) = torch.autograd.grad(torch.compile(whole, fullgraph=True)(hidden, weight, target), weight)
    torch.testing.assert_close(gradient, 2 * want)
    logits = hidden @ weight.t()
    before = logits.detach().clone()
    loss = torch.compile(loss_alone, fullgraph=True)(logits, target)
    assert not torch.equal(logits.detach(), before)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], 2 * want)


def test_inplace_schema(head):
    """The raw op declares what it writes."""
    hidden, weight, target = head
    args = ((hidden @ weight.t()).detach(), target, None, -100, 0.1, 0.0, 0.0, "mean", False, "cpu")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastlm.cross_entropy_fwd_.default, args, test_utils=checks)
    logits = args[0].clone()
    version = logits._version
    torch.ops.fastlm.cross_entropy_fwd_(logits, *args[1:])
    assert logits._version == version + 1


def test_inplace_refuses_rows_that_share_memory():
    logits = (torch.randn(5, requires_grad=True) * 2).expand(4, 5)
    with pytest.raises(ValueError, match=r"inplace: .*strides \(0, 1\)"):
        ops.cross_entropy(logits, torch.zeros(4, dtype=torch.long), inplace=True)
