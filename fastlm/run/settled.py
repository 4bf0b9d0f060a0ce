"""`train.dtype = "auto"` becomes the dtype in which the device multiplies faster, before the first step of a run.

recipe.json then names it. A resumed run takes it from there, also on another machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from fastlm import cpu_rate
from fastlm.chip import Dtype, auto_dtype
from fastlm.run.recipe import Recipe
from fastlm.settings import AUTO
from fastlm.terminal import say


def find_dtype(device: torch.device) -> Dtype:
    """`auto_dtype`, with a line on the terminal where this CPU is measured first."""
    if device.type == "cpu" and None in map(cpu_rate.known, cpu_rate.BOTH):
        say("Measuring this CPU's matrix products once, for train.dtype and MFU ...", sys.stderr)
    return auto_dtype(device)


def with_dtype(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with a dtype: where it names one, nothing is measured."""
    if recipe.train.dtype != AUTO:
        return recipe
    return recipe.with_values({"train.dtype": find_dtype(device).name})


def settle_dtype(
    given: Recipe, started: Recipe, device: torch.device, share: Callable[[str, Callable[[], object]], object]
) -> tuple[Recipe, str]:
    """(the recipe of a run with a dtype, the words that follow its name in the headline).

    given, started   as the user gave it, and with what the run had when it began (`find_start`)
    share            `World.share`: the first process decides
    """
    if started.train.dtype != AUTO:
        return started, ", as when the run began" if given.train.dtype == AUTO else ""
    name, why = share("dtype", lambda: list(find_dtype(device)))
    return started.with_values({"train.dtype": name}), f", since {why}"
