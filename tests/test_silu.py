"""silu: its contract beyond what every op's tests ask (tests/test_ops.py)."""

import sys
import types

import ptx
import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.bench.peers import PEERS, Unsupported
from fastlm.ops import _registry

BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_zero(backend):
    """The limits 0 and x, slopes 0 and 1, up to the largest floats; a NaN stays one."""
    x = torch.tensor([-1e30, -1e4, -100.0, 20.0, 100.0, 1e4, 1e30, -0.0], requires_grad=True)
    y = ops.silu(x, backend=backend)
    torch.testing.assert_close(y, x.clamp(min=0), atol=1e-38, rtol=1e-6)
    far = torch.cat([x.detach()[:3], x.detach()[4:7]]).requires_grad_()
    ops.silu(far, backend=backend).sum().backward()
    torch.testing.assert_close(far.grad, (far > 0).float(), atol=1e-6, rtol=0)
    assert ops.silu(torch.tensor([torch.nan]), backend=backend).isnan()


def test_slope_does_not_cancel():
    """1 - σ(x) of a large x, times x: to a few units in the last place of float32."""
    x = torch.linspace(-60, 30, 4001, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    ops.silu(x, backend="cpu").sum().backward()
    F.silu(exact).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-7, rtol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_promotes(backend):
    x, gate = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    y = ops.silu(x, gate=gate, backend=backend)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.silu(x.float()) * gate)
    assert ops.silu(x, gate=gate.bfloat16(), backend=backend).dtype == torch.bfloat16


def test_halves_of_one_matrix():
    """A gated MLP's two halves, views of one product, go in without a copy and get one gradient."""
    both = torch.randn(5, 14, requires_grad=True)
    x, gate = both.chunk(2, dim=-1)
    ops.silu(x, gate=gate, backend="cpu").sum().backward()
    want = both.detach().double().requires_grad_()
    (F.silu(want[:, :7]) * want[:, 7:]).sum().backward()
    torch.testing.assert_close(both.grad.double(), want.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("needed", ["x", "gate"])
def test_one_gradient_alone(needed):
    inputs = {"x": torch.randn(4, 6), "gate": torch.randn(4, 6)}
    inputs[needed].requires_grad_()
    ops.silu(**inputs, backend="cpu").sum().backward()
    (want,) = torch.autograd.grad(ops.silu_reference(**inputs).sum(), inputs[needed])
    torch.testing.assert_close(inputs[needed].grad, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(2, 3).long()}, "x: expected a floating-point tensor, got torch.int64"),
        ({"x": torch.tensor(1.0)}, "x: expected at least one dimension"),
        ({"gate": torch.ones(3)}, r"gate: expected shape \(2, 3\), got \(3,\)"),
        ({"gate": torch.ones(2, 3, device="meta")}, "gate: expected on cpu.*got meta"),
        ({"gate": torch.ones(2, 3, dtype=torch.bool)}, "gate: expected a floating-point tensor"),
        ({"backend": "triton"}, 'backend="triton" cannot run silu'),
    ],
)
def test_bad_input(backend, wrong, message):
    with pytest.raises(ValueError, match=message):
        ops.silu(**{"x": torch.ones(2, 3), "backend": backend, **wrong})


def test_rows_that_tritons_grid_does_not_hold():
    """A launch that the device would refuse; `auto` goes on to the next backend."""
    x = torch.zeros(1).expand(65535 * 256 + 1)
    with ptx.triton_on_ptx() as launches:
        with pytest.raises(ValueError, match="its rows have at most 16776960 columns, x has 16776961"):
            ops.silu(x, backend="triton")
        assert _registry.reason("silu", "triton", "cpu", x.dtype, x[:-1]) is None
    assert launches.kernels() == []


def test_liger_is_called_with_its_arguments(monkeypatch):
    """A module with the signature of Liger's gives the op's result; the form without a gate is refused."""
    fake = types.ModuleType("liger_kernel.transformers.functional")
    fake.liger_swiglu = lambda a, b: F.silu(a) * b
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    peer, x, gate = PEERS["silu"]["liger"], torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(peer.function(x, gate=gate), ops.silu(x, gate=gate))
    with pytest.raises(Unsupported, match="gated form alone"):
        peer.function(x)
