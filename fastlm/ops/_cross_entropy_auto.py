"""Logits for which cross_entropy on CUDA runs another kernel, by prediction: none of it was measured."""

from __future__ import annotations

import torch

from fastlm.ops._preferences import Preference

# Rows of this length, one on each of 132 multiprocessors, exceed an L2 of 50 MB: all kernels but that of the cluster
# then read a row from memory twice. The most is what eight blocks hold (csrc/cuda/sm90/cross_entropy.h).
LEAST, MOST = 380 << 10, 8 * (224 << 10)  # bytes


def is_plain(logits, softcap=False, figures=False, **features) -> bool:
    """The cluster's kernel for a softcap or the figures has one block on a multiprocessor, whose loads wait for its
    arithmetic; with smoothing it has two, as without."""
    return not softcap and not figures


# Triton's and the usual CUDA kernels ran on an H100, so "auto" stays with them.
PREFER = tuple(
    Preference(
        device="cuda",
        backend="cuda",
        kernel="cluster",
        sm=90,
        dtypes=dtypes,
        shape=((-1, LEAST // bytes_ + 1, MOST // bytes_),),
        applies=is_plain,
        displaces=False,
        measured=False,
        why=f"on sm_90, for {LEAST // bytes_ + 1} to {MOST // bytes_} classes in {words}, without softcap and figures: "
        "a row lies in the shared memory of a cluster and is read from memory once",
    )
    for dtypes, bytes_, words in (
        ((torch.bfloat16, torch.float16), 2, "bfloat16 or float16"),
        ((torch.float32,), 4, "float32"),
    )
)
