"""Special ids of mlm_mask as ranges, the form that its GPU kernels take."""

from __future__ import annotations


def ranges(ids) -> tuple[int, ...]:
    """Sorted unique ids as (first, length, first, length, ...). Special ids form few ranges."""
    out: list[int] = []
    for i in ids:
        if out and out[-2] + out[-1] == i:
            out[-1] += 1
        else:
            out += [i, 1]
    return tuple(out)


def token_limit(input_ids) -> str | None:
    return None if input_ids.numel() < 2**31 else f"it numbers tokens in 32 bits, and there are {input_ids.numel()}"
