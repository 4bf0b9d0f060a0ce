"""Training: a recipe, prepared data and a directory in, a model out.

    recipe = load_recipe("bert-mini").with_settings(["train.max_steps=500"])
    pretrain(recipe, "prepared/", "runs/first")

optimizer -> loop, a file each; beside them adamw, the optimizer on a CPU. fastlm.tasks says what a model learns;
fastlm.run has the recipe and the files of a run.
"""

import importlib

_HOMES = {
    "Diverged": "train.loop",
    "Recipe": "run.recipe",
    "Result": "train.loop",
    "load_recipe": "run.recipe",
    "make_model": "tasks",
    "pretrain": "train.loop",
}
__all__ = list(_HOMES)


def __getattr__(name):  # a recipe is read without importing what trains it, matplotlib and rich among it
    if name in _HOMES:
        return getattr(importlib.import_module(f"fastlm.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastlm.train' has no attribute {name!r}")
