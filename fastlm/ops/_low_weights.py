"""Copies of float32 weights in a low dtype, made once a step.

Under autocast torch casts a weight at each use, and its gradient back to float32. `low_copy` returns a copy that
`LowWeights` keeps for a whole step; an op that uses it returns the float32 weight's gradient itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from fastlm import _native


class LowWeights:
    """Copies of a model's weights in autocast's dtype, made anew by `fresh`, of those that `low_copy` was asked for.

    The weights must not change inside the block. A weight that is first asked for there is cast by itself. An optimizer
    that writes the copies together with the weights (`writable`, `wrote`) saves the cast of the next step.
    """

    def __init__(self, parameters):
        self._mine = {id(p) for p in parameters}
        self._copies: dict[torch.Tensor, torch.Tensor] = {}
        self._dtype: torch.dtype | None = None
        self._written: dict[torch.Tensor, tuple[int, int]] = {}  # where an optimizer's copy is that of the weight

    @contextmanager
    def fresh(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, `low_copy` returns the copies. dtype: autocast's."""
        global _current
        if dtype != self._dtype:
            self._copies.clear()
            self._written.clear()
            self._dtype = dtype
        stale = self._stale()
        if stale:
            with torch.no_grad():
                torch._foreach_copy_(list(stale.values()), list(stale))
        before, _current = _current, self
        try:
            yield
        finally:
            _current = before

    def _stale(self) -> dict[torch.Tensor, torch.Tensor]:
        """The copies that are not, or may not be, those of their weights as these are now."""
        stale, written = {}, []
        for w, copy in self._copies.items():
            if self._written.get(w) == _state(w):
                written.append((w, copy, w.numel()))
            else:
                stale[w] = copy
        if written and _native.cpu().changed_copy(copies=written, samples=_SAMPLES) >= 0:
            self._written.clear()  # changed unseen by autograd, perhaps others too
            return self._copies
        return stale

    def get(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The copy in `dtype`; None where the weight is another model's, or the block of another dtype."""
        weight = _whole(weight)
        if dtype != self._dtype or id(weight) not in self._mine:
            return None
        copy = self._copies.get(weight)
        if copy is None:
            copy = self._copies[weight] = weight.detach().to(dtype)
        return copy

    def writable(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The bfloat16 copy that an optimizer may write with the weight, element for element; None: there is none."""
        copy = self._copies.get(weight)
        return copy if copy is not None and copy.dtype == torch.bfloat16 and copy.stride() == weight.stride() else None

    def wrote(self, weights: Iterable[torch.Tensor]) -> None:
        """Says that the copies of these, float32 on a CPU, are those of the weights as they are now, until they change.

        A change that autograd does not count, as through `weight.data` or by a fused optimizer of torch, is noticed by
        some elements of each weight: one that leaves those as they are is not.
        """
        self._written.update((w, _state(w)) for w in weights)


_SAMPLES = 8  # elements of a weight, evenly apart in memory

# Not of a thread: a checkpointed layer runs again in a thread of autograd's.
_current: LowWeights | None = None


def _state(weight: torch.Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """The tensor that `weight` is a view of, where it is a view of all of it: a tied table is one."""
    base = weight._base
    return base if base is not None and base.shape == weight.shape and base.stride() == weight.stride() else weight


def low_copy(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` in `dtype`, without a gradient: the copy of the step, or one of its own."""
    known = _current is not None and not torch.compiler.is_compiling()
    copy = _current.get(weight, dtype) if known else None
    return weight.detach().to(dtype) if copy is None else copy
