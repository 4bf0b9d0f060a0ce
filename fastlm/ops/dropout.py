"""dropout, or a ReLU and then dropout, in one pass.

    y = mask * x, or mask * max(x, 0);   mask is 0 with probability p, else 1/(1-p)
The mask is a function of (seed, step), the call site, and an element's row and column (fastlm/ops/_random.py).

Backward: dx = mask * dy, with the mask drawn again. With a ReLU, dx = dy/(1-p) where y > 0, else 0, without the mask.
Saved: rng; with a ReLU y instead, which the matrix product after it saves in any case.

Source: Srivastava et al. 2014 (JMLR 15), with the scale applied in training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlm.ops import _checks, _random, _registry

__all__ = ["dropout", "dropout_reference"]


def dropout_reference(x, p=0.5, *, rng=None, site=0, relu=False):
    """y in plain differentiable torch, in the dtype of x. Arguments as of `dropout`."""
    return _random.dropout_rows(torch.relu(x) if relu else x, p, rng, site)


# ---- the raw ops


class Args(NamedTuple):
    x: torch.Tensor  # (..., cols)
    p: float
    rng: torch.Tensor | None
    site: int
    relu: bool


class Saved(NamedTuple):
    y: torch.Tensor | None  # with a ReLU; then rng is not read
    p: float
    rng: torch.Tensor | None
    site: int


class BackwardArgs(NamedTuple):
    dy: torch.Tensor  # like x
    saved: Saved


def empty_forward(args: Args) -> torch.Tensor:
    return torch.empty_like(args.x, memory_format=torch.contiguous_format)


def empty_backward(args: BackwardArgs) -> torch.Tensor:
    return torch.empty_like(args.dy, memory_format=torch.contiguous_format)


def _save(args: Args, y) -> Saved:
    return Saved(y if args.relu else None, args.p, None if args.relu else args.rng, args.site)


def _backward(saved: Saved, needs: Args, backend, dy):
    return {"x": _registry.call("dropout_bwd", BackwardArgs(dy, saved), backend)}


_registry.page(__name__, "dropout")
_registry.define("dropout_fwd", Args, empty_forward)
_registry.define("dropout_bwd", BackwardArgs, empty_backward)
_registry.differentiable("dropout_fwd", _save, _backward)


# ---- public


def dropout(
    x: torch.Tensor,
    p: float = 0.5,
    *,
    rng: torch.Tensor | None = None,
    site: int = 0,
    relu: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """y = dropout(x), or with `relu` dropout(max(x, 0)).

    Args:
        x: (..., cols), floating point, any strides (a unit last one saves a copy).
        p: probability of dropping an element; a kept one is multiplied by 1/(1-p). With p = 0 and no relu, y is x.
        rng: int64 (2,), (seed, step), on the device; None draws from torch's generator. See fastlm.ops._random.
        site: number of this call site; it makes the dropouts of one step differ.
        relu: whether a ReLU comes first; its result is not stored.
        backend: "auto", "reference", "cpu", "triton".

    Returns y, like x. Raises ValueError for a wrong shape, dtype or device, and for a named backend that cannot run.
    """
    _checks.is_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    _checks.probability("p", p)
    if p > 0.0 or rng is not None:
        _checks.is_rng(rng, site, x.device)
    backend = _registry.choose("dropout", backend, x)
    if p == 0.0 and not relu:
        return x
    rng = _random.draw_rng(rng, p, x.device)
    if backend == "reference":
        return dropout_reference(x, p, rng=rng, site=site, relu=relu)
    return _registry.call("dropout_fwd", Args(x, p, rng, site, bool(relu)), backend)
