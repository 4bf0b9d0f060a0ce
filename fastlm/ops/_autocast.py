"""Autocast, as torch treats the function of the same name.

torch.library ops fall through the autocast keys, so the public functions cast here. Source: torch's autocast op lists.
"""

from __future__ import annotations

import torch

# op -> device -> what its floating-point inputs become: "float32", "low" (the autocast dtype); absent: left alone. Each
# page says it for its ops.
POLICY: dict[str, dict[str, str]] = {}


def device_type(x: torch.Tensor) -> str:
    """x.device.type, in a third of its time where it is a usual one."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def autocast_dtype(op: str, tensor: torch.Tensor) -> torch.dtype:
    """What autocast would cast `tensor` to for `op`; its own dtype outside of autocast."""
    device, dtype = device_type(tensor), tensor.dtype
    policy = POLICY.get(op, {}).get(device)
    if policy is None or not torch.is_autocast_enabled(device):
        return dtype
    if not dtype.is_floating_point or dtype == torch.float64:
        return dtype
    return torch.float32 if policy == "float32" else torch.get_autocast_dtype(device)


def autocast(op: str, x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors, on one device, floating-point ones cast as autocast would for `op`; unchanged outside of it."""
    tensors = x, *others
    if not torch.is_autocast_enabled(device_type(x)):
        return tensors
    return tuple(None if t is None else t.to(autocast_dtype(op, t)) for t in tensors)
