"""Text in, batches of packed rows out.

    dataset = prepare(["corpus/"], "train:8192", "prepared/", row_tokens=128)
    batches = Batches(dataset, batch_rows=64, seed=0)
    batch = batches.at(step)

sources -> cleaning -> tokenizer -> packing -> shards -> order -> batches, a file each.
DataCollatorForLanguageModeling is for Transformers' Trainer.
"""

from fastlm.data.batches import Batch, Batches
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


def __getattr__(name):
    if name == "DataCollatorForLanguageModeling":  # it brings fastlm.ops, which preparing text has no need of
        from fastlm.data.collator import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
