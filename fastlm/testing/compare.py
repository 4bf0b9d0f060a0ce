"""Is a result as good as eager PyTorch's?

Error is taken against float64. Per tensor, over all seeds together, maximum and RMS error may each be at most twice
eager PyTorch's in the same dtype, plus one rounding of the largest value, eps·max|ref|.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Errors:
    """Running maximum and mean square of |value - reference|, and of the reference's size."""

    maximum: float = 0.0
    square: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, value: torch.Tensor, reference: torch.Tensor) -> None:
        if value.numel() == 0:
            return
        value, reference = value.double().cpu(), reference.double().cpu()
        # An infinity in the reference has to be met exactly; a NaN never passes.
        error = torch.where(value == reference, 0.0, (value - reference).abs())
        error = torch.where(error.isnan(), torch.inf, error)
        finite = reference[reference.isfinite()].abs()
        self.maximum = max(self.maximum, error.max().item())
        self.square += error.square().sum().item()
        self.count += error.numel()
        self.largest = max(self.largest, finite.max().item() if finite.numel() else 0.0)

    @property
    def rms(self) -> float:
        return (self.square / self.count) ** 0.5 if self.count else 0.0


@dataclass
class Comparison:
    """Collects (ours, eager, float64) triples of named tensors; `failures()` lists those outside the bound."""

    factor: float = 2.0
    ours: dict[str, Errors] = field(default_factory=dict)
    eager: dict[str, Errors] = field(default_factory=dict)
    eps: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
        """Tensors of one name over several seeds are judged together. The rounding is that of `ours`'s dtype."""
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
        self.ours.setdefault(name, Errors()).add(ours, exact)
        self.eager.setdefault(name, Errors()).add(eager, exact)
        self.eps[name] = torch.finfo(ours.dtype).eps

    def failures(self) -> list[str]:
        out = []
        for name, ours in self.ours.items():
            eager, rounding = self.eager[name], self.eps[name] * ours.largest
            for kind in ("maximum", "rms"):
                got, theirs = getattr(ours, kind), getattr(eager, kind)
                bound = self.factor * theirs + rounding
                if not got <= bound:
                    out.append(
                        f"{name}: {kind} error {got:.3g} > {bound:.3g} "
                        f"= {self.factor:g}·{theirs:.3g} (eager's) + {rounding:.3g}"
                    )
        return out


@dataclass
class ModelComparison(Comparison):
    """The bound of whole models and modules: RMS error at most four times eager's; a loss may add one rounding.

    A gradient that is exactly zero (a key's bias) is noise in both: compare it in one tensor with its neighbours.
    """

    factor: float = 4.0
    scalars: set[str] = field(default_factory=set)

    def add(self, name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
        super().add(name, ours, eager, exact)
        if ours.dim() == 0:
            self.scalars.add(name)

    def failures(self) -> list[str]:
        out = []
        for name, ours in self.ours.items():
            theirs, rounding = self.eager[name].rms, self.eps[name] * ours.largest * (name in self.scalars)
            if not ours.rms <= self.factor * theirs + rounding:
                out.append(
                    f"{name}: RMS error {ours.rms:.3g} > {self.factor:g}·{theirs:.3g} (eager's) + {rounding:.3g}"
                )
        return out
