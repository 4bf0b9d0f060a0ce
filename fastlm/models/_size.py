"""How much memory a model takes, known before anything of it is allocated."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
TRAINED = 16  # bytes a parameter: weight, gradient and AdamW's two moments in float32


def parameter_count(cls, config) -> int:
    """Parameters of `cls(config)`, counted on models without storage and with one or two layers of each kind."""

    def count(**layers: int) -> int:
        return sum(p.numel() for p in cls(replace(config, **layers), device="meta").parameters())

    ones = dict.fromkeys(config.depths, 1)
    first = count(**ones)
    return first + sum((getattr(config, name) - 1) * (count(**{**ones, name: 2}) - first) for name in ones)


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
    """Bytes that are free on `device`; of a host, within the limit of its container. None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [int(text) for path in _CGROUP if (text := _read(path).strip()).isdigit()]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    if not found and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
