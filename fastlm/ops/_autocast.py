"""Autocast rules: an op is cast as the torch function of the same name.

Autocast does not see ops of torch.library, so the public functions cast their inputs here. Source: torch's autocast op
lists.
"""

from __future__ import annotations

import torch

# op -> device -> the dtype of its floating-point inputs: "float32", or "low" for the autocast dtype. Absent: unchanged.
# Each page declares it for its ops (_registry.page).
POLICY: dict[str, dict[str, str]] = {}


def device_type(x: torch.Tensor) -> str:
    """x.device.type, in a third of the time for "cuda" and "cpu"."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def autocast_dtype(op: str, tensor: torch.Tensor) -> torch.dtype:
    """The dtype to which autocast casts `tensor` for `op`; the tensor's dtype outside of autocast."""
    device, dtype = device_type(tensor), tensor.dtype
    policy = POLICY.get(op, {}).get(device)
    if policy is None or not torch.is_autocast_enabled(device):
        return dtype
    if not dtype.is_floating_point or dtype == torch.float64:
        return dtype
    return torch.float32 if policy == "float32" else torch.get_autocast_dtype(device)


def autocast(op: str, x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors, all on one device, cast for `op` under autocast; unchanged outside of it. None stays None."""
    tensors = x, *others
    if not torch.is_autocast_enabled(device_type(x)):
        return tensors
    return tuple(None if t is None else t.to(autocast_dtype(op, t)) for t in tensors)
