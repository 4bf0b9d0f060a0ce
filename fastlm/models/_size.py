"""How much memory a model takes, known before anything of it is allocated."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from fastlm import _cgroup

TRAINED = 16  # bytes a parameter: weight, gradient and AdamW's two moments in float32


def parameter_count(cls, config) -> int:
    """Parameters of `cls(config)`, counted on models without storage and with one or two layers of each kind."""
    first, layers = _counts(cls, config)
    return first + sum((getattr(config, name) - 1) * count for name, count in layers.items())


def layer_parameters(cls, config) -> int:
    """Parameters of one layer of `cls(config)`; of one of each kind where it has several kinds."""
    return sum(_counts(cls, config)[1].values())


def _counts(cls, config) -> tuple[int, dict[str, int]]:
    """(parameters of a model with one layer of each kind, those of one more layer of each kind)."""

    def count(**layers: int) -> int:
        return sum(p.numel() for p in cls(replace(config, **layers), device="meta").parameters())

    ones = dict.fromkeys(config.depths, 1)
    first = count(**ones)
    return first, {name: count(**{**ones, name: 2}) - first for name in ones}


def check_memory(cls, config, device: torch.device, bytes_each: int, what: str) -> None:
    """ValueError where `bytes_each` bytes for every parameter are more than `device` has; `what` they hold."""
    count = parameter_count(cls, config)
    need, there = count * bytes_each, available(device)
    if there is not None and need > there:
        raise ValueError(
            f"model: expected one that fits into the memory of {device}, got {count:,} parameters, whose {what} take "
            f"{need / 1e9:,.1f} GB of the {there / 1e9:,.1f} GB that are free; choose fewer or narrower layers, or a "
            "machine with more memory"
        )


def available(device: torch.device) -> int | None:
    """Bytes that are free on `device`; of a host, within the limits of its control groups. None where not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [limit for limit in [_cgroup.free_memory()] if limit is not None]
    for line in _cgroup.read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    if not found and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)
