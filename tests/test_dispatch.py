"""_registry.call: it bypasses the dispatcher only if nothing else has to see the call."""

import functools
import importlib.util
import os
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import _native, ops
from fastlm.ops import _registry
from fastlm.ops.gelu import Args
from fastlm.testing import checks
from fastlm.testing.cases import CASES

pytestmark = pytest.mark.skipif(_native.missing_cpu() is not None, reason=str(_native.missing_cpu()))
X, BIAS = torch.linspace(-2, 2, 12).view(3, 4), torch.tensor([0.5, 0.0, -1.0, 2.0])


def gelu(x=X, bias=BIAS):
    return ops.gelu(x, bias, backend="cpu")


@pytest.fixture
def raw():
    """The raw op, as what `call` would take from torch.ops; it still runs."""
    op = torch.ops.fastlm.gelu_fwd
    with mock.patch.object(torch.ops.fastlm, "gelu_fwd", mock.Mock(side_effect=op)) as recorded:
        yield recorded


@pytest.mark.parametrize("case", [case for case in CASES.values() if "cpu" in _registry.backends(case.op)])
def test_both_ways_give_the_same_bits(case):
    """Outputs and gradients, with the dispatcher and without."""
    variant = case.tests[0]
    inputs = case.inputs(variant, 0, torch.float32)
    direct = case.everything(case.function, variant, inputs, 0, backend="cpu")
    with mock.patch.object(_registry, "_profiled", return_value=True):
        checks.assert_same_bits(direct, case.everything(case.function, variant, inputs, 0, backend="cpu"), case.op)


def test_plain_tensors_pass_the_dispatcher_by(raw):
    x = X.clone().requires_grad_()
    for y in (gelu(), gelu(x), gelu(torch.nn.Parameter(X))):
        assert torch.equal(y, gelu())
        assert y.requires_grad == (y.grad_fn is not None)
    assert torch.autograd.grad(gelu(x).sum(), x)[0].isfinite().all()
    with torch.inference_mode():
        assert torch.equal(gelu(), gelu())
    with torch.no_grad():
        assert not gelu(x).requires_grad
    raw.assert_not_called()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_who_looks_on_sees_the_op():
    with Seen() as seen:
        gelu()
    assert "fastlm::gelu_fwd" in seen.names
    with torch.profiler.profile() as profile:
        gelu()
    assert "fastlm::gelu_fwd" in {event.key for event in profile.key_averages()}
    traced = make_fx(lambda x: gelu(x))(X)
    assert torch.ops.fastlm.gelu_fwd.default in {node.target for node in traced.graph.nodes}


def test_what_is_no_plain_tensor_takes_the_dispatcher(raw):
    def took_it():
        called = raw.called
        raw.reset_mock()
        return called

    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(gelu(), torch._subclasses.FakeTensor)
    assert took_it()
    assert isinstance(gelu(X.as_subclass(Subclass)), Subclass)
    assert took_it()
    negative = torch.complex(X, X).conj().imag  # -X, and memory holds X
    assert negative.is_neg()
    assert torch.equal(gelu(negative), gelu(-X))
    assert took_it()
    with Functions():
        gelu()
    assert took_it()
    with pytest.raises(ValueError, match=r"fastlm::gelu_fwd: backend is one of .*'nonsense'"):
        _registry.call("gelu_fwd", Args(X, BIAS, None, tanh=False), "nonsense")


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(requires_grad):
    """Not answered with a derivative of 0; without tangents, a dual level is nothing to the op."""
    x = X.clone().requires_grad_(requires_grad)
    with forward_ad.dual_level():
        assert torch.equal(gelu(x), gelu(X))
        with pytest.raises(NotImplementedError, match=r"fastlm::gelu_fwd has no forward-mode derivative"):
            gelu(forward_ad.make_dual(x, torch.ones_like(X)))
    with pytest.raises(NotImplementedError, match=r"fastlm::gelu_fwd has no forward-mode derivative"):
        torch.func.jvp(gelu, (x,), (torch.ones_like(X),))


def test_gradients_by_torch_func_are_refused():
    for differentiate in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))):
        with pytest.raises(NotImplementedError, match=r"fastlm::gelu_fwd cannot be differentiated by torch\.func"):
            differentiate(lambda x: gelu(x).sum())(X)
    want = torch.func.grad(lambda x: ops.gelu(x, BIAS, backend="reference").sum())(X)
    torch.testing.assert_close(want, torch.autograd.grad(gelu(x := X.clone().requires_grad_()).sum(), x)[0])


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_first_call_may_be_compiled(dynamic, monkeypatch):
    """The adapters are imported while Dynamo traces; after a graph break or with dynamic shapes it traces again."""
    monkeypatch.delitem(sys.modules, "fastlm.ops._cpu.gelu", raising=False)
    monkeypatch.delattr(_registry._PACKAGES["cpu"], "gelu", raising=False)
    monkeypatch.setattr(_registry._raw["gelu_fwd"], "implementations", {})

    def two(x):
        y = ops.gelu(x, BIAS)
        if dynamic is None:
            torch._dynamo.graph_break()
        return ops.gelu(y)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(two, backend="eager", dynamic=dynamic)(X), ops.gelu(gelu()))


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_availability_is_a_constant_of_a_graph(backend, monkeypatch):
    """On a machine that has the device, whose search for it Dynamo could not trace; nothing is known beforehand."""
    gpu = SimpleNamespace(capability=90, name="fake")
    module = SimpleNamespace(devices=lambda: [gpu] if os.listdir("/") else [], architectures=lambda: "800,900")
    monkeypatch.setattr(_native, "_cuda", lambda: (module, None))
    monkeypatch.setattr(_native, "missing_cuda", functools.cache(_native.missing_cuda.__wrapped__))
    monkeypatch.setattr(_registry, "_triton_installed", functools.cache(_registry._triton_installed.__wrapped__))
    device = "cpu" if backend == "cpu" else "cuda"

    def f(x):
        return x + 1 if _registry.reason("layer_norm", backend, device, x.dtype) is None else x

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, backend="eager", fullgraph=True)(X), f(X))
    if backend != "triton" or importlib.util.find_spec("triton"):
        assert torch.equal(f(X), X + 1)


def test_compiled_graphs_hold_the_op():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    assert torch.equal(torch.compile(gelu, backend=backend, fullgraph=True)(X), gelu())
    assert any("gelu_fwd" in str(node.target) for node in graphs[0].graph.nodes)
