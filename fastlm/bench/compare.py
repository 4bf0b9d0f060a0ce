"""One training step of fastlm beside the same step of its peers, interleaved, each contender in its own process.

The contenders (step_contenders.py) start from the same weights and take the same rows (steps.py). Before the clock each
reports its loss on the first batch. A contender whose loss is wrong, or that fails then or later, is named with the
reason and not timed. Then every round runs each of them for a few steps in turn, so a slow moment of the machine
affects all of them. A process each keeps allocator settings apart. The first step of a round is not measured, since it
finds the caches full of another process's data.

A large matrix product is timed in the same rounds. The bound is the time of the step's matrix products alone,
attention's included, at the rate of that product. Only real tokens count.

A loss curve over the first steps must match fastlm's within noise. Without dropout all contenders compute the same up
to rounding, which grows. With dropout each draws its own masks, so means over windows of steps are compared; the noise
is that of the differences from one step to the next, which a trend hardly changes.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from safetensors.torch import save_file

from fastlm.bench import ceilings, step_contenders
from fastlm.bench.results import WRONG
from fastlm.bench.step_contenders import MATMUL
from fastlm.bench.step_worker import TENSORS, Worker
from fastlm.bench.steps import BATCHES, StepInputs, Training
from fastlm.bench.timing import Timing
from fastlm.chip import peak_flops
from fastlm.run.recipe import Recipe
from fastlm.storage import atomic_file, replace_json
from fastlm.tasks import TrainTable

CONTENDERS = ("fastlm", "transformers", "transformers tuned")
EVERY = tuple(step_contenders.CONTENDERS)
_CHECK = {"float32": 2e-5, "bfloat16": 2e-2}  # how far a contender's first loss may be from fastlm's, relatively
_ROUNDING = {"float32": 1e-2, "bfloat16": 4e-2}  # and any loss of a curve, without dropout
_WINDOW = 10  # steps whose mean is compared, with dropout
_SIGMAS = 4
LEAST_CURVE = 3  # steps; fewer say nothing of the noise


@dataclass(frozen=True)
class StepTime:
    """A contender's result: milliseconds a step, median and interquartile range over rounds; or why it did not run."""

    contender: str
    tokens: int = 0  # real ones, in a step
    ms: float = math.nan
    ms_iqr: float = math.nan
    mfu: float | None = None
    of_bound: float = math.nan  # of what the step's matrix products alone allow, at the rate of a large one
    peak_mb: float = math.nan  # CPU: resident memory of the process; CUDA: allocated by torch
    step_mb: float = math.nan  # of it, what came after the model was loaded: gradients, optimizer, activations
    missing: str | None = None
    losses: tuple[float, ...] = ()  # of the first steps, where they were asked for
    curve_off: float | None = None  # their largest relative distance from the first contender's
    curve_noise: float | None = None  # the distance that noise alone may explain

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.ms * 1e3

    @property
    def learns_alike(self) -> bool:
        return self.curve_off is None or self.curve_off <= self.curve_noise


def curve_off(losses: Sequence[float], expected: Sequence[float], *, dropout: bool, dtype: str) -> tuple[float, float]:
    """(the largest relative difference of two curves over the same data, what noise explains)."""
    differences = [(loss - other) / abs(other) for loss, other in zip(losses, expected, strict=True)]
    if not all(map(math.isfinite, differences)):
        return math.inf, _ROUNDING[dtype]
    if not dropout:
        return max(map(abs, differences)), _ROUNDING[dtype]
    window = min(_WINDOW, len(differences))
    jumps = [(b - a) ** 2 for a, b in itertools.pairwise(differences)]
    deviation = math.sqrt(sum(jumps) / (2 * len(jumps)))  # of a difference about its trend
    starts = range(0, len(differences) - window + 1, window)
    means = [abs(sum(differences[start : start + window])) / window for start in starts]
    return max(means), _ROUNDING[dtype] + _SIGMAS * deviation / math.sqrt(window)


class _Contest:
    """The workers of one comparison, their last answers, and why some no longer run."""

    def __init__(self, contenders: Sequence[str], workers: dict):
        self.contenders, self.workers = contenders, workers
        self.answers: dict[str, dict] = {}
        self.missing: dict[str, str] = {}

    def ask(self, contender: str, *what) -> bool:
        """Keeps the answer to `what`, or to the start. False where the contender does not run, any more or at all."""
        if contender in self.missing:
            return False
        worker = self.workers[contender]
        answer = worker.run(*what) if what else worker.start()
        if "failed" in answer and contender in (self.contenders[0], MATMUL):
            raise RuntimeError(f"{contender} failed: {answer['failed']}\n{worker.said()}")
        if "failed" in answer or "missing" in answer:
            self.missing[contender] = answer.get("missing") or f"failed: {answer['failed']}"
        self.answers[contender] = answer
        return contender not in self.missing

    def check(self, tolerance: float) -> None:
        """Starts all. A contender whose first loss is not the first one's is missing, and WRONG."""
        losses = {contender: self.answers[contender]["loss"] for contender in self.workers if self.ask(contender)}
        del losses[MATMUL]
        self.missing |= wrong_losses(losses, tolerance)

    def curves(self, steps: int) -> dict[str, list[float]]:
        return {c: self.answers[c]["losses"] for c in self.contenders if steps and self.ask(c, steps, "losses")}

    def time(
        self, rounds: int, seconds: float, least: int, progress: Callable[[dict[str, list[float]]], object]
    ) -> dict[str, list[float]]:
        """Milliseconds of each round; a round is at least `seconds` long, and a multiple of `least` steps.

        progress(times so far) is called after each contender: first with its time of `least` steps, then with rounds.
        """
        steps, first = {}, {}
        for contender in self.workers:
            # BATCHES steps first: the heap settles, and every shape is compiled.
            if self.ask(contender, BATCHES) and self.ask(contender, least):
                took = self.answers[contender]["seconds"]
                steps[contender] = least * max(1, math.ceil(seconds / (least * took)))
                first[contender] = [took * 1e3]
                progress(first)
        times = {contender: [] for contender in steps}
        for _ in range(rounds):
            for contender in steps:
                if self.ask(contender, steps[contender]):
                    times[contender].append(self.answers[contender]["seconds"] * 1e3)
                progress({name: times[name] or first[name] for name in steps})
        return times


def compare_steps(
    recipe: Recipe | Training,
    inputs: StepInputs,
    *,
    device: str = "cpu",
    contenders: Sequence[str] = CONTENDERS,
    rounds: int = 7,
    seconds: float = 1.0,
    threads: int | None = None,
    curve: int = 0,
    start: Callable[[str, Path], Worker] = Worker,
    progress: Callable[[list[StepTime]], object] = lambda times: None,
) -> list[StepTime]:
    """Times a step of `recipe`, one micro-batch, `rounds` times for each contender, each at least `seconds` long.

    contenders: names of step_contenders.CONTENDERS, or "module:name" of another one. threads: of torch and of fastlm's
    kernels, on a CPU (default torch's). curve: so many steps before the clock, whose losses are kept and compared.
    start(contender, directory): its Worker.
    progress(times of all so far) is called after each contender.
    A contender whose first loss is not the first one's is missing, and WRONG.
    RuntimeError where the first one fails.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="fastlm-step-") as name:
        directory = Path(name)
        write_inputs(recipe, inputs, directory, device, threads)
        try:
            for contender in (*contenders, MATMUL):
                workers[contender] = start(contender, directory)
            contest = _Contest(contenders, workers)
            contest.check(_CHECK[recipe.train.dtype])
            curves = contest.curves(curve)
            # Batches of different lengths: a round is all of them, as often as it takes.
            so_far = partial(_step_times, contest, recipe, inputs, device, curves)
            times = contest.time(rounds, seconds, BATCHES if inputs.padded else 1, lambda ms: progress(so_far(ms)))
        finally:
            for worker in workers.values():
                worker.close()
    return so_far(times)


def _step_times(contest: _Contest, recipe, inputs: StepInputs, device: str, curves, times) -> list[StepTime]:
    """Of those in `times` and those that are missing; of_bound is None until the matrix product was timed."""
    bound_ms = None
    if MATMUL in times:
        bound_ms = inputs.flops / ceilings.matmul_flops(torch.device(device)) * Timing.of(times[MATMUL]).ms
    peak = peak_flops(torch.device(device), getattr(torch, recipe.train.dtype))
    noise = {"dropout": inputs.dropout, "dtype": recipe.train.dtype}
    expected = next(iter(curves.values()), None)
    out = []
    for contender in contest.contenders:
        if contender in contest.missing:
            out.append(StepTime(contender, missing=contest.missing[contender]))
            continue
        if contender not in times:
            continue
        timing, answer = Timing.of(times[contender]), contest.answers[contender]
        off, explained = curve_off(curves[contender], expected, **noise) if curves else (None, None)
        out.append(
            StepTime(
                contender,
                inputs.tokens,
                timing.ms,
                timing.iqr,
                mfu=None if peak is None else inputs.flops / (timing.ms / 1e3 * peak),
                of_bound=None if bound_ms is None else bound_ms / timing.ms,
                peak_mb=answer["peak_mb"],
                step_mb=answer["step_mb"],
                losses=tuple(curves.get(contender, ())),
                curve_off=off,
                curve_noise=explained,
            )
        )
    return out


def wrong_losses(losses: dict[str, float], tolerance: float) -> dict[str, str]:
    """{contender: how} of those whose loss is not the first one's."""
    first, expected = next(iter(losses.items()), ("", math.nan))
    return {
        contender: f"{WRONG}computes a loss of {loss:.6f} where {first} computes {expected:.6f}"
        for contender, loss in losses.items()
        if contender != first and not abs(loss - expected) <= tolerance * abs(expected)
    }


def write_inputs(
    recipe: Recipe | Training, inputs: StepInputs, directory: Path, device: str, threads: int | None
) -> None:
    """Weights, batches and a specification, for the workers."""
    inputs.model.save_pretrained(directory / "weights")
    tensors = {
        f"{name}.{i}": batch[j].clone()  # GPT-2's labels are its input_ids
        for i, batch in enumerate(inputs.batches)
        for j, name in enumerate(TENSORS)
    }
    need = sum(x.numel() * x.element_size() for x in tensors.values())
    with atomic_file(directory / "batches.safetensors", what="the batches of the comparison", need=need) as partial:
        save_file(tensors, partial)
    model = type(inputs.model).__name__
    train = {field.name: getattr(recipe.train, field.name) for field in fields(TrainTable)}  # without the task's own
    spec = {"model": model, "train": train, "device": device, "threads": threads}
    replace_json(directory / "spec.json", spec, what="the specification of the comparison")


# ---- the table


def table(times: Sequence[StepTime], *, title: str):
    """The result as a rich table, at most 80 columns wide: a row a contender, those that did not run named below.

    Last column: fastlm's tokens/s over the contender's. MFU only where the chip's peak is known.
    """
    notes = [
        "ms: of a step, median ± interquartile range; GB: peak of the process",
        "step: GB of it that came after the model was loaded",
        "bound: ms of the step's matrix products alone, 3 x forward,",
        "attention's too, at a large product's rate in this run, over ms",
        *_curve_notes([t for t in times if t.curve_off is not None]),
        *(f"not run: {t.contender}: {t.missing}" for t in times if t.missing),
    ]
    out = Table(
        title=title,
        title_justify="left",
        caption="\n".join(notes),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
        min_width=74,
    )
    out.add_column("contender", no_wrap=True)
    has_mfu = any(t.mfu is not None for t in times)
    for column in ("tokens/s", "ms", *(("MFU",) if has_mfu else ()), "bound", "GB", "step", "fastlm"):
        out.add_column(column, justify="right", no_wrap=True)
    ours = next((t.tokens_per_s for t in times if t.contender == "fastlm"), math.nan)
    for t in times:
        if t.missing:
            continue
        cells = [t.contender, f"{t.tokens_per_s:,.0f}", f"{t.ms:.1f} ± {t.ms_iqr:.1f}"]
        if has_mfu:
            cells.append("n/a" if t.mfu is None else f"{t.mfu:.1%}")
        cells += [f"{t.of_bound:.0%}", f"{t.peak_mb / 1024:.2f}", f"{t.step_mb / 1024:.2f}"]
        out.add_row(*cells, "" if t.contender == "fastlm" else f"{ours / t.tokens_per_s:.2f}x")
    return out


def _curve_notes(times: Sequence[StepTime]) -> list[str]:
    """times: those with curves, first the one that the rest are compared with."""
    if len(times) < 2:
        return []
    expected, *others = times
    t = max(others, key=lambda t: t.curve_off)
    out = [f"curves of {len(t.losses)} steps: at most {t.curve_off:.2%} from {expected.contender}'s ({t.contender})"]
    return out + [
        f"LEARNS OTHERWISE: {t.contender}: {t.curve_off:.2%} off, noise {t.curve_noise:.2%}"
        for t in others
        if not t.learns_alike
    ]
