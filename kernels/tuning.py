"""Kernel configurations measured on a GPU. They replace the rules that each kernel's file has for every GPU.

    choose(kernel, shape, rule, candidates)     the configuration for a launcher

A table is a JSON file for one GPU and one version of triton:
    {"gpu": "NVIDIA H200", "triton": "3.7.1", "configurations": {"layer_norm_fwd": {"1024": {"block_m": 4, ...}}}}
Tables are in `tables/` beside this file, committed with the measurement in LOG.md, and in the user's cache directory,
where `fastlm tune` writes; the user's table has precedence. Nothing is ever measured during a run. The rule decides for
a kernel that no table has, and where no GPU is in use. Each GPU of a process has a table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
import triton

C = TypeVar("C")  # a frozen dataclass of one kernel's block shape, warps and stages
Key = tuple[str, tuple[int, ...]]  # kernel and shape class

SHIPPED = Path(__file__).parent / "tables"

_chosen: dict[tuple[int | None, Key], object] = {}  # by device
_overrides: dict[Key, object] = {}
_tables: dict[str, dict[str, dict]] = {}  # GPU name -> kernel -> shape -> fields
_observed: dict[Key, tuple[object, Callable[[], Iterable]]] | None = None


def user_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm" / "tables"


def file_name(gpu: str) -> str:
    """ "NVIDIA H200", triton 3.7.1 -> nvidia-h200-triton-3.7.1.json"""
    return f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}-triton-{triton.__version__}.json"


def read_table(path: Path) -> dict[str, dict]:
    """The configurations of a table. ValueError where it is not one."""
    try:
        table = json.loads(path.read_text())
        configurations = table["configurations"]
        if not all(isinstance(fields, dict) for shapes in configurations.values() for fields in shapes.values()):
            raise TypeError("a configuration is not an object")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of kernel configurations ({error}); delete it, or tune again"
        ) from error
    return configurations


def _table(gpu: str) -> dict[str, dict]:
    if gpu not in _tables:
        merged: dict[str, dict] = {}
        for directory in (SHIPPED, user_directory()):
            path = directory / file_name(gpu)
            for kernel, shapes in read_table(path).items() if path.is_file() else ():
                merged.setdefault(kernel, {}).update(shapes)
        _tables[gpu] = merged
    return _tables[gpu]


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def choose(kernel: str, shape: tuple[int, ...], rule: Callable[[], C], candidates: Callable[[], Iterable[C]]) -> C:
    """The configuration of a kernel for a shape class: from a table, else by the rule.

    shape: all that the rule reads, the architecture included. candidates: others for `fastlm tune` to measure.
    """
    key = kernel, shape
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    found = _overrides.get(key) or _chosen.get((device, key))
    if found is None:
        found = rule()
        if device is not None:
            fields = _table(torch.cuda.get_device_name()).get(kernel, {}).get(shape_name(shape))
            if fields is not None:
                try:
                    found = dataclasses.replace(found, **fields)
                except TypeError as error:
                    raise ValueError(
                        f"the table of {torch.cuda.get_device_name()} has a configuration of {kernel} that this "
                        f"version does not know ({error}); delete {user_directory()}, or tune again"
                    ) from error
        _chosen[device, key] = found
    if _observed is not None:
        _observed[key] = found, candidates
    return found


@contextlib.contextmanager
def observe():
    """Collects the calls of `choose` inside: {(kernel, shape): (configuration, candidates)}."""
    global _observed
    before, _observed = _observed, {}
    try:
        yield _observed
    finally:
        _observed = before


@contextlib.contextmanager
def override(key: Key, configuration):
    """Inside, `choose` returns `configuration` for one kernel and shape."""
    before = _overrides.get(key)
    _overrides[key] = configuration
    try:
        yield
    finally:
        _overrides.pop(key) if before is None else _overrides.update({key: before})


def forget() -> None:
    """Makes `choose` read the tables again."""
    _chosen.clear()
    _tables.clear()
