"""What a run takes from this machine: `train.dtype = "auto"` becomes the dtype in which the device multiplies faster.

That happens before the first step, and recipe.json then names the dtype. A resumed run takes it from there, also on
another machine. The rate that MFU is measured against is looked up when steps begin, in a resumed run too.
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
    if device.type == "cpu" and (why := cpu_rate.due()):
        say(f"Measuring this CPU's matrix products {why}, for train.dtype and MFU ...", sys.stderr)
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


def settle_rate(
    dtype: torch.dtype,
    recorded: dict[str, list[float]],
    share: Callable[[str, Callable[[], object]], object],
    note: Callable[[str], object],
) -> None:
    """See to it that the rate of this CPU in `dtype` is known, and recorded by the run.

    It is the better of what this machine keeps and of what the run recorded on a CPU of this name; measured where
    neither has it. What a run recorded, perhaps on another machine, is not kept for other runs.

    recorded   the run's rates, `cpu_rate.Rate` by `cpu_rate.key`; this one is entered
    share      `World.share`: the first process measures, while the others wait
    note       prints a line
    """
    name = cpu_rate.key(dtype, torch.get_num_threads())

    def find() -> list[float]:
        if name in recorded:
            cpu_rate.remember({dtype: cpu_rate.Rate(*recorded[name])}, keep=False)
        if cpu_rate.known(dtype) is None:
            note("measuring this CPU's matrix products once, for MFU")
            cpu_rate.remember(cpu_rate.measure())
        return list(cpu_rate.known(dtype))

    recorded[name] = share("rate", find)
