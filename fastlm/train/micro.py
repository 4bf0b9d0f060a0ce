"""Forward and backward of one micro-batch, with the weights cast once for all micro-batches of a step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from fastlm.ops._low_weights import LowWeights
from fastlm.tasks import Micro

_copies: weakref.WeakKeyDictionary[nn.Module, LowWeights] = weakref.WeakKeyDictionary()


def copies_of(model: nn.Module, dtype: torch.dtype) -> LowWeights | None:
    """The copies of the weights of `model` that `low_weights` makes; None in float32."""
    if dtype == torch.float32:
        return None
    if model not in _copies:
        _copies[model] = LowWeights(model.parameters())
    return _copies[model]


def low_weights(model: nn.Module, dtype: torch.dtype) -> AbstractContextManager:
    """The block of a step, at whose begin the weights of `model` are cast to `dtype`; they must not change inside.

    Not for a sharded model, whose weights exist as a whole only while its layers run.
    """
    copies = copies_of(model, dtype)
    return nullcontext() if copies is None else copies.fresh(dtype)


@contextmanager
def low_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, a .grad has the dtype that backward computes it in. Afterwards no parameter has a .grad.

    For a step of one micro-batch: a sum over several is float32 (torch casts to the dtype of the parameter). A weight's
    gradient in bfloat16, which was cast to float32, takes half of the bytes for the same numbers.
    """
    parameters = list(parameters)
    for p in parameters:
        p.grad_dtype = None
    try:
        yield
    finally:
        for p in parameters:
            p.grad = None
            p.grad_dtype = p.dtype


def forward_backward(model: nn.Module, micro: Micro, dtype: torch.dtype) -> torch.Tensor:
    """Adds the gradients of the sum of the losses to the parameters' .grad; returns that sum, float32."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = model(**micro.inputs)
    loss.backward()
    return loss.detach().float()
