"""Muon: momentum whose matrices are orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

For a matrix W (rows, columns) with gradient G:

    M = μ M + G;   U = G + μ M  (Nesterov)
    O = NewtonSchulz5(U), near U V^T of the singular value decomposition U Σ V^T of U
    W = (1 - lr·decay) W - lr · 0.2 √max(rows, columns) · O

The factor gives O the root mean square that AdamW's updates have, so that both take one learning rate and decay (Liu et
al. 2025, arXiv:2502.16982, section 2.2). A fused projection (q, k and v in one matrix) is orthogonalized part by part.

torch.optim.Muon has the same update, for whole matrices and without `grad_scale` and `found_inf`, by which a step is
clipped and skipped without the host (`fastlm.train.optimizer`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastlm import _native
from fastlm.ops._products import transposed_mm
from fastlm.train.adamw import takes
from fastlm.train.scaled import Scaled

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x³, x⁵: Jordan's, whose slope at 0 is the steepest
_ITERATIONS = 5
_RMS = 0.2  # of AdamW's updates, as measured by Liu et al.


def orthogonalize(matrix: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(..., rows, columns) with singular values between 0.7 and 1.2 in place of those of `matrix`; float32.

    Five iterations of a quintic of odd powers, X = a X + b (X X^T) X + c (X X^T)² X. dtype: theirs; by default bfloat16
    on a GPU, which they were designed for, and float32 on a CPU, many of which multiply bfloat16 no faster.
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrix.is_cuda else torch.float32
    return _iterate(matrix.to(dtype).reshape(-1, *matrix.shape[-2:])).float().reshape(matrix.shape)


def _iterate(x: torch.Tensor) -> torch.Tensor:
    """`orthogonalize` of x (n, rows, columns), in its dtype."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    if x.dtype == torch.float32 and max(x.shape[-2:]) >= 2 * min(x.shape[-2:]):
        return _by_gram(x.mT).mT if tall else _by_gram(x)
    if x.is_cpu and x.dtype == torch.bfloat16:
        return torch.stack([_iterate_low(matrix) for matrix in x])
    for _ in range(_ITERATIONS):  # the smaller of both products of X with itself
        gram = x.mT @ x if tall else x @ x.mT
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, p, beta=a) if tall else torch.baddbmm(x, p, x, beta=a)
    return x


def _iterate_low(x: torch.Tensor) -> torch.Tensor:
    """The same for one matrix in bfloat16 on a CPU, where torch copies a transposed matrix of a batch."""
    a, b, c = _COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    for _ in range(_ITERATIONS):
        gram = transposed_mm(x, x) if tall else x @ x.t()
        p = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, x, p, beta=a) if tall else torch.addmm(x, p, x, beta=a)
    return x


def _by_gram(x: torch.Tensor) -> torch.Tensor:
    """The same for x (n, rows, columns), by products of rows x rows alone but for the first and the last.

    An iteration is P X with P = a + b G + c G² and G = X X^T, so G becomes P G P, and the result is the product of all
    P times X. It takes half of the time for 128 x 512 on a CPU. bfloat16 is too coarse for G, which has the squares of
    the singular values.
    """
    a, b, c = _COEFFICIENTS
    gram, product = x @ x.mT, None
    for iteration in range(_ITERATIONS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else p @ product
        if iteration < _ITERATIONS - 1:
            gram = p @ gram @ p
    return product @ x


class Muon(Scaled):
    """Muon for matrices. Each group may have `parts`: how many equal blocks of rows a matrix is made of, default 1.

    `grad_scale` and `found_inf` as of `Scaled`.

    ValueError for parameters of other than two dimensions, or rows that `parts` does not divide, and for another dtype.

    shards: with parameters that are this process's rows of matrices, the `fastlm.train.parallel.Shards` that knows the
        others'. Every process then orthogonalizes the whole matrix, and keeps its rows.
    dtype: of the iterations, see `orthogonalize`.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        shards=None,
        dtype: torch.dtype | None = None,
    ):
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype: expected None, float32 or bfloat16, got {str(dtype).removeprefix('torch.')}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.shards, self.dtype = shards, dtype
        for group in self.param_groups:
            for p in group["params"]:
                rows = p.shape[0] if shards is None else shards.rows(p)
                if p.dim() != 2 or rows % group["parts"]:
                    raise ValueError(
                        f"params: expected matrices whose rows {group['parts']} parts divide, got {tuple(p.shape)}; "
                        "give others to AdamW"
                    )

    def update_all(self) -> None:
        if self.shards is not None or not takes(p for group in self.param_groups for p in group["params"]):
            return super().update_all()
        if self.found_inf is not None and self.found_inf.item():
            return None
        scale = 1.0 if self.grad_scale is None else self.grad_scale.item()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update_on_cpu(p, self._state_of(p), group, scale)
        return None

    def _update_on_cpu(self, p, state, group, scale) -> None:
        """The same update, with one pass over memory before the iterations and one after, csrc/cpu/muon.cpp."""
        dtype, momentum, lr = self.dtype or torch.float32, state["momentum"], group["lr"]
        w, gradient, m = (t if t.is_contiguous() else t.contiguous() for t in (p, p.grad, momentum))
        rows, columns = p.shape[0] // group["parts"], p.shape[1]
        direction = p.new_empty(group["parts"], rows, columns, dtype=dtype)
        codes, threads = _native.DTYPE_CODES, _native.threads()
        _native.cpu().muon_direction(
            g=gradient,
            m=m,
            u=direction,
            n=p.numel(),
            gradient=1.0 / scale,
            momentum=group["momentum"],
            gradient_dtype=codes[gradient.dtype],
            dtype=codes[dtype],
            threads=threads,
        )
        copy = None if self.low_weights is None or w is not p else self.low_weights.writable(p)
        _native.cpu().muon_update(
            w=w,
            o=_iterate(direction).contiguous(),
            low=copy,
            n=p.numel(),
            decay=1.0 - lr * group["weight_decay"],
            step=lr * _RMS * max(rows, columns) ** 0.5,
            dtype=codes[dtype],
            threads=threads,
        )
        for to, of in ((p, w), (momentum, m)):
            if to is not of:
                to.copy_(of)
        torch.autograd.graph.increment_version([t for t in (p, momentum, copy) if t is not None])
        if copy is not None:
            self.low_weights.wrote((p,))

    def _state_of(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def update(self, p, gradient, state, group):
        state = self._state_of(p)
        momentum = torch.add(gradient, state["momentum"], alpha=group["momentum"])
        direction = torch.add(gradient, momentum, alpha=group["momentum"])
        if self.shards is not None:
            direction = self.shards.whole(direction, p)
        rows, columns = direction.shape[0] // group["parts"], p.shape[1]
        step = orthogonalize(direction.unflatten(0, (group["parts"], rows)), self.dtype).flatten(0, 1)
        if self.shards is not None:
            step = self.shards.part(step)
        new = p * (1 - group["lr"] * group["weight_decay"]) - step * (group["lr"] * _RMS * max(rows, columns) ** 0.5)
        return new, {"momentum": momentum}


class Together(torch.optim.Optimizer):
    """Several optimizers, each of other parameters, as one: what sets `grad_scale` and steps sees no difference."""

    grad_scale = found_inf = low_weights = None

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        self.low_gradients = all(getattr(optimizer, "low_gradients", False) for optimizer in self.optimizers)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.state = _States(self.optimizers)
        self.defaults = {}

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.grad_scale, optimizer.found_inf = self.grad_scale, self.found_inf
            optimizer.low_weights = self.low_weights
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class _States:
    """The states of several optimizers by parameter, as one mapping."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self._home = {
            p: optimizer.state for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
        }

    def __getitem__(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._home[parameter][parameter]

    def items(self):
        return ((p, states[p]) for p, states in self._home.items() if p in states)
