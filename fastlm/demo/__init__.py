"""`fastlm demo [bert|gpt2|t5]`: a model that learns from this machine's Python documentation, in minutes.

A corpus, a tokenizer, pretraining for about `--seconds`, what the model makes of held-out sentences, and its numbers on
held-out text beside those of a simpler model; for BERT also the same training step beside Transformers'. It writes
everything into `--out`. A demo that was stopped continues there, a finished one starts anew.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fastlm.storage import file_checksum, replace_json
from fastlm.terminal import width_of, wrap

CORPUS_BYTES = 5_000_000  # more than is read in three minutes on two cores
HELD_OUT = 0.02  # share of the corpus's documents
KINDS = "bert", "gpt2", "t5"
FOUND = "demo.json"  # what was measured on held-out text
_CALIBRATION = 6  # steps


def recipe_of(kind: str):
    """The recipe that the demo of `kind` trains. ValueError for another kind."""
    from fastlm.train import load_recipe

    recipe = load_recipe(_module(kind).RECIPE)
    return replace(recipe.with_values({"data.validation_share": HELD_OUT}), name=_name(kind))


def demo(
    out: Path,
    *,
    seconds: float,
    kind: str = "bert",
    recipe=None,
    least_steps: int | None = None,
    corpus_bytes: int = CORPUS_BYTES,
    rounds: int = 5,
) -> dict:
    """Run it all with `recipe`, its max_steps and warmup_steps set so that training takes `seconds`.

    kind     "bert", "gpt2" or "t5"
    recipe   default: `recipe_of(kind)`
    least_steps   train these at least, however long they take; default: what the kind is judged on

    The summary of the run, and what was measured on held-out text; see `judge` for what that must have reached.
    SystemExit where a signal stopped it: 128 + its number.
    """
    import torch

    from fastlm.data import open_dataset, python_documentation
    from fastlm.demo._held_out import held_out_sentences
    from fastlm.run.directory import DATA, MODEL, prepare_for
    from fastlm.run.settled import with_dtype
    from fastlm.tasks import find_task
    from fastlm.train import pretrain

    module = _module(kind)
    recipe = recipe_of(kind) if recipe is None else recipe
    say = Console(highlight=False, soft_wrap=True).print
    started = _stopped_demo(out, _name(kind), say)
    corpus = out / "corpus.jsonl"
    if not corpus.exists():
        say("Gathering the documentation of this Python ...")
        python_documentation(corpus, max_bytes=corpus_bytes)
    checksum = file_checksum(corpus)
    say(f"{corpus.stat().st_size / 1e6:.1f} MB of prose in {corpus}, checksum {checksum[:16]}")
    dataset = prepare_for(recipe.task, recipe.data, corpus, out / DATA)
    if started is None:
        settled = with_dtype(recipe, torch.device("cpu"))
        pace = _seconds_a_step(settled, dataset)
        steps = max(module.LEAST_STEPS if least_steps is None else least_steps, round(seconds / pace))
        say(
            f"A step in {settled.train.dtype} takes {pace * 1e3:.0f} ms here: training {steps} steps, about "
            f"{steps * pace / 60:.1f} minutes"
        )
        recipe = recipe.with_values({"train.max_steps": steps, "train.warmup_steps": steps // 10})
    else:
        recipe = started
    result = pretrain(recipe, out / DATA, out)
    if result.stopped_by is not None:
        say("Stopped; the same command continues the run.")
        sys.exit(128 + result.stopped_by)
    summary = result.summary
    first, final = summary["first_loss"], summary["final_loss"]
    say(f"\nloss {first:.2f} -> {final:.2f} nats after {summary['tokens'] / 1e6:.2f} M tokens\n")

    held = open_dataset(out / DATA, split="validation")
    task = find_task(recipe.task)(recipe, dataset, torch.device("cpu"), held)
    sentences = held_out_sentences(corpus, recipe.data.validation_share, module.SENTENCES)
    module.show(out / MODEL, task, sentences, say)
    found = {"kind": kind, "corpus": checksum, **module.measure(out / MODEL, task)}
    replace_json(out / FOUND, found, what="the demo's results")
    module.report(found, say)
    if kind == "bert":
        _beside_transformers(with_dtype(recipe, torch.device("cpu")), dataset, rounds, say)
    say(f"{out}/: metrics.jsonl, summary.json, {FOUND}, loss.png, and the model")
    say(f"in hf/, which transformers.{module.LOADED_BY} loads\n")
    summary = {**summary, **found}
    say(wrap(judge(summary)[1], width_of(sys.stdout)))
    return summary


def judge(summary: dict) -> tuple[bool, str]:
    """(whether the demo did what it is for, the sentence that says so). Too few steps are not judged."""
    module = _module(summary["kind"])
    good, found = module.judge(summary)
    if summary["steps"] < module.LEAST_STEPS:
        return True, f"Not judged, since {summary['steps']} steps are fewer than {module.LEAST_STEPS}: {found}"
    return good, f"The demo {'learned' if good else 'failed'}: {found}"


def _module(kind: str):
    if kind not in KINDS:
        raise ValueError(f"demo: expected one of {', '.join(KINDS)}, got {kind!r}")
    return importlib.import_module(f"fastlm.demo._{kind}")


def _name(kind: str) -> str:
    return "demo" if kind == "bert" else f"demo-{kind}"  # BERT's was the only one


def _beside_transformers(recipe, dataset, rounds: int, say) -> None:
    from fastlm.bench.compare import compare_steps, table
    from fastlm.bench.steps import from_dataset

    say("The same step in Transformers, side by side ...")
    times = compare_steps(recipe, from_dataset(recipe, dataset), rounds=rounds)
    say(table(times, title=f"{recipe.name}, one training step of {recipe.train.batch_tokens} tokens"))
    for missing in (t for t in times if t.missing):
        say(f"No comparison with {missing.contender}: {missing.missing}. `pip install fastlm\\[hf]` brings it.")
    say("")


def _stopped_demo(out: Path, name: str, say):
    """The recipe of the demo `name` that was stopped in `out`; None where a new one starts.

    What a finished one left is removed then.
    """
    from fastlm.run.directory import RECIPE, SUMMARY, WRITTEN, read_recipe
    from fastlm.run.recipe import Recipe

    content = read_recipe(out)
    if content is None:
        return None
    if content.get("name") != name:
        raise ValueError(f"--out: {out} holds a run that is not {name}; name another directory")
    if not (out / SUMMARY).exists():
        say(f"Continuing the demo that was stopped in {out}")
        return Recipe.from_dict(content, name=name)
    say(f"Starting anew: the finished demo in {out} is replaced, its corpus and tokenizer are used again")
    # The summary says that it is finished, the recipe that it is a demo: killed in between, the next starts anew too.
    for entry in (*sorted({*WRITTEN, FOUND} - {SUMMARY, RECIPE}), SUMMARY, RECIPE):
        path = out / entry
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return None


def _seconds_a_step(recipe, dataset) -> float:
    """Measured on a model that is thrown away: the second fastest of a few steps after the first two."""
    import torch

    from fastlm.tasks import find_task, make_model
    from fastlm.train.optimizer import make_optimizer, train_step

    task = find_task(recipe.task)(recipe, dataset, torch.device("cpu"))
    tokenizer = dataset.tokenizer
    model = make_model(recipe, tokenizer.vocab_size, tokenizer.pad_id, **task.token_ids(tokenizer)).train()
    optimizer = make_optimizer(model, recipe.train)
    dtype, times = getattr(torch, recipe.train.dtype), []
    for step in range(_CALIBRATION):
        began = time.perf_counter()
        micros = [task.micro(step, m) for m in range(recipe.micro_count)]
        train_step(model, optimizer, micros, lr=1e-4, grad_clip=recipe.train.grad_clip, dtype=dtype)
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[1]
