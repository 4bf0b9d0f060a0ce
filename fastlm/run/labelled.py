"""Labelled examples for a run: read, encoded with the model's tokenizer, and split."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastlm.data import Tokenizer
from fastlm.data.labelled import Examples, saved_splits
from fastlm.data.labelled.columns import MissingColumn
from fastlm.data.sources import Report
from fastlm.run.directory import Data
from fastlm.run.recipe import Recipe
from fastlm.tasks import find_task


class Unusable(ValueError):
    """Rows of which none is an example, as those of a test whose labels are kept secret."""


def open_examples(recipe: Recipe, data, tokenizer_directory: Path, known: Sequence[str] = ()) -> tuple[Recipe, Data]:
    """(the recipe with what the data decides, the examples): steps, evaluations, the longest length and its limit.

    data    a path or several: what `read_records` reads; of a directory that datasets.DatasetDict wrote, its splits
            where its test has no labels, as GLUE's, that is left out with a warning
    known   names of the classes of the model
    ValueError where there are none, or they do not fit the task.
    """
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    splits = saved_splits(paths[0]) if len(paths) == 1 else {}
    table = recipe.data
    held = table.validation or splits.get("validation")
    test = table.test or splits.get("test")
    task = find_task(recipe.task)
    tokenizer, limit = task.tokenizer(tokenizer_directory), recipe.model.longest
    longest = table.max_length or (task.longest if limit is None else limit[1])
    recipe = replace(recipe, data=replace(table, max_length=longest if limit is None else min(longest, limit[1])))
    every = _read(recipe, [splits["train"]] if "train" in splits else paths, tokenizer, known=known)
    if held:
        train, validation = every, _read(recipe, [held], tokenizer, **task.as_trained(every))
    else:
        chosen, left = task.split(every, table.validation_share, table.split_seed)
        train, validation = every.select(chosen), every.select(left) if len(left) else None
    tested = None
    if test:
        try:
            tested = _read(recipe, [test], tokenizer, **task.as_trained(every))
        except (Unusable, MissingColumn) as error:
            if table.test:
                raise
            warnings.warn(f"the split {test} has no labels and is left out ({error})", stacklevel=2)
    train, parts = task.learnable(train), {"validation": validation, "test": tested}
    train.manifest["held_out"] = {name: part.manifest["checksum"] for name, part in parts.items() if part is not None}
    return _resolved(recipe, train, validation), Data(train, validation, tested)


def _read(recipe: Recipe, paths: list, tokenizer: Tokenizer, **options) -> Examples:
    report, task, named = Report(), find_task(recipe.task), ", ".join(map(str, paths))
    for path in paths:
        if str(path).startswith("-"):
            raise ValueError("data: expected files, got standard input, which a resumed run could not read again")
    records = task.read(paths, recipe, report)
    if not records.rows:
        raise ValueError(f"data: expected labelled rows, found none in {named} ({report.reasons()})")
    examples = task.encode(records.rows, recipe, tokenizer, report, names=records.names, **options)
    if not examples.rows:
        raise Unusable(f"data: expected labelled rows, found none that can be used in {named} ({report.reasons()})")
    return examples


def _resolved(recipe: Recipe, train: Examples, validation: Examples | None) -> Recipe:
    table, steps = recipe.train, train.rows / recipe.train.batch_size
    longest = max(train.row_tokens, 0 if validation is None else validation.row_tokens)
    return recipe.with_values(
        {
            "data.longest": longest,
            "train.max_steps": table.max_steps or math.ceil(table.epochs * steps),
            "train.eval_every": table.eval_every or math.ceil(steps),
        }
    )
