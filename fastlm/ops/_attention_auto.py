"""Inputs of attention for which "auto" leaves its order of backends, by what was measured."""

from __future__ import annotations

import torch

from fastlm.ops._preferences import Preference


def sdpa_is_faster(q, packed=False, dropout=False, bias=False, masked=True, gradient=True, **features) -> bool:
    """The forward of an H100 on full rows; the numbers are in fastlm/ops/_sdpa/attention.py.

    masked: whether a query may see other keys than all, or all up to its own. gradient: whether one is needed.
    """
    if packed or dropout or bias or masked or gradient or torch.compiler.is_compiling():
        return False
    return q.shape[-1] in (64, 128)


PREFER = (
    Preference(
        device="cuda",
        backend="sdpa",
        sm=90,
        dtypes=(torch.bfloat16, torch.float16),
        shape=((1, 512, None),),
        applies=sdpa_is_faster,
        why="on sm_90, for padded 16-bit input of 512 tokens or more and d 64 or 128, without mask, window, bias, "
        "softcap, dropout and gradient: cuDNN's forward is 1.4 times as fast there",
    ),
)
