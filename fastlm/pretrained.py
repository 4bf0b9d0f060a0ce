"""A trained model with its tokenizer, from a directory in Transformers' layout."""

from __future__ import annotations

import warnings
from pathlib import Path

from fastlm.data import Tokenizer
from fastlm.models import GPT2, T5, Bert, Model
from fastlm.models._checkpoint import read_config

FAMILIES: dict[str, type[Model]] = {cls.config_class.model_type: cls for cls in (Bert, GPT2, T5)}
_PURPOSE = {"bert": "masked", "gpt2": "causal", "t5": "span"}


def load_pretrained(directory, classes: tuple[type[Model], ...] = tuple(FAMILIES.values())) -> tuple[Model, Tokenizer]:
    """(model, on the CPU and in evaluation; its tokenizer), by the `model_type` of config.json.

    ValueError for a directory without a model of `classes` or without its head, without a tokenizer, and for a
    tokenizer that lacks special tokens or is of another model.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"model: expected a directory, as OUT/hf after `fastlm pretrain`, got {str(directory)!r}")
    known = {cls.config_class.model_type: cls for cls in classes}
    cls = known[read_config(directory, *known)["model_type"]]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the head starts anew")
        try:
            model = cls.from_pretrained(directory).eval()
        except UserWarning as error:
            raise ValueError(
                f"model: expected {cls.architecture} with its trained head in {directory}; {error}"
            ) from error
    tokenizer = Tokenizer.load(directory)
    tokenizer.check(_PURPOSE[cls.config_class.model_type])
    tokenizer.check_size(model.config.vocab_size, directory)
    return model, tokenizer
