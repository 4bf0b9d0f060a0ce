"""Inputs of attention for which "auto" leaves its order of backends, by what was measured, and those for which the
kernels of sm_90a run, by prediction."""

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


# Fewer keys a block are no work for a pipeline: then sm_80's kernels have two blocks on a multiprocessor, these one.
LONG = 1024


def fits_sm90(q, keys=0, longest=0, **features) -> bool:
    """What csrc/cuda/sm90 takes, and is long enough. Strides have no say, or bits would depend on them.

    keys: rows of k. longest: queries of the longest sequence.
    """
    return keys > 0 and longest >= LONG and q.shape[-1] % 8 == 0


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
    # Triton's kernels ran on an H100, so "auto" stays with them.
    Preference(
        device="cuda",
        backend="cuda",
        kernel="sm90",
        sm=90,
        dtypes=(torch.bfloat16, torch.float16),
        shape=((-1, 40, 128),),
        applies=fits_sm90,
        displaces=False,
        measured=False,
        why=f"on sm_90, for 16-bit input of {LONG} tokens or more a sequence and d 40 to 128, a multiple of 8",
    ),
)
