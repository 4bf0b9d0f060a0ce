"""The check that every public argument which counts something goes through."""

from __future__ import annotations

from numbers import Integral


def integer(name: str, value, low: int, high: int | None = None) -> int:
    """`value` as an int: Python's or NumPy's, in [low, high]. ValueError for anything else."""
    if not isinstance(value, Integral) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected an integer {span}, got {value!r}")
    return int(value)
