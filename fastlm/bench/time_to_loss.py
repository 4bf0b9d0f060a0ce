"""Time to a loss: fastlm's recipe beside nanoGPT's for a CPU, on the characters of tinyshakespeare.

Three contenders train on the first nine tenths of the text:

    plain       fastlm/bench/plain_gpt2.py: nanoGPT's recipe as a loop in plain PyTorch, eager or compiled, whichever
                has the faster steps here (compilation is not timed)
    identical   the same recipe in fastlm: the time a step shows what the kernels are worth
    fastlm      the recipe gpt2-shakespeare, or another

They validate on the whole last tenth, in non-overlapping windows of 64 characters: the first window of `plain` begins
with the character before, that of fastlm with the beginning of a document, whose end fastlm predicts too. The clock
runs during training steps alone. The contenders take turns, a slice of their steps each, so that what else runs on the
machine slows all of them alike. Text is cleaned as `fastlm prepare` does, for all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from fastlm import _malloc, _threads
from fastlm.bench import results
from fastlm.bench.clock import Clock
from fastlm.bench.plain_gpt2 import PlainLoop, PlainRecipe
from fastlm.data import Dataset, open_dataset, prepare
from fastlm.data.cleaning import clean_text
from fastlm.data.layouts import CausalRows
from fastlm.run.recipe import Recipe, load_recipe
from fastlm.run.settled import with_dtype
from fastlm.tasks import find_task, make_model
from fastlm.train.evaluation import evaluate
from fastlm.train.optimizer import lr_at, make_optimizer, train_step

TRAINED = 0.9  # of the text
SLICES = 20  # of a training; between two of them the others have their turn
POINTS = 40  # validations of fastlm's recipe


@dataclass
class Contender:
    """One training: `step(number)` updates once, `validate()` is the held-out loss.

    seconds   in steps so far
    curve     [(steps, seconds, held-out loss), ...]
    """

    name: str
    steps: int
    step: Callable[[int], object]
    validate: Callable[[], float]
    every: int  # steps between validations
    done: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    def advance(self, steps: int, clock: Clock) -> None:
        """So many more steps, or as many as are left, validated when due."""
        for _ in range(min(steps, self.steps - self.done)):
            began = clock.now()
            self.step(self.done)
            self.seconds += clock.now() - began
            self.done += 1
            if self.done % self.every == 0 or self.done == self.steps:
                self.curve.append((self.done, self.seconds, self.validate()))

    @property
    def ms(self) -> float:
        """Milliseconds a step."""
        return 1e3 * self.seconds / max(1, self.done)

    def reached(self, loss: float) -> tuple[int, float] | None:
        """(steps, seconds) at the first validation that is no higher than `loss`; None where none is."""
        return next(((steps, seconds) for steps, seconds, found in self.curve if found <= loss), None)


@dataclass(frozen=True)
class Text:
    """The text, split: its characters as ids for the plain loop, and prepared for fastlm."""

    vocab_size: int
    train: torch.Tensor
    held: torch.Tensor
    directory: Path

    @classmethod
    def split(cls, path: Path, directory: Path) -> Text:
        text = path.read_text(encoding="utf-8")
        cut = int(len(text) * TRAINED)
        parts = {"train": clean_text(text[:cut]), "held": clean_text(text[cut:])}
        ids = {character: id for id, character in enumerate(sorted(set(parts["train"] + parts["held"])))}
        for name, part in parts.items():
            (directory / f"{name}.txt").write_text(part, encoding="utf-8")
        return cls(len(ids), *(torch.tensor([ids[c] for c in part]) for part in parts.values()), directory)

    def prepared(self, row_tokens: int) -> tuple[Dataset, Dataset]:
        """(rows of the training text, rows of the held-out text)."""
        out = self.directory / f"rows-{row_tokens}"
        train, held = self.directory / "train.txt", self.directory / "held.txt"
        rows = prepare([train], "chars", out, layout=CausalRows(row_tokens), validation=[held])
        return rows, open_dataset(out, split="validation")


def identical(plain: PlainRecipe) -> Recipe:
    """nanoGPT's recipe as fastlm's."""
    return Recipe.from_dict(
        {
            "task": "causal_lm",
            "model": {
                "architecture": "gpt2",
                "n_positions": plain.block,
                "n_embd": plain.width,
                "n_layer": plain.layers,
                "n_head": plain.heads,
                "activation_function": "gelu",
                "bias": False,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            },
            "data": {"tokenizer": "chars", "row_tokens": plain.block},
            "train": {
                "dtype": "float32",
                "batch_tokens": plain.batch * plain.block,
                "max_steps": plain.steps,
                "lr": plain.lr,
                "final_lr": plain.min_lr / plain.lr,
                "warmup_steps": plain.warmup,
                "schedule": "cosine",
                "weight_decay": plain.weight_decay,
                "beta1": plain.betas[0],
                "beta2": plain.betas[1],
                "eps": 1e-8,
                "grad_clip": plain.grad_clip,
            },
        },
        name="identical",
    )


def plain_contender(recipe: PlainRecipe, text: Text, seed: int, compiled: bool) -> Contender:
    loop = PlainLoop(recipe, text.train, text.vocab_size, seed, compiled)
    loop.warm_up()
    held = torch.cat([text.train[-1:], text.held])
    return Contender("plain", recipe.steps, loop.step, lambda: loop.validate(held), recipe.steps)


def fastlm_contender(name: str, recipe: Recipe, text: Text, seed: int, points: int) -> Contender:
    recipe = with_dtype(recipe, torch.device("cpu")).with_values({"train.seed": seed, "train.eval_tokens": 0})
    train, held = text.prepared(recipe.data.row_tokens)
    task = find_task(recipe.task)(recipe, train, torch.device("cpu"), held)
    tokenizer, dtype = train.tokenizer, getattr(torch, recipe.train.dtype)
    model = make_model(recipe, tokenizer.vocab_size, tokenizer.pad_id, **task.token_ids(tokenizer)).train()
    task.initialize(model)
    optimizer = make_optimizer(model, recipe.train)

    def step(number: int) -> float:
        micros = [task.micro(number, m) for m in range(recipe.micro_count)]
        lr = lr_at(number, recipe.train)
        result = train_step(model, optimizer, micros, lr=lr, grad_clip=recipe.train.grad_clip, dtype=dtype)
        return result[0].item()

    steps = recipe.train.max_steps
    return Contender(name, steps, step, lambda: evaluate(model, task, dtype)["val_loss"], max(1, steps // points))


def faster_compiled(recipe: PlainRecipe, text: Text, clock: Clock, steps: int = 10, rounds: int = 5) -> bool:
    """Whether the compiled loop's steps are faster than the eager one's: the best round of each, in turn."""
    loops = [PlainLoop(recipe, text.train, text.vocab_size, 0, compiled) for compiled in (False, True)]
    best = [float("inf")] * 2
    for loop in loops:
        loop.warm_up()
    for _ in range(rounds):
        for which, loop in enumerate(loops):
            began = clock.now()
            for number in range(steps):
                loop.step(number)
            best[which] = min(best[which], clock.now() - began)
    return best[1] < best[0]


def race(contenders: list[Contender], clock: Clock) -> None:
    """Train all of them, a slice of each in turn."""
    slices = [max(1, -(-contender.steps // SLICES)) for contender in contenders]
    while any(contender.done < contender.steps for contender in contenders):
        for contender, steps in zip(contenders, slices):
            contender.advance(steps, clock)


def row(seed: int, contenders: list[Contender]) -> dict:
    """What one seed has shown. Ratios are of times, to the plain loop's; None where its final loss was not reached."""
    plain, same, ours = contenders
    loss = plain.curve[-1][2]
    reached = ours.reached(loss)
    return {
        "seed": seed,
        "plain_loss": loss,
        "plain_seconds": plain.seconds,
        "identical_loss": same.curve[-1][2],
        "identical_ratio": same.seconds / plain.seconds,
        "fastlm_loss": ours.curve[-1][2],
        "fastlm_steps": None if reached is None else reached[0],
        "fastlm_seconds": None if reached is None else reached[1],
        "fastlm_ratio": None if reached is None else reached[1] / plain.seconds,
        "ms": {contender.name: contender.ms for contender in contenders},
        "curve": ours.curve,
    }


def report(rows: list[dict], say: Callable[[str], None]) -> None:
    """A line a seed and the medians."""
    say("seed   plain: loss       s   ms/step   identical: loss   x time   fastlm: loss   steps       s   x time")
    for one in rows:
        ms, unreached = one["ms"], one["fastlm_ratio"] is None
        ours = (
            "      -       -  not reached"
            if unreached
            else f"{one['fastlm_steps']:>7} {one['fastlm_seconds']:>7.1f} {one['fastlm_ratio']:>8.3f}"
        )
        say(
            f"{one['seed']:>4} {one['plain_loss']:>13.4f} {one['plain_seconds']:>7.1f} {ms['plain']:>9.1f}"
            f" {one['identical_loss']:>17.4f} {one['identical_ratio']:>8.3f} {one['fastlm_loss']:>14.4f} {ours}"
        )
    same = statistics.median(one["identical_ratio"] for one in rows)
    say(f"identical recipe: {same:.3f} of the plain loop's time, median of {len(rows)} seeds")
    ratios = [float("inf") if one["fastlm_ratio"] is None else one["fastlm_ratio"] for one in rows]
    say(f"to the plain loop's final loss: {statistics.median(ratios):.3f} of its time, median of {len(rows)} seeds")


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--recipe", default="gpt2-shakespeare", help="fastlm's, by name or TOML file")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as of `fastlm pretrain`")
    parser.add_argument("--steps", type=int, default=PlainRecipe.steps, help="of nanoGPT's recipe (default 2000)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--loop", choices=("faster", "eager", "compiled"), default="faster")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if not args.text.is_file():
        parser.error(f"--text: expected a file, got {args.text}")
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {args.seeds}")
    if args.steps <= PlainRecipe.warmup:
        parser.error(f"--steps: expected more than the {PlainRecipe.warmup} of the warm-up, got {args.steps}")
    try:
        args.recipe = load_recipe(args.recipe).with_settings(args.set)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(arguments=None, *, clock: Clock | None = None) -> int:
    """0; 1 where fastlm's recipe does not reach the plain loop's final loss with most of the seeds."""
    args, clock = parse(arguments), clock or Clock()
    _malloc.tune()
    plain = PlainRecipe(steps=args.steps)
    same, rows = identical(plain), []
    _threads.for_work(same.layer_flops())
    say = Console(highlight=False, soft_wrap=True).print
    with tempfile.TemporaryDirectory() as directory:
        text = Text.split(args.text, Path(directory))
        compiled = args.loop == "compiled" or (args.loop == "faster" and faster_compiled(plain, text, clock))
        say(f"plain loop: {'compiled' if compiled else 'eager'}; {torch.get_num_threads()} threads")
        for seed in range(args.seeds):
            contenders = [
                plain_contender(plain, text, seed, compiled),
                fastlm_contender("identical", same, text, seed, points=1),
                fastlm_contender("fastlm", args.recipe, text, seed, POINTS),
            ]
            race(contenders, clock)
            rows.append(row(seed, contenders))
            if args.json:
                results.write_json(args.json, rows, compiled=compiled, recipe=args.recipe.to_dict())
    report(rows, say)
    return int(2 * sum(one["fastlm_ratio"] is None for one in rows) >= len(rows))
