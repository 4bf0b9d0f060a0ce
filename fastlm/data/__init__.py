"""Text in, batches of packed rows out.

    dataset = prepare(["corpus/"], "train:8192", "prepared/", row_tokens=128)
    batches = Batches(dataset, batch_rows=64, seed=0)
    batch = batches.at(step)

sources -> cleaning -> tokenizer -> packing -> shards -> order -> batches, a file each.
DataCollatorForLanguageModeling is for Transformers' Trainer.
"""

import importlib

from fastlm.data.corpus import python_documentation
from fastlm.data.mixture import Mixture
from fastlm.data.preparation import prepare
from fastlm.data.shards import Dataset, open_dataset
from fastlm.data.sources import is_prepared
from fastlm.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Batches",
    "DataCollatorForLanguageModeling",
    "Dataset",
    "Mixture",
    "Tokenizer",
    "is_prepared",
    "open_dataset",
    "prepare",
    "python_documentation",
]


# These import torch. Preparing text does not need it, and a process that cleans text starts in a tenth of the time.
_WITH_TORCH = {
    "Batch": "batches",
    "Batches": "batches",
    "DataCollatorForLanguageModeling": "collator",
}


def __getattr__(name):
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(f"fastlm.data.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
