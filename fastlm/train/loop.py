"""`pretrain`: a run, from a recipe, data and a directory to a model that others can load.

fastlm/run/directory.py lists what it writes. What is learned is a function of the recipe and the data alone: order,
masks and dropout depend on (seed, step). So a run that was killed continues from its newest checkpoint with
bit-identical losses, on the same machine and software.
"""

from __future__ import annotations

import math
import platform
import shutil
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import fastlm
from fastlm.chip import chip_name, parse_device, peak_flops
from fastlm.models import Counts
from fastlm.models._size import TRAINED, check_memory
from fastlm.run import directory as runs
from fastlm.run.checkpoint import load_newest, restore, save_checkpoint
from fastlm.run.initial import Initial, find_initial
from fastlm.run.metrics import MetricsFile, first_and_final_loss, plot_loss, read_metrics
from fastlm.run.progress import ProgressLine, duration
from fastlm.run.recipe import Recipe
from fastlm.storage import atomic_directory, json_checksum, replace_json
from fastlm.tasks import Micro, Task, find_task, make_model
from fastlm.train.evaluation import evaluate
from fastlm.train.optimizer import lr_at, make_optimizer, parameter_groups, train_step

PATIENCE = 10  # steps without finite gradients, one after another, that end a run; all of a shorter one


class Diverged(FloatingPointError):
    """The gradients stay non-finite."""


@dataclass(frozen=True)
class Result:
    """How a call of `pretrain` ended.

    summary      what summary.json holds; None where the run was stopped early
    stopped_by   the number of the signal that stopped it; None for a finished run
    """

    out: Path
    step: int
    summary: dict | None
    stopped_by: int | None = None


@dataclass
class Counters:
    """What a run has counted; a checkpoint stores it."""

    step: int = 0
    tokens: int = 0  # real ones
    seconds: float = 0.0
    skipped: int = 0  # steps whose gradients were not finite
    streak: int = 0  # of them, those that came last, one after another
    dropped: int = 0  # predictions beyond the capacity of their batch


def pretrain(recipe: Recipe, data, out, *, device: str = "cpu", resume: str = "auto", init=None) -> Result:
    """Train the recipe's model on `data`, and write everything into the directory `out`.

    data     what `fastlm.data.prepare` wrote, with rows of recipe.data.row_tokens; or text, a path or several, which
             is prepared into OUT/data first
    device   "cpu", "cuda", "cuda:1"
    resume   "auto": continue from the newest checkpoint in `out`, if there is one; "never": `out` must hold no run;
             a checkpoint's or a run's directory: start a new run in `out` from there; given again, continue that one
    init     a model to start from, with its tokenizer (see fastlm.run.initial); None: new weights. The optimizer and
             the schedule are new, unlike with `resume`

    SIGTERM and SIGINT finish the step, write a checkpoint and return, with `Result.stopped_by`; a second one ends the
    process.
    ValueError where data, checkpoints or `out` do not fit the recipe, or the model not into memory. `Diverged` after
    ten steps in a row without finite gradients, or at the end where half of the run had none; none of them was
    applied, and checkpoints are from before.
    """
    out, device = Path(out), parse_device(device)
    initial = None if init is None else find_initial(init)
    if initial is not None:
        recipe = initial.recipe(recipe)
    _check_size(recipe, device, vocab_size=8)  # before text is prepared; its vocabulary is not known yet
    if recipe.train.warmup_steps >= recipe.train.max_steps:
        warnings.warn(
            f"train.warmup_steps: expected fewer than train.max_steps={recipe.train.max_steps}, got "
            f"{recipe.train.warmup_steps}; the learning rate only rises, and the schedule after the peak is not used",
            stacklevel=2,
        )
    with runs.alone_in(out):
        start = runs.find_start(recipe, out, resume)
        return _Run(recipe, runs.open_data(recipe, data, out, start.checkpoint), out, device, start, initial).train()


def _check_size(recipe: Recipe, device: torch.device, vocab_size: int) -> None:
    """ValueError where the model does not fit: its weights into the host's memory, and its training into `device`'s."""
    cls = find_task(recipe.task).model_class(recipe.model.model_type)
    config = replace(recipe.model, vocab_size=vocab_size, pad_token_id=None)
    if device.type != "cpu":
        check_memory(cls, config, torch.device("cpu"), 4, "weights")
    check_memory(cls, config, device, TRAINED, "weights, gradients and AdamW moments")


class _Launched:
    """A step that was given to the device: what the host knows of it, and the result that the device will have."""

    def __init__(self, number: int, micros: list[Micro], lr: float, result: torch.Tensor):
        self.number, self.lr = number, lr
        self.counts, self.dropped = Counts.total(m.counts for m in micros), sum(m.dropped for m in micros)
        self._result, self._done = result, None
        if result.is_cuda:
            self._result = torch.empty(result.shape, pin_memory=True).copy_(result, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> tuple[float, float]:
        """(loss, gradient norm) when the device has finished the step."""
        if self._done is not None:
            self._done.synchronize()
        loss, norm = self._result.tolist()
        return loss, norm


class _Run:
    """One run, from `start` to its last step or a signal."""

    def __init__(
        self,
        recipe: Recipe,
        data: runs.Data,
        out: Path,
        device: torch.device,
        start: runs.Start,
        initial: Initial | None,
    ):
        self.recipe, self.dataset, self.out, self.device = recipe, data.train, out, device
        self.dtype, tokenizer = getattr(torch, recipe.train.dtype), data.train.tokenizer
        self.task = find_task(recipe.task)(recipe, data.train, device, data.validation)
        _check_size(recipe, device, tokenizer.vocab_size)
        if initial is None:
            ids = self.task.token_ids(tokenizer)
            model = make_model(recipe, tokenizer.vocab_size, tokenizer.pad_id, **ids)
            self.task.initialize(model)
        else:
            model = initial.model(recipe, tokenizer)
        self.model = model.to(device).train()
        self.optimizer = make_optimizer(self.model, recipe.train)
        self.counters = Counters()
        if start.checkpoint is not None:
            restore(start.checkpoint, self.model, self.optimizer)
            self.counters = Counters(**start.checkpoint.state["counters"])
        self.start, self.saved = start, self.counters.step
        self.peak = peak_flops(device, self.dtype)
        self.pace = deque(maxlen=20)  # seconds of the latest steps
        self.evaluated: dict[str, float] = {}  # of the latest evaluation

    def train(self) -> Result:
        table, first = self.recipe.train, self.counters.step
        if first == table.max_steps and (summary := runs.finished_summary(self.out)):
            return Result(self.out, first, summary)
        # A summary, if there is one, is of a later checkpoint, which was damaged since.
        (self.out / runs.SUMMARY).unlink(missing_ok=True)
        runs.write_recipe(self.out, self.recipe, self.start.origin)
        runs.adopt_metrics(self.start, self.out)
        self.metrics = MetricsFile(self.out / runs.METRICS, first)
        if self.start.branches:
            self._save()  # the other run may drop the checkpoint that this one starts from
        launched: deque[_Launched] = deque()
        with ProgressLine(self.recipe.name, table.max_steps) as self.line, _stop_signal() as stop:
            self._headline()
            if self.metrics.rows < first:
                self.line.note(
                    f"{runs.METRICS} lacks {first - self.metrics.rows} of the {first} steps before: first_loss and "
                    f"{runs.PLOT} will be of what it has"
                )
            self.clock = time.perf_counter()
            try:
                for step, micros in _ahead(self.task, self.recipe.micro_count, first, table.max_steps):
                    lr = lr_at(step, table)
                    moved = [micro.to(self.device) for micro in micros]
                    result = train_step(
                        self.model, self.optimizer, moved, lr=lr, grad_clip=table.grad_clip, dtype=self.dtype
                    )
                    launched.append(_Launched(step + 1, micros, lr, result))
                    last = bool(stop) or step + 1 == table.max_steps
                    due = last or (table.checkpoint_every and (step + 1) % table.checkpoint_every == 0)
                    evaluates = self._evaluates(step + 1)
                    # The host looks at a step of a GPU while the next one runs, so that the GPU never waits for it.
                    while len(launched) > (self.device.type == "cuda" and not (due or evaluates)):
                        self._report(launched.popleft())
                    if due and not self.counters.streak:
                        self._save()
                    if last:
                        break
            finally:
                self.metrics.close()
            if self.counters.step < table.max_steps:
                self.line.note(
                    f"stopped at step {self.counters.step}; the same command continues after step {self.saved}"
                )
                return Result(self.out, self.counters.step, None, stop[0])
        if 2 * self.counters.skipped >= table.max_steps:
            raise self._diverged(f"{self.counters.skipped} of {table.max_steps} steps")
        return Result(self.out, self.counters.step, self._finish())

    def _report(self, step: _Launched) -> None:
        """Enter a finished step into the counters, the metrics and the progress line."""
        loss, norm = step.wait()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        finite = math.isfinite(loss) and math.isfinite(norm)
        counters, tokens = self.counters, step.counts.tokens
        counters.step = step.number
        counters.tokens += tokens
        counters.seconds += seconds
        counters.dropped += step.dropped
        counters.skipped += not finite
        counters.streak = 0 if finite else counters.streak + 1
        mfu = None if self.peak is None else self.model.flops(step.counts) / (seconds * self.peak)
        new = self._evaluate() if finite and self._evaluates(step.number) else {}
        self.metrics.add(
            {
                "step": step.number,
                "loss": loss if step.counts.predicted else None,
                "tokens": counters.tokens,
                "tokens_per_s": round(tokens / seconds, 1),
                "lr": step.lr,
                "grad_norm": norm,
                "mfu": None if mfu is None else round(mfu, 4),
                **new,
            }
        )
        self.pace.append(seconds)
        pace, steps = sum(self.pace) / len(self.pace), self.recipe.train.max_steps
        fields = [  # on a narrow terminal the last ones are left out
            f"step {step.number}/{steps}",
            f"loss {loss:.3f}",
            f"{tokens / pace:,.0f} tokens/s",
            f"ETA {duration((steps - step.number) * pace)}",
            *([f"val {self.evaluated['val_loss']:.3f}"] if self.evaluated else []),
            *([f"{counters.skipped} skipped"] if counters.skipped else []),
            f"MFU {'n/a' if mfu is None else f'{100 * mfu:.0f}%'}",
            f"lr {step.lr:.1e}",
        ]
        self.line.update(step.number, fields)
        if counters.streak == min(PATIENCE, steps):
            raise self._diverged(f"{counters.streak} steps in a row, up to step {step.number},")

    def _evaluates(self, step: int) -> bool:
        """Whether the held-out text is evaluated after `step`."""
        table = self.recipe.train
        if self.task.validation is None:
            return False
        return step == table.max_steps or bool(table.eval_every and step % table.eval_every == 0)

    def _evaluate(self) -> dict[str, float]:
        self.evaluated = evaluate(self.model, self.task, self.dtype)
        words = {"val_loss": "loss", "val_perplexity": "perplexity", "val_bits_per_byte": "bits a byte"}
        shown = ", ".join(f"{words.get(name, name)} {value:.3f}" for name, value in self.evaluated.items())
        self.line.note(f"step {self.counters.step}: held-out {shown}")
        self.clock = time.perf_counter()  # an evaluation's time is not a step's
        return self.evaluated

    def _diverged(self, steps: str) -> Diverged:
        newest, _ = load_newest(self.out / runs.CHECKPOINTS)
        kept = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is {newest.path}"
        return Diverged(
            f"the gradients of {steps} were not finite, and none was applied; {kept}. "
            f"Try a lower train.lr than {self.recipe.train.lr:g}, or more than "
            f"{self.recipe.train.warmup_steps} train.warmup_steps"
        )

    def _save(self) -> None:
        self.metrics.sync()
        state = {
            "counters": asdict(self.counters),
            "recipe": self.recipe.to_dict(),
            "data": {"manifest": json_checksum(self.dataset.manifest), "accepted": self.dataset.accepted},
            "rng": {"seed": self.recipe.train.seed, "step": self.counters.step},
            "versions": versions(),
        }
        save_checkpoint(
            self.out / runs.CHECKPOINTS,
            self.counters.step,
            self.model,
            self.optimizer,
            state,
            keep=self.recipe.train.keep_checkpoints,
        )
        self.saved = self.counters.step
        self.clock = time.perf_counter()  # a checkpoint's time is not a step's

    def _headline(self) -> None:
        recipe, dataset, parameters = self.recipe, self.dataset, sum(p.numel() for p in self.model.parameters())
        peak = "n/a, no peak is known" if self.peak is None else f"against {self.peak / 1e12:g} TFLOP/s"
        self.line.note(
            f"{recipe.name}: {parameters / 1e6:.3g} M parameters on {chip_name(self.device)} in {recipe.train.dtype}; "
            f"{dataset.rows:,} rows of {dataset.row_tokens} tokens, {' and '.join(f'{x:.0%}' for x in dataset.fill)} "
            f"full, vocabulary {dataset.tokenizer.vocab_size:,}\n"
            f"MFU = 3 · forward FLOPs of matrix products on real tokens / (seconds · peak): {peak}"
        )
        self.line.note("; ".join(map(str, parameter_groups(self.model, recipe.train))))
        if self.counters.step:
            self.line.note(f"resumed after step {self.counters.step} of {recipe.train.max_steps}")

    def _finish(self) -> dict:
        """Write summary.json, loss.png and the model; the summary."""
        counters, rows = self.counters, read_metrics(self.out / runs.METRICS)
        first, final = first_and_final_loss(rows)
        summary = {
            "recipe": self.recipe.name,
            "steps": counters.step,
            "first_loss": first,
            "final_loss": final,
            **self.evaluated,
            **self.task.metrics(),
            "tokens": counters.tokens,
            "seconds": round(counters.seconds, 3),
            "tokens_per_s": round(counters.tokens / counters.seconds, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "skipped_steps": counters.skipped,
            "dropped_predictions": counters.dropped,
            "device": chip_name(self.device),
            "dtype": self.recipe.train.dtype,
            "versions": versions(),
        }
        if counters.dropped:
            self.line.note(
                f"{counters.dropped} selected tokens, beyond the capacity of their batch, were not predicted"
            )
        plot_loss(rows, self.out / runs.PLOT, levels=self.task.metrics(), title=f"fastlm {self.recipe.name}")
        model = self.out / runs.MODEL
        with atomic_directory(model) as partial:
            self.model.eval().save_pretrained(partial, self.dataset.tokenizer)
            if model.exists():  # this run's too: from a later checkpoint, or it was killed before the summary
                shutil.rmtree(model)
        replace_json(self.out / runs.SUMMARY, summary)
        return summary


def versions() -> dict[str, str]:
    return {"fastlm": fastlm.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _ahead(task: Task, micro_count: int, start: int, stop: int) -> Iterator[tuple[int, list[Micro]]]:
    """(step, its micro-batches) for each step, made on the host by one thread while the steps before them run."""
    pin = task.device.type == "cuda"

    def make(step: int) -> list[Micro]:
        micros = [task.micro(step, m) for m in range(micro_count)]
        return [micro.pin() for micro in micros] if pin else micros

    with ThreadPoolExecutor(1, thread_name_prefix="fastlm-batches") as thread:
        pending = deque()
        for step in range(start, stop):
            pending.append((step, thread.submit(make, step)))
            if len(pending) > 2:
                step, made = pending.popleft()
                yield step, made.result()
        for step, made in pending:
            yield step, made.result()


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT add their numbers; the second of the same does what it did before."""
    stop, before = [], {}

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
