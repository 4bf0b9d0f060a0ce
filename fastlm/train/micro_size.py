"""`train.micro_batch_tokens = "auto"`: the tokens of a forward with which this machine runs a step fastest.

Few tokens leave a machine idle between its calls, many push the activations out of its caches; where the best lies
depends on the model and the machine. So the forward and backward of a few sizes are timed before step 0, on batches of
the run and its initial weights, with gradients of the dtype that they have in the run. No weight, no gradient and no
random number is left changed. The choice goes into recipe.json, and a resumed run takes it from there.

What is learned depends on the size as it does on a named one: by rounding, and with dropout by what is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from fastlm.models import Model
from fastlm.ops._low_weights import LowWeights
from fastlm.run.recipe import Recipe
from fastlm.tasks import Task
from fastlm.train._memory import fitting
from fastlm.train.micro import forward_backward, low_gradients
from fastlm.train.optimizer import has_low_gradients, make_optimizer
from fastlm.train.parallel import World

_SMALLEST = 256  # tokens of the smallest size that is tried
_TIMES, _SECONDS = 3, 0.1  # a size is timed so often, and at least for so long; the best counts
_ENOUGH = 2.0  # seconds, after which it is timed no more
_GAIN = 0.98  # of the time of a smaller size, which a larger one has to take at most: it holds memory
_PATIENCE = 2  # sizes in a row that are no faster, after which larger ones are not tried


class Choice(NamedTuple):
    """tokens: of a forward; seconds: of a row of each size that was tried, by its tokens; cost: of the measurement."""

    tokens: int
    seconds: dict[int, float]
    cost: float

    def note(self, row_tokens: int) -> str:
        """A line for the terminal."""
        if not self.seconds:
            return f"train.micro_batch_tokens={self.tokens}: no other size divides the batch and fits into memory"
        rates = ", ".join(f"{row_tokens / s:,.0f} with {tokens:,}" for tokens, s in self.seconds.items())
        return (
            f"train.micro_batch_tokens={self.tokens}: the fastest here; tokens/s of forward and backward: {rates}; "
            f"measured in {self.cost:.1f} s"
        )


def sizes(recipe: Recipe, processes: int) -> list[int]:
    """Rows of a micro-batch that are tried, rising, each at least twice the one before, the whole batch among them.

    ValueError where the processes do not divide the rows of a batch.
    """
    rows, row_tokens = recipe.batch_rows, recipe.data.row_tokens
    if rows % processes:
        raise ValueError(
            f"{recipe.train.batch_key}: expected a multiple of {processes} rows of {row_tokens} tokens, so that "
            f"{processes} processes divide them, got {recipe.batch_tokens}; choose another, or another number of "
            "processes"
        )
    found = [rows // processes]
    for n in range(found[0] // 2, 0, -1):
        if found[0] % n == 0 and 2 * n <= found[-1] and n * row_tokens >= _SMALLEST:
            found.append(n)
    return found[::-1]


def fastest(tried: Sequence[int], seconds: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """(the best of the sizes `tried`, seconds(n) of those that were measured). seconds: of a row, with n in a forward.

    The smallest of those within _GAIN of each other is the best. After _PATIENCE larger ones without a gain no larger
    one is tried: so the measurement takes little longer than the sizes that come into question.
    """
    best, found = tried[0], {}
    for n in tried:
        found[n] = seconds(n)
        if found[n] < _GAIN * found[best]:
            best = n
        if tried.index(n) - tried.index(best) == _PATIENCE:
            break
    return best, found


def find_size(
    task: Task, model: Model, processes: int, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> Choice:
    """The choice for `task` on its device, where `model` is moved. Sizes that would not fit into memory are not tried.

    No parameter may have a gradient. None has one afterwards.
    """
    began, row = clock(), task.recipe.data.row_tokens
    tried = fitting(task, model.config, sizes(task.recipe, processes))
    model.to(task.device).train()
    best, seconds = tried[0], {}
    if len(tried) > 1:
        best, seconds = fastest(tried, lambda rows: _seconds(task, model, rows, processes, dtype, clock))
    return Choice(best * row, {rows * row: s for rows, s in seconds.items()}, clock() - began)


def settle_size(task: Task, model: Model, world: World) -> tuple[Recipe, str]:
    """(the task's recipe with a size, a line that says why), the same in every process; "" where it has one already."""
    recipe = task.recipe
    if recipe.train.micro_key not in recipe.open_keys():
        return recipe, ""
    dtype = getattr(torch, recipe.train.dtype)

    def choose() -> list:
        choice = find_size(task, model, world.size, dtype)
        return [choice.tokens, choice.note(recipe.data.row_tokens)]

    tokens, note = world.share("micro-batch", choose)
    return recipe.with_values({recipe.train.micro_key: tokens}), note


def _seconds(
    task: Task, model: Model, rows: int, processes: int, dtype: torch.dtype, clock: Callable[[], float]
) -> float:
    """Of forward and backward of a row, with `rows` in a micro-batch.

    As in the run: gradients are added to those before in a step of several micro-batches of a process. In one of a
    single one they are not, and may be bfloat16.
    """
    recipe = task.recipe
    small = recipe.with_values({recipe.train.micro_key: rows * recipe.data.row_tokens})
    micro = type(task)(small, task.dataset, task.device).micro(0, 0).to(task.device)
    micros, optimizer = small.micro_count // processes, make_optimizer(model, recipe.train)
    weights = nullcontext() if dtype == torch.float32 else LowWeights(model.parameters()).fresh(dtype)
    low = has_low_gradients(optimizer, dtype, micros, processes)
    trained = (p for group in optimizer.param_groups for p in group["params"])

    def run() -> float:
        if micros == 1:
            model.zero_grad()
        _wait(task.device)
        start = clock()
        forward_backward(model, micro, dtype)
        _wait(task.device)
        return clock() - start

    try:
        with weights, low_gradients(trained) if low else nullcontext():
            run()  # it allocates, and compiles on a GPU
            times = [run()]
            while sum(times) < _SECONDS or (len(times) < _TIMES and sum(times) < _ENOUGH):
                times.append(run())
    finally:
        model.zero_grad()
    return min(times) / rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
