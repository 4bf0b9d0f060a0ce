"""gelu beyond its OpCase, which tests/test_ops.py tests."""

import ptx
import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops import _registry

BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_zero(backend, approximate):
    """The limits 0 and x, slopes 0 and 1, up to the largest floats; a NaN stays one."""
    x = torch.tensor([-1e30, -1e4, -100.0, -12.0, 12.0, 100.0, 1e4, 1e30, -0.0], requires_grad=True)
    y = ops.gelu(x, approximate=approximate, backend=backend)
    assert torch.equal(y, x.clamp(min=0))
    near = x.detach()[1:7].requires_grad_()  # beyond, the tanh form's h² overflows, in torch too
    ops.gelu(near, approximate=approximate, backend=backend).sum().backward()
    torch.testing.assert_close(near.grad, (near > 0).float(), atol=1e-6, rtol=0)
    assert ops.gelu(torch.tensor([torch.nan]), approximate=approximate, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_does_not_promote_and_gate_does(backend):
    torch.manual_seed(0)
    x, bias, gate = torch.randn(3, 8).bfloat16(), torch.randn(8), torch.randn(3, 8)
    assert ops.gelu(x, bias, backend=backend).dtype == torch.bfloat16
    y = ops.gelu(x, bias, gate=gate, backend=backend)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.gelu(x.float() + bias) * gate)


def test_halves_of_one_matrix():
    """A gated MLP's two halves, views of one product, go in without a copy and get one gradient."""
    both = torch.randn(5, 14, requires_grad=True)
    x, gate = both.chunk(2, dim=-1)
    ops.gelu(x, gate=gate, backend="cpu").sum().backward()
    want = both.detach().double().requires_grad_()
    (F.gelu(want[:, :7]) * want[:, 7:]).sum().backward()
    torch.testing.assert_close(both.grad.double(), want.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(2, 3).long()}, "x: expected a floating-point tensor, got torch.int64"),
        ({"x": torch.tensor(1.0)}, "x: expected at least one dimension"),
        ({"bias": torch.ones(2)}, r"bias: expected shape \(3,\), got \(2,\)"),
        ({"bias": torch.ones(3, device="meta")}, "bias: expected on cpu.*got meta"),
        ({"bias": torch.ones(3, dtype=torch.bool)}, "bias: expected a floating-point tensor"),
        ({"gate": torch.ones(3)}, r"gate: expected shape \(2, 3\), got \(3,\)"),
        ({"approximate": "erf"}, "approximate: expected one of 'none', 'tanh', got 'erf'"),
        ({"backend": "triton"}, 'backend="triton" cannot run gelu'),
    ],
)
def test_bad_input(backend, wrong, message):
    with pytest.raises(ValueError, match=message):
        ops.gelu(**{"x": torch.ones(2, 3), "backend": backend, **wrong})


def test_rows_that_tritons_grid_does_not_hold():
    """A launch that the device would refuse; `auto` goes on to the next backend."""
    x = torch.zeros(1).expand(65535 * 256 + 1)
    with ptx.triton_on_ptx() as launches:
        with pytest.raises(ValueError, match="its rows have at most 16776960 columns, x has 16776961"):
            ops.gelu(x, backend="triton")
        assert _registry.reason("gelu", "triton", "cpu", x.dtype, x[:-1]) is None
    assert launches.kernels() == []
