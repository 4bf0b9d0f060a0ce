"""`finetune`: from a model and labelled examples to a model that others can load, with its figures.

The run is one of fastlm.train.loop: it resumes, skips steps without finite gradients, runs under torchrun, and writes
metrics.jsonl. fastlm/run/directory.py lists the files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastlm.chip import parse_device
from fastlm.data.sources import TOKENIZER
from fastlm.run import directory as runs
from fastlm.run.checkpoint import Checkpoint
from fastlm.run.initial import find_initial
from fastlm.run.labelled import open_examples
from fastlm.run.recipe import Recipe
from fastlm.run.reports import write_seeds
from fastlm.run.tracking import check_logs
from fastlm.storage import atomic_directory
from fastlm.tasks import find_task
from fastlm.train.loop import Result, run


def finetune(recipe: Recipe, model, data, out, *, device: str = "cpu", resume: str = "auto", log=()) -> Result:
    """Train `model` on labelled `data` by the recipe's task, and write everything into the directory `out`.

    recipe   of a task on labelled examples, as Recipe("classify"); the architecture and the tokenizer are the model's
    model    what to start from: a run's directory, a checkpoint's, or a model in Transformers' layout
    data     labelled files, a path or several (`fastlm.data.labelled.read_records`)
    device, resume, log, the signals and the errors: as of `pretrain`

    The weights in OUT/hf are those of the best evaluation, by train.metric; without held-out examples the last ones.
    """
    initial = find_initial(model)
    recipe = initial.recipe(recipe)
    recipe, found = open_examples(recipe, data, initial.tokenizer, initial.labels())
    find_task(recipe.task)(recipe, found.train, parse_device(device), found.validation).figure()  # or it is unknown

    def checked(start: Checkpoint | None) -> runs.Data:
        if start is not None:
            runs.check_same_data(found.train.manifest, start.state["data"], data)
        tokenizer = out / runs.DATA / TOKENIZER
        if not tokenizer.exists():  # a checkpoint is a model to start from, with this tokenizer
            tokenizer.parent.mkdir(exist_ok=True)
            with atomic_directory(tokenizer, what="the tokenizer") as partial:
                found.train.tokenizer.save(partial)
        return found

    log, out = check_logs(log), Path(out)
    return run(recipe, checked, out, device=parse_device(device), resume=resume, initial=initial, log=log)


def finetune_seeds(recipe: Recipe, model, data, out, seeds: Sequence[int], **options) -> list[Result]:
    """`finetune` once for each seed, into OUT/seed-S, and the figures' mean and spread into OUT/metrics.json.

    The split is the same for all. A call that was stopped by a signal ends the series; the same call continues it.
    """
    out, results = Path(out), []
    runs.check_series(out, options.get("resume", "auto"))
    for seed in seeds:
        results.append(finetune(recipe.with_values({"train.seed": seed}), model, data, out / f"seed-{seed}", **options))
        if results[-1].stopped_by is not None:
            return results
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process writes, as in a run
        write_seeds(out, [out / f"seed-{seed}" for seed in seeds])
    return results
