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
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

import fastlm
from fastlm.chip import chip_name, parse_device
from fastlm.data import Mixture
from fastlm.models import Counts, Model
from fastlm.run import directory as runs
from fastlm.run.checkpoint import (
    Checkpoint,
    Snapshot,
    Writer,
    checkpoint_path,
    load_newest,
    newest_name,
    read_checkpoint,
    restore,
    restore_weights,
    snapshot,
    write_checkpoint,
    write_shard,
)
from fastlm.run.initial import Initial, find_initial
from fastlm.run.metrics import RERUN, MetricsFile, NoMetrics, first_and_final_loss, plot_loss, read_metrics
from fastlm.run.progress import ProgressLine
from fastlm.run.recipe import Recipe
from fastlm.run.reports import write_reports
from fastlm.run.settled import settle_dtype
from fastlm.run.tracking import Tracked, check_logs
from fastlm.storage import atomic_directory, json_checksum, replace_json
from fastlm.tasks import Micro, find_task, make_model
from fastlm.train._advice import out_of_memory
from fastlm.train._memory import check_size, check_step
from fastlm.train.ahead import ahead, stop_signal
from fastlm.train.best import Best
from fastlm.train.evaluation import Final
from fastlm.train.graph import StepGraph, check_setting, find_graph, possible
from fastlm.train.micro_size import settle_size, sizes
from fastlm.train.optimizer import lr_at, make_optimizer, train_step
from fastlm.train.parallel import Heartbeat, Shards, World, connect
from fastlm.train.spikes import WINDOW
from fastlm.train.watch import Counters, Watch

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


def pretrain(recipe: Recipe, data, out, *, device: str = "cpu", resume: str = "auto", init=None, log=()) -> Result:
    """Train the recipe's model on `data`, and write everything into the directory `out`.

    data     what `fastlm.data.prepare` wrote, with rows of recipe.data.row_tokens; several of these, mixed as
             recipe.data.weights says; or text, a path or several, which is prepared into OUT/data first
    device   "cpu", "cuda", "cuda:1"
    resume   "auto": continue from the newest checkpoint in `out`, if there is one; "never": `out` must hold no run;
             a checkpoint's or a run's directory: start a new run in `out` from there; given again, continue that one
    init     a model to start from, with its tokenizer (see fastlm.run.initial); None: new weights. The optimizer and
             the schedule are new, unlike with `resume`
    log      what else gets the metrics: "tensorboard", "wandb" (see fastlm.run.tracking)

    SIGTERM and SIGINT finish the step, write a checkpoint and return, with `Result.stopped_by`; a second one ends the
    process.
    ValueError where data, checkpoints or `out` do not fit the recipe, or the model not into memory. `Diverged` after
    ten steps in a row without finite gradients, or at the end where half of the run had none; none of them was
    applied, and checkpoints are from before.
    """
    out, device, log = Path(out), parse_device(device), check_logs(log)
    if find_task(recipe.task).scored:
        raise ValueError(f"recipe: expected one of a task on text, got {recipe.task}; fastlm finetune {recipe.task}")
    initial = None if init is None else find_initial(init)
    if initial is not None:
        recipe = initial.recipe(recipe)
    check_size(recipe, device, vocab_size=8)  # before text is prepared; its vocabulary is not known yet
    return run(
        recipe,
        lambda start: runs.open_data(recipe, data, out, start),
        out,
        device=device,
        resume=resume,
        initial=initial,
        log=log,
    )


def run(
    recipe: Recipe,
    open_data: Callable[[Checkpoint | None], runs.Data],
    out: Path,
    *,
    device: torch.device,
    resume: str,
    initial: Initial | None,
    log: tuple[str, ...] = (),
) -> Result:
    """`pretrain`, whatever the data is. open_data: the data, of the checkpoint that the run continues from, or None."""
    if recipe.train.warmup_steps >= recipe.train.max_steps:
        warnings.warn(
            f"train.warmup_steps: expected fewer than train.max_steps={recipe.train.max_steps}, got "
            f"{recipe.train.warmup_steps}; the learning rate only rises, and the schedule after the peak is not used",
            stacklevel=2,
        )
    world = connect(device)
    if recipe.train.micro_key in recipe.open_keys():
        sizes(recipe, world.size)  # ValueError where there is none
    else:
        world.micros(recipe.micro_count, recipe.train.micro_key)
    check_setting(recipe.train.cuda_graph, world)
    with runs.alone_in(out) if world.main else nullcontext():
        with world.main_first():
            start = runs.find_start(recipe, out, resume)
            data = open_data(start.checkpoint)
        world.agree(
            {
                "the step to start from": 0 if start.checkpoint is None else start.checkpoint.step,
                "data": json_checksum(runs.data_state(data.train)),
            },
            f"expected {out} and the data to be the same on all machines: put them into a file system that all share",
        )
        recipe, why = settle_dtype(recipe, start.recipe, world.device, world.share)
        return _Run(recipe, data, out, world, start, initial, log, why).train()


class _Launched:
    """A step that was given to the device: what the host knows of it, and the result that the device will have."""

    def __init__(self, number: int, micros: list[Micro], lr: float, result: torch.Tensor, stop: bool):
        self.number, self.lr, self.stop = number, lr, stop
        self.counts, self.dropped = Counts.total(m.counts for m in micros), sum(m.dropped for m in micros)
        self._result, self._done = result, None
        if result.is_cuda:
            self._result = torch.empty(result.shape, pin_memory=True).copy_(result, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> tuple[float, float]:
        """(loss, gradient norm) when the device has finished the step.

        With several processes `stop`, `counts` and `dropped` then are those of all of them.
        """
        if self._done is not None:
            self._done.synchronize()
        loss, norm, *sums = self._result.tolist()
        if sums:
            self.stop, *counts, self.dropped = map(int, sums)
            self.counts = Counts(*counts)
        return loss, norm


class _Run:
    """One run, from `start` to its last step or a signal. why: what the headline says of the dtype."""

    def __init__(
        self,
        recipe: Recipe,
        data: runs.Data,
        out: Path,
        world: World,
        start: runs.Start,
        initial: Initial | None,
        log: tuple[str, ...] = (),
        why: str = "",
    ):
        self.recipe, self.dataset, self.out, self.world, device = recipe, data.train, out, world, world.device
        self.device = device
        self.dtype, tokenizer = getattr(torch, recipe.train.dtype), data.train.tokenizer
        self.task = find_task(recipe.task)(recipe, data.train, device, data.validation)
        check_size(recipe, device, tokenizer.vocab_size)
        if initial is None:
            ids = self.task.token_ids(tokenizer)
            model = make_model(recipe, tokenizer.vocab_size, tokenizer.pad_id, **ids)
            if start.checkpoint is None:  # else all weights are restored, and its rows need not be read
                self.task.initialize(model)
        else:
            model = initial.model(recipe, tokenizer, self.task.head())
        recipe, micro = settle_size(self.task, model, world)
        if recipe is not self.recipe:
            self.recipe, self.task = recipe, find_task(recipe.task)(recipe, data.train, device, data.validation)
        world.micros(recipe.micro_count, recipe.train.micro_key)
        self.words = why, micro
        self.memory = check_step(self.task, model.config)
        self.model = model.to(device).train()
        self.trained = world.wrap(self.model, recipe.train.shard)
        self.shards = Shards(self.model, world) if recipe.train.shard and world.size > 1 else None
        self.optimizer = make_optimizer(self.model, recipe.train, self.shards)
        self.parameters = dict(self.model.named_parameters())
        if self.shards is not None:
            self.parameters = {name: self.shards.local(p) for name, p in self.parameters.items()}
        self.counters = Counters()
        if start.checkpoint is not None:
            part = self.shards.part if self.shards is not None else (lambda whole: whole)
            restore(start.checkpoint, self.model, self.optimizer, self.parameters, part)
            self.counters = Counters(**start.checkpoint.state["counters"])
        self.start, self.saved, self.log = start, self.counters.step, log
        self.watch = Watch(self.task, world, self.counters)
        self.evaluated: dict[str, float] = {}  # of the latest evaluation
        self.best = Best(self.task, self.counters) if self.task.scored and data.validation is not None else None
        self.final = Final(self.task, self.dtype, world, self.shards is not None, data.test)
        self.improved = False  # since the last checkpoint
        self.taken: Snapshot | None = None  # the last checkpoint's
        self.stopping, self.stopped_by = False, None

    def train(self) -> Result:
        first = self.counters.step
        if self._done() and (summary := runs.finished_summary(self.out)):
            return Result(self.out, first, summary)
        self.world.barrier()  # every process has read what is written from here on
        if self.world.main:
            # A summary, if there is one, is of a later checkpoint, which was damaged since.
            (self.out / runs.SUMMARY).unlink(missing_ok=True)
            runs.write_recipe(self.out, self.recipe, self.start.origin)
            runs.adopt_metrics(self.start, self.out)
            self.metrics = MetricsFile(self.out / runs.METRICS, first)
            before = read_metrics(self.metrics.path)[-2 * WINDOW :]
        else:
            self.metrics, before = NoMetrics(), []
        console = None if self.world.main else Console(quiet=True)
        with (
            ProgressLine(self.recipe.name, self.recipe.train.max_steps, console) as self.line,
            stop_signal() as stop,
            Heartbeat(self.world, self._advice) as heartbeat,
            closing(self.metrics),
        ):
            self.watch.start(self.line, (row["loss"] for row in before))
            self.watch.headline(self.model, self.memory, *self.words)
            for note in self.final.notes():
                self.line.note(note)
            if self.world.main:
                self.metrics = Tracked(self.metrics, self.log, self.recipe, self.out, first, self.line.note)
            if self.metrics.rows < first:
                self.line.note(
                    f"{runs.METRICS} lacks {first - self.metrics.rows} of the {first} steps before: first_loss and "
                    f"{runs.PLOT} will be of what it has"
                )
            try:
                with Writer() as self.writer:
                    if self.start.branches:
                        self._save()
                        self.writer.wait()  # the other run may drop the checkpoint that this one starts from
                    self._steps(first, stop)
            except RuntimeError as error:
                where = {"step": self.counters.step, "saved": self.saved > 0, "out": self.out}
                advice = out_of_memory(error, self.recipe, self.device, processes=self.world.size, **where)
                raise advice or heartbeat.explain(error) from error
            finally:
                self.metrics.close()
            if not self._done():
                self.line.note(
                    f"stopped at step {self.counters.step}; the same command continues after step {self.saved}"
                )
                return Result(self.out, self.counters.step, None, self.stopped_by)
        if 2 * self.counters.skipped >= self.counters.step:
            raise self._diverged(f"{self.counters.skipped} of {self.counters.step} steps")
        self._take_best()
        model = self.model if self.shards is None else self.shards.gather(self.model)
        return Result(self.out, self.counters.step, self._finish(model) if self.world.main else None)

    def _steps(self, first: int, stop: list[int]) -> None:
        """The steps from `first` on, to the last, or to where a process was told to stop."""
        table, launched, graph = self.recipe.train, deque(), None
        mine = self.world.micros(self.recipe.micro_count, table.micro_key)
        self.watch.pace.start()
        for step, micros in ahead(self.task, mine, first, first if self._done() else table.max_steps):
            lr = lr_at(step, table)
            moved = [micro.to(self.device) for micro in micros]
            if step == first and possible(table.cuda_graph, self.world):
                graph = self._find_graph(moved[0])
            result = train_step(
                self.trained,
                self.optimizer,
                moved,
                lr=lr,
                grad_clip=table.grad_clip,
                dtype=self.dtype,
                world=self.world,
                shards=self.shards,
                stop=bool(stop),
                graph=graph,
            )
            launched.append(_Launched(step + 1, micros, lr, result, bool(stop)))
            due = step + 1 == table.max_steps
            due |= bool(table.checkpoint_every and (step + 1) % table.checkpoint_every == 0)
            # The host looks at a step of a GPU while the next one runs, so that the GPU never waits for it.
            if self.world.size == 1:
                launched[-1].stop |= bool(stop)  # told during the step
            self.writer.check()
            while len(launched) > (self.device.type == "cuda" and not (due or self._evaluates(step + 1))):
                self._report(launched.popleft())
            if self.stopping and not due:
                while launched:
                    self._report(launched.popleft())
                due = True
            if (due or self.improved or self._done()) and not self.counters.streak:
                with self.watch.apart("checkpoint"):
                    self._save()
            if self.stopping or self._done():
                break
        self.stopped_by = stop[0] if stop else signal.SIGTERM  # another process was told to

    def _done(self) -> bool:
        """Whether no step is left: after the last one, or where no evaluation is better any more."""
        return self.counters.step == self.recipe.train.max_steps or (self.best is not None and self.best.exhausted)

    def _take_best(self) -> None:
        """The weights of the best evaluation, and its figures; what there is to test is tested with them."""
        best = self.counters.best_step or self.counters.step  # the last ones where no evaluation was the best
        if best != self.counters.step:
            self.world.barrier()  # the first process has written it
            part = self.shards.part if self.shards is not None else (lambda whole: whole)
            checkpoint = read_checkpoint(checkpoint_path(self.out / runs.CHECKPOINTS, best))
            restore_weights(checkpoint, self.model, self.parameters, part)
        self.final.finish(self.model, best)

    def _find_graph(self, micro: Micro) -> StepGraph | None:
        setting = self.recipe.train.cuda_graph
        with self.watch.apart("capture"):
            graph, choice = find_graph(self.model, micro, self.dtype, setting, self.out / runs.GRAPH)
        self.line.note(f"CUDA graph of a micro-batch {choice}")
        return graph

    def _report(self, step: _Launched) -> None:
        """Enter a finished step into the counters, the metrics and the progress line."""
        loss, norm = step.wait()
        self.stopping = bool(step.stop)
        rates = self.watch.timed(step.counts.tokens, self.model.flops(step.counts))
        finite = math.isfinite(loss) and math.isfinite(norm)
        counters = self.counters
        counters.step = step.number
        counters.tokens += step.counts.tokens
        counters.dropped += step.dropped
        counters.skipped += not finite
        counters.streak = 0 if finite else counters.streak + 1
        if finite and step.counts.predicted:
            self.watch.check(step.number, loss, norm)
        new = self._evaluate() if finite and self._evaluates(step.number) else {}
        self.metrics.add(
            {
                "step": step.number,
                "loss": loss if step.counts.predicted else None,
                "tokens": counters.tokens,
                "lr": step.lr,
                "grad_norm": norm,
                **rates,
                **new,
            }
        )
        self.watch.show(step.number, loss, step.lr, self.evaluated.get("val_loss"))
        if counters.streak == min(PATIENCE, self.recipe.train.max_steps):
            raise self._diverged(f"{counters.streak} steps in a row, up to step {step.number},")

    def _evaluates(self, step: int) -> bool:
        """Whether the held-out text is evaluated after `step`."""
        table = self.recipe.train
        if self.task.validation is None:
            return False
        return step == table.max_steps or bool(table.eval_every and step % table.eval_every == 0)

    def _evaluate(self) -> dict[str, float]:
        with self.watch.apart("evaluation"):
            self.evaluated = self.final.evaluate(self.model, self.counters.step)
        if self.best is not None:
            self.improved |= self.best.add(self.counters.step, self.evaluated)
        words = {name: name.removeprefix("val_").replace("_", " ") for name in self.evaluated}
        shown = ", ".join(f"{words[name]} {value:.3f}" for name, value in self.evaluated.items())
        self.line.note(f"step {self.counters.step}: held-out {shown}")
        return self.evaluated

    def _diverged(self, steps: str) -> Diverged:
        self.writer.wait()
        newest, _ = load_newest(self.out / runs.CHECKPOINTS)
        kept = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is {newest.path}"
        return Diverged(
            f"the gradients of {steps} were not finite, and none was applied; {kept}. "
            f"Try a lower train.lr than {self.recipe.train.lr:g}, or more than "
            f"{self.recipe.train.warmup_steps} train.warmup_steps"
        )

    def _save(self) -> None:
        """Copy what a checkpoint holds; a thread writes it while the next steps run."""
        self.metrics.sync()
        state = {
            "counters": asdict(self.counters),
            "recipe": self.recipe.to_dict(),
            "data": runs.data_state(self.dataset),
            "rng": {"seed": self.recipe.train.seed, "step": self.counters.step},
            "versions": versions(),
        }
        step, directory, keep = self.counters.step, self.out / runs.CHECKPOINTS, self.recipe.train.keep_checkpoints
        best, self.improved = self.counters.best_step, False
        shard = (self.world.rank, self.world.size) if self.shards is not None else (0, 1)
        if self.world.main or self.shards is not None:
            self.writer.wait()  # it reads the memory that is written over
            taken = self.taken = snapshot(step, self.parameters, self.optimizer, state, shard, self.taken)

            def write():
                if not self.world.main:
                    write_shard(directory, taken)
                self.world.arrive(f"checkpoint/{step}", wait=self.world.main and self.shards is not None)
                if self.world.main:
                    write_checkpoint(directory, taken, keep=keep, best=best)
                    self.saved = step

            self.writer.submit(write)

    def _advice(self) -> str:
        return (
            f"the newest checkpoint is {newest_name(self.out / runs.CHECKPOINTS)}; the same command continues from "
            "there, with any number of processes that divides the micro-batches"
        )

    def _finish(self, whole: Model) -> dict:
        """Write summary.json, loss.png and the model; the summary."""
        counters, rows = self.counters, read_metrics(self.out / runs.METRICS)
        # From the file: this process may have begun after the last step, whose evaluation another one made.
        evaluated = next((row for row in reversed(rows) if "val_loss" in row), {})
        first, final = first_and_final_loss(rows)
        summary = {
            "recipe": self.recipe.name,
            "steps": counters.step,
            **({"best_step": counters.best_step or counters.step} if self.task.scored else {}),
            "first_loss": first,
            "final_loss": final,
            **{name: value for name, value in evaluated.items() if name.startswith("val_")},
            **self.final.figures(),
            **self.task.metrics(),
            "tokens": counters.tokens,
            **self._mix(),
            "seconds": round(counters.seconds, 3),
            "other_seconds": round(counters.other_seconds, 3),
            "tokens_per_s": round(counters.tokens / counters.seconds, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "mfu": self.watch.mean_mfu,
            "peak_flops": self.watch.peak.flops,
            "skipped_steps": counters.skipped,
            "loss_spikes": counters.spikes,
            "dropped_predictions": counters.dropped,
            "device": chip_name(self.device),
            "dtype": self.recipe.train.dtype,
            "versions": versions(),
        }
        if counters.dropped:
            self.line.note(
                f"{counters.dropped} selected tokens, beyond the capacity of their batch, were not predicted"
            )
        model = self.out / runs.MODEL
        with atomic_directory(model, what="the model", need=4 * summary["parameters"], kept=RERUN) as partial:
            whole.eval().save_pretrained(partial, self.dataset.tokenizer)
            if model.exists():  # this run's too: from a later checkpoint, or it was killed before the summary
                shutil.rmtree(model)
        if self.task.scored:  # after the model, which an error in a plot must not cost
            write_reports(self.out, self.task, rows, summary, self.final)
        else:
            plot_loss(rows, self.out / runs.PLOT, levels=self.task.metrics(), title=f"fastlm {self.recipe.name}")
        replace_json(self.out / runs.SUMMARY, summary, what="the summary", kept=RERUN)
        return summary

    def _mix(self) -> dict[str, object]:
        """The summary's entry of the sources, where there are several."""
        if not isinstance(self.dataset, Mixture):
            return {}
        return {"mix": self.dataset.report(self.counters.step * self.recipe.batch_rows)}


def versions() -> dict[str, str]:
    return {"fastlm": fastlm.__version__, "torch": torch.__version__, "python": platform.python_version()}
