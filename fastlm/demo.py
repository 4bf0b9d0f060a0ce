"""`python -m fastlm.demo --out runs/demo`: a BERT that learns from this machine's Python documentation, in minutes.

A corpus, a tokenizer, pretraining of a BERT-mini for about `--seconds`, a sentence filled in, and the same training
step beside Transformers'. It writes everything into `--out`. A demo that was stopped continues there, a finished one
starts anew.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fastlm import _malloc, _threads

CORPUS_BYTES = 5_000_000  # more than is read in three minutes on two cores
LEAST_STEPS = 600  # these end 0.36 nats below the unigram entropy, 300 end 0.17 below (LOG.md)
MARGIN = 0.25  # nats below the unigram entropy: a model that has learned no more than frequencies ends above
SENTENCE = "If the file does not exist, an exception is [MASK]."
_CALIBRATION = 6  # steps


def demo(
    out: Path,
    *,
    seconds: float,
    recipe,
    least_steps: int = LEAST_STEPS,
    corpus_bytes: int = CORPUS_BYTES,
    rounds: int = 5,
) -> dict:
    """Run it all with `recipe`, its max_steps and warmup_steps set so that training takes `seconds`.

    The summary of the run; see `judge` for what it must have reached. SystemExit where a signal stopped it: 128 + its
    number.
    """
    from fastlm.bench.compare import compare_steps, table
    from fastlm.bench.steps import from_dataset
    from fastlm.data import open_dataset, python_documentation
    from fastlm.fill_mask import fill_mask
    from fastlm.run.directory import DATA, MODEL
    from fastlm.run.progress import prepare_with_progress
    from fastlm.train import pretrain

    say = Console(highlight=False, soft_wrap=True).print
    started = _stopped_demo(out, say)
    corpus = out / "corpus.jsonl"
    if not corpus.exists():
        say("Gathering the documentation of this Python ...")
        size = python_documentation(corpus, max_bytes=corpus_bytes)
        say(f"{size / 1e6:.1f} MB of prose in {corpus}")
    dataset = prepare_with_progress(corpus, recipe.data.tokenizer, out / DATA, row_tokens=recipe.data.row_tokens)
    if started is None:
        pace = _seconds_a_step(recipe, dataset)
        steps = max(least_steps, round(seconds / pace))
        say(f"A step takes {pace * 1e3:.0f} ms here: training {steps} steps, about {steps * pace / 60:.1f} minutes")
        recipe = recipe.with_values({"train.max_steps": steps, "train.warmup_steps": steps // 10})
    else:
        recipe = started
    result = pretrain(recipe, out / DATA, out)
    if result.stopped_by is not None:
        say("Stopped; the same command continues the run.")
        sys.exit(128 + result.stopped_by)
    summary = result.summary
    first, final, entropy = summary["first_loss"], summary["final_loss"], summary["unigram_entropy"]
    say(f"\nloss {first:.2f} -> {final:.2f} nats after {summary['tokens'] / 1e3:.0f}k tokens")
    say(f"{entropy - final:.2f} below the unigram entropy, {entropy:.2f}, the loss of word frequencies alone\n")
    (candidates,) = fill_mask(out / MODEL, SENTENCE)
    say(SENTENCE, markup=False)
    for candidate in candidates:
        say(f"  {candidate.probability:6.1%}  {candidate.token}", markup=False)
    say("\nThe same step in Transformers, side by side ...")
    times = compare_steps(recipe, from_dataset(recipe, open_dataset(out / DATA)), rounds=rounds)
    say(table(times, title=f"{recipe.name}, one training step of {recipe.train.batch_tokens} tokens"))
    for missing in (t for t in times if t.missing):
        say(f"No comparison with {missing.contender}: {missing.missing}. `pip install fastlm\\[hf]` brings it.")
    say(f"\n{out}/: metrics.jsonl, summary.json, loss.png, hf/ (load it with transformers.AutoModelForMaskedLM)")
    _, verdict = judge(summary)
    say(verdict)
    return summary


def judge(summary: dict) -> tuple[bool, str]:
    """(whether the demo did what it is for, the sentence that says so).

    Of at least LEAST_STEPS steps, the final loss must be at least MARGIN below the unigram entropy of the corpus; fewer
    are not judged.
    """
    final, entropy = summary["final_loss"], summary["unigram_entropy"]
    found = f"the final loss, {final:.3f}, is {entropy - final:.3f} nats below the unigram entropy, {entropy:.3f}"
    if summary["steps"] < LEAST_STEPS:
        return True, f"Not judged, since {summary['steps']} steps are fewer than {LEAST_STEPS}: {found}"
    if not entropy - final >= MARGIN:  # a NaN is no success
        return False, f"The demo failed: {found}, and at least {MARGIN} was expected"
    return True, f"The demo learned: {found}; at least {MARGIN} was expected"


def _stopped_demo(out: Path, say):
    """The recipe of a demo in `out` that was stopped; None where a new one starts, what a finished one left removed."""
    from fastlm.run.directory import RECIPE, SUMMARY, WRITTEN, read_recipe
    from fastlm.run.recipe import Recipe

    content = read_recipe(out)
    if content is None:
        return None
    if content.get("name") != "demo":
        raise ValueError(f"--out: {out} holds a run that is no demo; name another directory")
    if not (out / SUMMARY).exists():
        say(f"Continuing the demo that was stopped in {out}")
        return Recipe.from_dict(content, name="demo")
    say(f"Starting anew: the finished demo in {out} is replaced, its corpus and tokenizer are used again")
    # The summary says that it is finished, the recipe that it is a demo: killed in between, the next starts anew too.
    for name in (*sorted({*WRITTEN} - {SUMMARY, RECIPE}), SUMMARY, RECIPE):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return None


def _seconds_a_step(recipe, dataset) -> float:
    """Measured on a model that is thrown away: the second fastest of a few steps after the first two."""
    import torch

    from fastlm.tasks import find_task, make_model
    from fastlm.train.optimizer import make_optimizer, train_step

    model = make_model(recipe, dataset.tokenizer.vocab_size, dataset.tokenizer.pad_id).train()
    task = find_task(recipe.task)(recipe, dataset, torch.device("cpu"))
    optimizer = make_optimizer(model, recipe.train)
    times = []
    for step in range(_CALIBRATION):
        began = time.perf_counter()
        micros = [task.micro(step, m) for m in range(recipe.micro_count)]
        train_step(model, optimizer, micros, lr=1e-4, grad_clip=recipe.train.grad_clip, dtype=torch.float32)
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastlm.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory to write (default runs/demo)")
    parser.add_argument("--seconds", type=float, default=180.0, help="how long to train (default 180)")
    arguments = parser.parse_args()
    _malloc.tune()
    _threads.wait_policy()
    _threads.for_work()
    from fastlm.train import load_recipe

    try:
        summary = demo(arguments.out, seconds=arguments.seconds, recipe=replace(load_recipe("bert-mini"), name="demo"))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    good, verdict = judge(summary)
    if not good:
        sys.exit(f"error: {verdict}")


if __name__ == "__main__":
    main()
