"""Inputs of attention for which "auto" leaves its order of backends, by what was measured."""

from __future__ import annotations

import functools

import torch

from fastlm.ops._registry import Preference

_capability = functools.cache(torch.cuda.get_device_capability)


def sdpa_is_faster(q, packed=False, dropout=False, bias=False, masked=True, gradient=True, **features) -> bool:
    """The forward of an H100 on full rows; the numbers are in fastlm/ops/_sdpa/attention.py.

    masked: whether a query may see other keys than all, or all up to its own. gradient: whether one is needed.
    """
    if packed or dropout or bias or masked or gradient or torch.compiler.is_compiling():
        return False
    sixteen_bit = q.dtype in (torch.bfloat16, torch.float16)
    return sixteen_bit and q.shape[-1] in (64, 128) and q.shape[1] >= 512 and _capability(q.device) == (9, 0)


PREFER = (
    Preference(
        device="cuda",
        backend="sdpa",
        applies=sdpa_is_faster,
        why="on sm_90, for padded 16-bit input of 512 tokens or more and d 64 or 128, without mask, window, bias, "
        "softcap, dropout and gradient: cuDNN's forward is 1.4 times as fast there",
    ),
)
