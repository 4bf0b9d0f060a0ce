"""Forward and backward of one micro-batch, with the weights cast once for all micro-batches of a step."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from fastlm.nn.linear import LowWeights
from fastlm.tasks import Micro

_copies: weakref.WeakKeyDictionary[nn.Module, LowWeights] = weakref.WeakKeyDictionary()


def low_weights(model: nn.Module, dtype: torch.dtype) -> AbstractContextManager:
    """The block of a step, at whose begin the weights of `model` are cast to `dtype`; they must not change inside.

    Not for a sharded model, whose weights exist as a whole only while its layers run.
    """
    if dtype == torch.float32:
        return nullcontext()
    if model not in _copies:
        _copies[model] = LowWeights(model.parameters())
    return _copies[model].fresh(dtype)


def forward_backward(model: nn.Module, micro: Micro, dtype: torch.dtype) -> torch.Tensor:
    """Adds the gradients of the sum of the losses to the parameters' .grad; returns that sum, float32."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = model(**micro.inputs)
    loss.backward()
    return loss.detach().float()
