"""What a person sees of a run while it trains: the headline, the progress line, and steps to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fastlm.chip import chip_name, find_peak
from fastlm.data import Mixture
from fastlm.models import Model
from fastlm.run.pace import Pace, due
from fastlm.run.progress import ProgressLine, duration
from fastlm.run.recipe import Recipe
from fastlm.run.settled import settle_rate
from fastlm.run.summary import mix_text, percent
from fastlm.tasks import Task
from fastlm.train.optimizer import parameter_groups
from fastlm.train.parallel import World
from fastlm.train.spikes import Spikes, batch_rows

LONG = 600.0  # seconds: a run with more to go says so after its first steps
_FIRST = 10  # steps, of this process


@dataclass
class Counters:
    """What a run has counted; a checkpoint stores it."""

    step: int = 0
    tokens: int = 0  # real ones
    seconds: float = 0.0  # of the steps alone
    other_seconds: float = 0.0  # of evaluations, and of steps that waited for a checkpoint
    flops: float = 0.0  # of matrix products
    skipped: int = 0  # steps whose gradients were not finite
    streak: int = 0  # of them, those that came last, one after another
    dropped: int = 0  # predictions beyond the capacity of their batch
    spikes: int = 0  # steps with a loss far above those before
    best: float | None = None  # of a scored task: its best figure on held-out examples,
    best_step: int = 0  # the step that it is of,
    stale: int = 0  # and the evaluations since then
    rates: dict[str, list[float]] = field(default_factory=dict)  # of CPUs that it ran on, by `settle_rate`


class Watch:
    """The times of a run, its MFU and its loss spikes, and what is said of them.

    counters   the run's, to which this adds seconds, FLOPs and spikes
    """

    def __init__(self, task: Task, world: World, counters: Counters):
        self.task, self.world, self.counters = task, world, counters
        self.recipe: Recipe = task.recipe
        self.dtype = getattr(torch, self.recipe.train.dtype)
        self.peak = find_peak(world.device, self.dtype)
        self.pace, self.spikes, self._steps = Pace(), Spikes(), 0
        self.note: Callable[[str], None] = print

    def start(self, line: ProgressLine, losses: Iterable[float | None]) -> None:
        """losses: of the steps before the first of this process. A CPU whose rate is not known is measured."""
        self.line, self.note = line, line.note
        if self.world.device.type == "cpu":
            settle_rate(self.dtype, self.counters.rates, self.world.share, self.note)
            self.peak = find_peak(self.world.device, self.dtype)
        self.spikes = Spikes(losses)

    def headline(self, model: Model, memory: str, why: str = "", micro: str = "") -> None:
        """why: words behind the dtype's name; micro: a line on the size of a micro-batch, "" for none"""
        recipe, parameters = self.recipe, sum(p.numel() for p in model.parameters())
        self.note(
            f"{recipe.name}: {parameters / 1e6:.3g} M parameters on {chip_name(self.world.device)} in "
            f"{recipe.train.dtype}{why}; {self.task.describe()}\n"
            f"MFU = 3 · forward FLOPs of matrix products on real tokens / (seconds · peak); peak: {self.peak}\n"
            f"memory of a step: {memory}"
        )
        if micro:
            self.note(micro)
        for line in self.task.notes():
            self.note(line)
        self.note("; ".join(map(str, parameter_groups(model, recipe.train))))
        if isinstance(dataset := self.task.dataset, Mixture):
            planned = mix_text(dataset.report(recipe.train.max_steps * recipe.batch_rows))
            self.note(f"mix of {recipe.train.max_steps} steps: {planned}")
            if self.counters.step:
                self.note(f"mix until now: {mix_text(dataset.report(self.counters.step * recipe.batch_rows))}")
        if self.counters.step:
            self.note(f"resumed after step {self.counters.step} of {recipe.train.max_steps}")

    def mfu(self, flops_per_s: float) -> float | None:
        """Of all processes together, each on a device of its own."""
        return None if self.peak.flops is None else flops_per_s / (self.peak.flops * self.world.size)

    @property
    def mean_mfu(self) -> float | None:
        """Of the whole run's steps."""
        mfu = self.mfu(self.counters.flops / self.counters.seconds)
        return None if mfu is None else round(mfu, 4)

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Around an "evaluation" or a "checkpoint", whose time is no step's."""
        before = self.pace.elsewhere
        with self.pace.apart(what):
            yield
        self.counters.other_seconds += self.pace.elsewhere - before

    def timed(self, tokens: int, flops: float) -> dict[str, float | None]:
        """Enter the time of a step that ended now; its rate and MFU, as the metrics have them."""
        seconds = self.pace.step(tokens, flops)
        self.counters.seconds += seconds
        self.counters.flops += flops
        mfu = self.mfu(flops / seconds)
        return {"tokens_per_s": round(tokens / seconds, 1), "mfu": None if mfu is None else round(mfu, 4)}

    def check(self, step: int, loss: float, norm: float) -> None:
        """Count a finite loss that is a spike; the first of several in a row is told with its data."""
        found = self.spikes.add(loss)
        if found is None:
            return
        self.counters.spikes += 1
        median, first = found
        if first:
            rows = batch_rows(step - 1, self.recipe.batch_rows, self.task.dataset, self.recipe.train.seed)
            self.note(
                f"step {step}: loss spike, {loss:.3f} where the median of the steps before is {median:.3f}; gradient "
                f"norm {norm:.3g}; trained on {rows}"
            )

    def left(self) -> float:
        """Seconds to the end of the run, as the steps, evaluations and checkpoints until now took them."""
        table, step = self.recipe.train, self.counters.step
        evaluations = 0 if self.task.validation is None else due(step, table.max_steps, table.eval_every)
        checkpoints = due(step, table.max_steps, table.checkpoint_every)
        return self.pace.left(table.max_steps - step, evaluation=evaluations, checkpoint=checkpoints)

    def show(self, step: int, loss: float, lr: float, held: float | None) -> None:
        """Update the progress line. held: the latest loss on held-out text"""
        left, mfu, tokens = self.left(), self.mfu(self.pace.flops_per_s), f"{self.pace.tokens_per_s:,.0f} tokens/s"
        fields = [  # on a narrow terminal the last ones are left out
            f"step {step}/{self.recipe.train.max_steps}",
            f"loss {loss:.3f}",
            tokens,
            f"ETA {duration(left)}",
            *([] if held is None else [f"val {held:.3f}"]),
            *([f"{self.counters.skipped} skipped"] if self.counters.skipped else []),
            f"MFU {percent(mfu)}",
            f"lr {lr:.1e}",
        ]
        self.line.update(step, fields)
        self._steps += 1
        if self._steps == _FIRST and left > LONG:
            self.note(f"about {duration(left)} to go, at {tokens}")
