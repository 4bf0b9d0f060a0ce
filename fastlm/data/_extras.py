"""Optional packages: each belongs to an extra of this package, which the error names."""

from __future__ import annotations

import importlib
from types import ModuleType

_EXTRAS = {
    "pyarrow": ("data", "Parquet and Arrow files"),
    "zstandard": ("data", "zstd files"),
    "ftfy": ("data", "encoding repair"),
    "xxhash": ("data", "near duplicates"),
    "rensa": ("data", "near duplicates"),
    "py3langid": ("language", "language filters"),
    "lingua": ("language", "language filters by lingua"),
    "phonenumbers": ("privacy", "scrubbing phone numbers"),
    "stdnum": ("privacy", "scrubbing card numbers and IBANs"),
    "ray": ("ray", "preparations with executor ray"),
    "sentencepiece": ("unigram", "training Unigram tokenizers"),
    "datasets": ("datasets", "Hugging Face datasets by name"),
    "rouge_score": ("metrics", "ROUGE figures"),
    "sacrebleu": ("metrics", "BLEU and chrF figures"),
}


def require(name: str, argument: str = "data") -> ModuleType:
    """The module `name`, as `pyarrow.parquet`. ValueError that names the extra where its package is missing.

    argument: what asked for it, for the message
    """
    package = name.partition(".")[0]
    extra, purpose = _EXTRAS[package]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ValueError(f"{argument}: {purpose} need the package {package}; pip install fastlm[{extra}]") from error
