"""Tasks: what a model is trained to do. A module of this package is a task, and its name is the recipe's `task`.

    task = find_task("masked_lm")(recipe, dataset, device)
    model = task.model(recipe, vocab_size, pad_id)
    loss = model(**task.micro(step, m).inputs)

A new module is found by its name; no list names it. See `Task` for what it has to hold.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastlm.models import Model
from fastlm.tasks._tables import DataTable, TrainTable
from fastlm.tasks._task import EVALUATION_SEED, Micro, Task, bits_per_byte, perplexity

__all__ = [
    "EVALUATION_SEED",
    "DataTable",
    "Micro",
    "Task",
    "TrainTable",
    "bits_per_byte",
    "find_task",
    "make_model",
    "perplexity",
    "task_names",
]


def task_names() -> list[str]:
    """Names of all tasks: the modules of this package that do not begin with an underscore."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find_task(name: str) -> type[Task]:
    """The one subclass of Task that the module `name` defines. ValueError where there is no such module."""
    if name not in task_names():
        raise ValueError(f"task: expected one of {', '.join(task_names())}, got {name!r}")
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Task)]
    (found,) = (cls for cls in classes if cls.__module__ == module.__name__)
    return found


def make_model(recipe, vocab_size: int, pad_id: int | None, **token_ids: int | None) -> Model:
    """The model of the recipe's task, on the CPU. Its weights are drawn from the recipe's seed.

    token_ids: as of `Task.token_ids`
    """
    return find_task(recipe.task).model(recipe, vocab_size, pad_id, **token_ids)
