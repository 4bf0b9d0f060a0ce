"""The loss of T5's span corruption (`fastlm.data.spans`): 15% of the tokens, in spans of 3 on average.

A document is cut into parts of nearly equal length, whose encoder side has at most `window` tokens. What is taken out
has a seed of its own, and is the same for every model with the same tokenizer. Sentinels and </s> are predicted too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from fastlm.data import Batch, Tokenizer
from fastlm.data._checks import integer
from fastlm.data.layouts import SpanRows
from fastlm.data.packing import sample_id
from fastlm.data.shards import ragged
from fastlm.data.spans import corrupt
from fastlm.evaluate._sums import Sums, parts
from fastlm.models import Model
from fastlm.tasks import EVALUATION_SEED

SETTINGS = ("window",)


class Settings(NamedTuple):
    window: int


class Part(NamedTuple):
    ids: np.ndarray
    sample: int


def settings(model: Model, tokenizer: Tokenizer, window: int) -> Settings:
    window = integer("window", window, 8)
    SpanRows(window).check(tokenizer)
    return Settings(window)


def run(sums: Sums, documents: Iterable[np.ndarray], tokenizer: Tokenizer, chosen: Settings) -> dict[str, object]:
    layout, tokens = SpanRows(chosen.window), 0

    def all_parts() -> Iterator[Part]:
        nonlocal tokens
        for ordinal, document in enumerate(documents):
            tokens += len(document)
            for number, ids in enumerate(parts(document, layout.fits((0, 0)))):
                if len(ids):  # a text of nothing that the tokenizer knows has none
                    yield Part(ids, sample_id(ordinal, number, layout))

    for batch in sums.batches(all_parts(), lambda part: len(part.ids)):
        pair = corrupt(as_batch(batch), layout.corruption, tokenizer, EVALUATION_SEED)
        inputs = {
            "input_ids": pair.input_ids,
            "cu_seqlens": pair.cu_seqlens,
            "decoder_cu_seqlens": pair.decoder_cu_seqlens,
            "labels": pair.labels,
        }
        inputs = {name: tensor.to(sums.device) for name, tensor in inputs.items()}
        inputs |= {"max_seqlen": int(pair.lengths.max()), "decoder_max_seqlen": int(pair.target_lengths.max())}
        computed = int(pair.lengths.sum() + pair.target_lengths.sum())
        sums.add(lambda: sums.model(**inputs, reduction="none"), computed)  # noqa: B023, called at once
    return {"objective": "span", "tokens": tokens, "window": chosen.window}


def as_batch(batch: list[Part]) -> Batch:
    """The parts back to back, as `corrupt` takes them."""
    lengths = np.array([len(part.ids) for part in batch])
    ids = np.concatenate([part.ids for part in batch]).astype(np.int64)
    samples = np.repeat(np.array([part.sample for part in batch]), lengths)
    return Batch(
        input_ids=torch.from_numpy(ids),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        positions=torch.from_numpy(ragged(np.zeros_like(lengths), lengths)),
        sample_ids=torch.from_numpy(samples),
        epochs=torch.zeros(len(ids), dtype=torch.int64),
        max_seqlen=int(lengths.max()),
        tokens=len(ids),
        pieces=len(batch),
    )


def describe(result: dict[str, object]) -> str:
    return (
        f"{result['predicted']:,} tokens of the decoder predicted; 15% of the text taken out in spans of 3, of parts "
        f"whose encoder side has at most {result['window']:,} tokens"
    )
