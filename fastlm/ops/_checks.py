"""Argument checks shared by the ops. A ValueError names the argument, what was expected, and what was given."""

from __future__ import annotations

import math

import torch

_LARGEST = torch.finfo(torch.float32).max


def is_tensor(name: str, value, *, device=None, dtypes=None, shape=None) -> None:
    """Checks a tensor's device, dtype and shape. `shape` is a tuple; None in it allows any size."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected on {device}, where the other inputs are, got {value.device}")
    if dtypes is not None and value.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(str(d) for d in dtypes)}, got {value.dtype}")
    if shape is None or value.shape == shape:
        return
    if value.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, value.shape)):
        wanted = ", ".join("*" if want is None else str(want) for want in shape) + "," * (len(shape) == 1)
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")


def is_float(name: str, value, *, device=None, shape=None) -> None:
    if (
        not isinstance(value, torch.Tensor)
        or (device is not None and value.device != device)
        or (shape is not None and value.shape != shape)
    ):
        is_tensor(name, value, device=device, shape=shape)
    if not value.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating-point tensor, got {value.dtype}")


def same_dtype(first: str, given: torch.dtype, dtype: torch.dtype, **tensors) -> None:
    """Checks `tensors` after autocast against `dtype`, that of `first`, which was called with dtype `given`."""
    for name, x in tensors.items():
        if x is not None and x.dtype != dtype:
            raise ValueError(f"{name}: expected {given}, {first}'s dtype, got {x.dtype}; cast it, or use autocast")


def probability(name: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {p}")


def softcap(value, none: str) -> None:
    """Checks a cap that a caller has given; `none` is what it would pass for no cap."""
    if not isinstance(value, (int, float)) or not 0.0 < value <= _LARGEST:
        raise ValueError(f"softcap: expected a positive finite number in float32, or {none} for no cap, got {value!r}")


def finite(name: str, value) -> None:
    # By comparisons, which torch.compile traces with a number that varies; math.isfinite would break the graph.
    if not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def is_rng(rng, site: int, device) -> None:
    if rng is not None:
        is_tensor("rng", rng, device=device, dtypes=(torch.int64,), shape=(2,))
    if not 0 <= site < 2**32:
        raise ValueError(f"site: expected an integer in [0, 2^32), got {site}")


def one_of(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(repr(a) for a in allowed)}, got {value!r}")


def readable(x: torch.Tensor) -> bool:
    """Whether a check may read the values of x: on the CPU, and neither traced by a compiler nor a FakeTensor."""
    # By its attribute: the module of FakeTensor takes a second to import.
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not hasattr(x, "fake_mode")


def ids_inside(name: str, ids: torch.Tensor, size_name: str, size: int) -> None:
    """Checks that all ids are in [0, size), where they can be read."""
    if not readable(ids) or not ids.numel():
        return
    low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected ids in [0, {size_name} = {size}), got {low if low < 0 else high}")
