"""The entries of the table by which "auto" leaves its order of backends, and how an input is compared with them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Preference(NamedTuple):
    """What "auto" runs for some inputs of an op, whose page has the entry (_registry.page(..., prefer=...)).

    device: the type of the device. sm: its compute capability, 90 for 9.0; None: any.
    dtypes: of x; empty: any. shape: (dimension of x, least size, greatest size or None) for each that matters.
    applies(x, **features): what else x must be, or None.
    backend: what runs. kernel: which of its kernels the backend then runs, also for a caller who named the backend; "":
        its usual one.
    displaces: whether "auto" leaves its order for it. Else it only says which of its kernels the backend runs.
    measured: on such a device. Else it is a prediction, which never displaces a measured entry.
    why: in words, for fastlm info.
    """

    device: str
    backend: str
    why: str
    sm: int | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    shape: tuple[tuple[int, int, int | None], ...] = ()
    applies: Callable | None = None
    kernel: str = ""
    displaces: bool = True
    measured: bool = True


def measured_first(entries: tuple[Preference, ...]) -> tuple[Preference, ...]:
    """The order in which they are tried: of two that describe an input, a predicted one never displaces a measured.

    With FASTLM_PREDICTED=0 in the environment, predicted ones are left out.
    """
    if os.environ.get("FASTLM_PREDICTED") == "0":
        return tuple(entry for entry in entries if entry.measured)
    return tuple(sorted(entries, key=lambda entry: not entry.measured))


def describes(entry: Preference, x: torch.Tensor, features: Mapping[str, object]) -> bool:
    """Whether x, which is on an entry's type of device, is such an input.

    Sizes come last, and a symbolic one is not compared unless its range decides: a guard on it would make
    torch.compile compile again for other lengths, and torch.export refuse a Dim.
    """
    if entry.applies is not None and not entry.applies(x, **features):
        return False
    if entry.dtypes and x.dtype not in entry.dtypes:
        return False
    if entry.sm is not None and entry.sm != _capability(x.device.index):
        return False
    return all(_within(x, *bounds) for bounds in entry.shape)


def _within(x: torch.Tensor, dimension: int, least: int, most: int | None) -> bool:
    if not -x.dim() <= dimension < x.dim():
        return False
    size = x.shape[dimension]
    if torch.compiler.is_compiling() or not isinstance(size, int):
        known = torch.fx.experimental.symbolic_shapes.statically_known_true
        return known(size >= least) and (most is None or known(size <= most))
    return size >= least and (most is None or size <= most)


def _capability(index: int | None) -> int:
    """Of a CUDA device, as 90 for 9.0; 0 where there is none, which a fake tensor may be on."""
    return _capability_of(index)


_capability._dynamo_marked_constant = True  # torch.compile cannot trace the query


@functools.cache
def _capability_of(index: int | None) -> int:
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
