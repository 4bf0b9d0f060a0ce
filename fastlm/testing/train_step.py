"""One training step of fastlm beside the same step of others, interleaved, each contender in a process of its own.

The contenders (fastlm/testing/step_contenders.py) start from the same weights and take the same rows
(fastlm/testing/steps.py). Before the clock starts each says its loss on the first batch. Who computes something else is
named and takes no further part, and so is who fails, then or later. Then every round runs each of them for a few steps,
in turn: a slow moment of the machine meets them all, and an allocator's settings are one process's. The first step of a
round is not measured: it finds the caches full of another process.

Beside the contenders a large matrix product is timed, in the same rounds: a step that did nothing but its matrix
products (Model.flops, attention's included), at the rate of that one, is the bound. Only real tokens count.

Where losses of the first steps are kept, they have to be fastlm's within noise. Without dropout all contenders compute
the same, and only rounding, which grows, parts them. With dropout each draws its own: means over windows of steps are
compared, and the noise is that of the differences from one step to the next, which a trend hardly moves.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from safetensors.torch import save_file

from fastlm import _malloc
from fastlm.chip import peak_flops
from fastlm.run.recipe import Recipe
from fastlm.tasks import TrainTable
from fastlm.testing import step_contenders
from fastlm.testing.step_contenders import MATMUL, MATMUL_SIZE, TENSORS
from fastlm.testing.steps import BATCHES, StepInputs
from fastlm.testing.timing import Timing

CONTENDERS = ("fastlm", "transformers", "transformers tuned")
EVERY = tuple(step_contenders.CONTENDERS)
_CHECK = {"float32": 2e-5, "bfloat16": 2e-2}  # how far a contender's first loss may be from fastlm's, relatively
_ROUNDING = {"float32": 1e-2, "bfloat16": 4e-2}  # and any loss of a curve, without dropout
_WINDOW = 10  # steps whose mean is compared, with dropout
_SIGMAS = 4
WRONG = "WRONG: "  # how StepTime.missing begins where a contender computes something else
LEAST_CURVE = 3  # steps; fewer say nothing of the noise


@dataclass(frozen=True)
class StepTime:
    """How a contender did: milliseconds a step, median and interquartile range over rounds; or why it did not run."""

    contender: str
    tokens: int = 0  # real ones, in a step
    ms: float = math.nan
    ms_iqr: float = math.nan
    mfu: float | None = None
    of_bound: float = math.nan  # of what the step's matrix products alone allow, at the rate of a large one
    peak_mb: float = math.nan  # CPU: resident memory of the process; CUDA: allocated by torch
    step_mb: float = math.nan  # less what there was with the model loaded: gradients, optimizer, all that a step holds
    missing: str | None = None
    losses: tuple[float, ...] = ()  # of the first steps, where they were asked for
    curve_off: float | None = None  # how far they are from the first contender's, relatively, at most
    curve_noise: float | None = None  # and how far noise alone may take them

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


def compare_steps(
    recipe: Recipe,
    inputs: StepInputs,
    *,
    device: str = "cpu",
    contenders: Sequence[str] = CONTENDERS,
    rounds: int = 7,
    seconds: float = 1.0,
    threads: int | None = None,
    curve: int = 0,
) -> list[StepTime]:
    """Times a step of `recipe`, one micro-batch, `rounds` times for each contender, each at least `seconds` long.

    contenders: names of step_contenders.CONTENDERS, or "module:name" of another one. threads: of torch and of fastlm's
    kernels, on a CPU (default torch's). curve: so many steps before the clock, whose losses are kept and compared.
    Whose first loss is not the first one's is missing, and WRONG. RuntimeError where the first one fails.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    with tempfile.TemporaryDirectory(prefix="fastlm-step-") as name:
        directory = Path(name)
        _write_inputs(recipe, inputs, directory, device, threads)
        workers, answers, missing = {}, {}, {}

        def ask(contender: str, *what) -> bool:
            """Keeps what its process answers, to `what` or at its start. False where it does not run: see `missing`."""
            if contender in missing:
                return False
            answer = workers[contender].run(*what) if what else workers[contender].read()
            if "failed" in answer and contender in (contenders[0], MATMUL):
                raise RuntimeError(f"{contender} failed: {answer['failed']}\n{workers[contender].said()}")
            if "failed" in answer or "missing" in answer:
                missing[contender] = answer.get("missing") or f"failed: {answer['failed']}"
            answers[contender] = answer
            return contender not in missing

        try:
            for contender in (*contenders, MATMUL):
                workers[contender] = _Worker(contender, directory)
            losses = {contender: answers[contender]["loss"] for contender in workers if ask(contender)}
            del losses[MATMUL]
            missing |= _wrong(losses, _CHECK[recipe.train.dtype])
            curves = {c: answers[c]["losses"] for c in contenders if curve and ask(c, curve, "losses")}
            # Batches of different lengths: a round is all of them, as often as it takes.
            least = BATCHES if inputs.padded else 1
            steps = {}
            for contender in workers:
                # The heap settles in as many, and every shape is compiled.
                if ask(contender, BATCHES) and ask(contender, least):
                    took = answers[contender]["seconds"]
                    steps[contender] = least * max(1, math.ceil(seconds / (least * took)))
            times = {contender: [] for contender in steps}
            for _ in range(rounds):
                for contender in steps:
                    if ask(contender, steps[contender]):
                        times[contender].append(answers[contender]["seconds"] * 1e3)
        finally:
            for worker in workers.values():
                worker.close()
    peak = peak_flops(torch.device(device), getattr(torch, recipe.train.dtype))
    flops = inputs.flops
    bound_ms = flops / (2 * MATMUL_SIZE[torch.device(device).type] ** 3) * Timing.of(times[MATMUL]).ms
    noise = {"dropout": inputs.dropout, "dtype": recipe.train.dtype}
    expected = next(iter(curves.values()), None)
    out = []
    for contender in contenders:
        if contender in missing:
            out.append(StepTime(contender, missing=missing[contender]))
            continue
        timing, answer = Timing.of(times[contender]), answers[contender]
        off, explained = curve_off(curves[contender], expected, **noise) if curve else (None, None)
        out.append(
            StepTime(
                contender,
                inputs.tokens,
                timing.ms,
                timing.iqr,
                mfu=None if peak is None else flops / (timing.ms / 1e3 * peak),
                of_bound=bound_ms / timing.ms,
                peak_mb=answer["peak_mb"],
                step_mb=answer["step_mb"],
                losses=tuple(curves.get(contender, ())),
                curve_off=off,
                curve_noise=explained,
            )
        )
    return out


def table(times: Sequence[StepTime], *, title: str):
    """The result as a rich table, at most 80 columns wide: a row a contender. Who did not run is named below.

    fastlm: how many times as many tokens/s as the contender's. MFU only where the chip's peak is known.
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
        title=title, title_justify="left", caption="\n".join(notes), caption_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=0, min_width=74,
    )  # fmt: skip
    out.add_column("contender", no_wrap=True)
    has_mfu = any(t.mfu is not None for t in times)
    for column in ("tokens/s", "ms", *(("MFU",) if has_mfu else ()), "bound", "GB", "step", "fastlm"):
        out.add_column(column, justify="right", no_wrap=True)
    ours = next((t.tokens_per_s for t in times if t.contender == "fastlm"), math.nan)
    for t in times:
        if not t.missing:
            mfu = ("n/a" if t.mfu is None else f"{t.mfu:.1%}",) if has_mfu else ()
            times_ours = "" if t.contender == "fastlm" else f"{ours / t.tokens_per_s:.2f}x"
            out.add_row(
                t.contender, f"{t.tokens_per_s:,.0f}", f"{t.ms:.1f} ± {t.ms_iqr:.1f}", *mfu, f"{t.of_bound:.0%}",
                f"{t.peak_mb / 1024:.2f}", f"{t.step_mb / 1024:.2f}", times_ours,
            )  # fmt: skip
    return out


def _curve_notes(times: Sequence[StepTime]) -> list[str]:
    """times: those with curves, the one that the others are compared with first."""
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


# ---- the processes


def _write_inputs(recipe: Recipe, inputs: StepInputs, directory: Path, device: str, threads: int | None) -> None:
    """Weights, batches and what to do with them, for the workers."""
    inputs.model.save_pretrained(directory / "weights")
    tensors = {
        f"{name}.{i}": batch[j].clone()  # GPT-2's labels are its input_ids
        for i, batch in enumerate(inputs.batches)
        for j, name in enumerate(TENSORS)
    }
    save_file(tensors, directory / "batches.safetensors")
    model = type(inputs.model).__name__
    train = {field.name: getattr(recipe.train, field.name) for field in fields(TrainTable)}  # without the task's own
    spec = {"model": model, "train": train, "device": device, "threads": threads}
    (directory / "spec.json").write_text(json.dumps(spec))


def _wrong(losses: dict[str, float], tolerance: float) -> dict[str, str]:
    """{contender: how} of those whose loss is not the first one's."""
    first, expected = next(iter(losses.items()), ("", math.nan))
    return {
        contender: f"{WRONG}computes a loss of {loss:.6f} where {first} computes {expected:.6f}"
        for contender, loss in losses.items()
        if contender != first and not abs(loss - expected) <= tolerance * abs(expected)
    }


class _Worker:
    """A contender's process; it runs a round when it is told to, and is idle otherwise."""

    def __init__(self, contender: str, directory: Path):
        environment = {k: v for k, v in os.environ.items() if k not in _malloc.VARIABLES}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastlm.testing.step_contenders", contender, str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip

    def read(self) -> dict:
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": f"its process ended with {self._process.wait()}"}

    def run(self, steps: int, what: str = "time") -> dict:
        """Runs so many steps: {"seconds": a step, "peak_mb", "step_mb"}; what="losses": {"losses": of each}."""
        with suppress(BrokenPipeError):  # its last answer says why
            self._process.stdin.write(f"{what} {steps}\n")
            self._process.stdin.flush()
        return self.read()

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read()[-2000:]

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
