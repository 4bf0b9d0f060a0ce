"""The ceilings that contenders are held against: a copy for what is bound by memory, a matrix product for the rest."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable

import torch

MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the square matrices
MOST_SETS = 32  # of inputs or buffers that take turns
_LARGE_COPY = 1 << 28  # bytes


def matmul_flops(device: torch.device) -> float:
    return 2.0 * MATMUL_SIZE[device.type] ** 3


def matmul(device: torch.device, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A call of one large matrix product."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(2, size, size, device=device) * 0.01).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out)


def copy(device: torch.device, moved: int) -> tuple[Callable[[], torch.Tensor], int]:
    """(a call of one copy, the bytes that it reads and writes).

    On a GPU it moves as many bytes as the op, `moved`, between buffers that take turns, together twice the cache. On a
    CPU a large copy is faster, and is the ceiling.
    """
    gpu = device.type == "cuda"
    half = -(-moved // 1024) * 512 if gpu else _LARGE_COPY  # whole cache lines
    count = sets_to_fill_cache(half, device) if gpu else 1
    pairs = [(torch.empty_like(x), x) for x in torch.ones(count, half, dtype=torch.uint8, device=device)]
    following = itertools.cycle(pairs).__next__
    return lambda: torch.Tensor.copy_(*following()), 2 * half


def cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    name = "SC_LEVEL3_CACHE_SIZE"
    return (os.sysconf(name) if name in os.sysconf_names else 0) or 64 << 20


def sets_to_fill_cache(size: int, device: torch.device) -> int:
    """How many sets of `size` bytes fill the cache twice, at most MOST_SETS."""
    return min(MOST_SETS, math.ceil(2 * cache_bytes(device) / size))
