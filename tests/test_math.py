"""csrc/cpu/math.h: the errors in its table, over floats of every magnitude, and special values."""

import math

import pytest
import torch

from fastlm import _native

# name -> (exact function in float64, range, promised error in units in the last place)
FUNCTIONS = {
    "exp": (torch.exp, (-86.98, 88.8), 1.2),
    "expm1_neg": (torch.expm1, (-86.98, 0.0), 1.0),
    "erf": (torch.erf, (-math.inf, math.inf), 3.1),
    "tanh": (torch.tanh, (-math.inf, math.inf), 2.5),
}


def evaluate(name, x):
    y = torch.empty_like(x)
    getattr(_native.cpu(), f"{name}_array")(x.data_ptr(), y.data_ptr(), x.numel())
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error(name):
    exact, (low, high), promised = FUNCTIONS[name]
    x = torch.arange(0, 2**32, 1201).to(torch.uint32).view(torch.float32)  # every exponent, both signs
    x = torch.cat([x[(x >= low) & (x <= high)], torch.linspace(max(low, -12), min(high, 12), 1_000_003)])
    want, got = exact(x.double()), evaluate(name, x).double()
    _, exponent = torch.frexp(want)
    ulp = torch.ldexp(torch.ones_like(want), (exponent - 24).clamp_min(-149))
    finite = want.abs() <= torch.finfo(torch.float32).max
    assert got[~finite].isinf().all()
    assert ((got - want).abs() / ulp)[finite].max().item() <= promised


def test_special_values():
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    assert torch.equal(evaluate("exp", x)[1:], torch.tensor([math.inf, 0.0, 1.0, 1.0]))
    for name in ("erf", "tanh"):
        assert torch.equal(evaluate(name, x)[1:], torch.tensor([1.0, -1.0, 0.0, -0.0]))
        assert evaluate(name, x)[4].signbit()
    assert all(evaluate(name, x)[0].isnan() for name in ("exp", "erf", "tanh"))
