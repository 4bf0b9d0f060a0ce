"""Training: a recipe, prepared data and a directory in, a model out.

    recipe = load_recipe("bert-mini").with_settings(["train.max_steps=500"])
    pretrain(recipe, "prepared/", "runs/first")

recipe -> objective -> optimizer -> loop, a file each; beside them adamw (on a CPU), run (the directory), checkpoint,
metrics, progress, flops.
"""

import importlib

_HOMES = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Diverged": "loop",
    "Result": "loop",
    "make_model": "loop",
    "pretrain": "loop",
}
__all__ = list(_HOMES)


def __getattr__(name):  # so that a recipe is read and checked without importing torch
    if name in _HOMES:
        return getattr(importlib.import_module(f"fastlm.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastlm.train' has no attribute {name!r}")
