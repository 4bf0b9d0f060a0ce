"""Perplexity of a causal model: each token of a document, and its end, is predicted exactly once.

A document is <bos> t1 ... tn <eos>. Windows of W tokens of it begin S tokens apart, the stride. The first window
predicts all of its next tokens; a later one only those that the windows before it did not. So a token is predicted from
all tokens before it in its document, or from at least W - S + 1. A small stride gives more context and costs more: the
forwards run on about W / S times the tokens. With S = W every token is computed once.

    perplexity = exp(mean loss),   bits a byte = sum of losses / (ln 2 · bytes of the text)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from fastlm import ops
from fastlm.data import Tokenizer
from fastlm.data._checks import integer
from fastlm.data.layouts import CausalRows
from fastlm.evaluate._sums import Sums
from fastlm.models import Model

SETTINGS = ("window", "stride", "ends")


class Settings(NamedTuple):
    window: int
    stride: int
    ends: bool


class Window(NamedTuple):
    """ids (n,), n ≤ W; targets (k,): what the last k of them predict."""

    ids: np.ndarray
    targets: np.ndarray


def settings(model: Model, tokenizer: Tokenizer, window: int, stride: int | None, ends: bool | None) -> Settings:
    window = integer("window", window, 1, model.config.n_positions)
    stride = max(1, window // 2) if stride is None else integer("stride", stride, 1, window)
    return Settings(window, stride, ends is not False)


def windows(ids: np.ndarray, window: int, stride: int) -> Iterator[Window]:
    """The windows of a document `ids` (n + 1,) from <bos> on, which predict its other n tokens, once each."""
    inputs, start, done = len(ids) - 1, 0, 0
    while done < inputs:
        end = min(start + window, inputs)
        yield Window(ids[start:end], ids[done + 1 : end + 1])
        start, done = start + stride, end


def run(sums: Sums, documents: Iterable[np.ndarray], tokenizer: Tokenizer, chosen: Settings) -> dict[str, object]:
    layout, end, tokens = CausalRows(chosen.window), np.array([tokenizer.eos_id] if chosen.ends else [], np.int64), 0

    def all_windows() -> Iterator[Window]:
        nonlocal tokens
        for ids in documents:
            tokens += len(ids)
            whole = np.concatenate([layout.document(ids, tokenizer), end]).astype(np.int64)
            yield from windows(whole, chosen.window, chosen.stride)

    for batch in sums.batches(all_windows(), lambda window: len(window.ids)):
        inputs = sums.packed([window.ids for window in batch])
        ends = np.cumsum([len(window.ids) for window in batch])
        index = np.concatenate([np.arange(end - len(one.targets), end) for one, end in zip(batch, ends)])
        targets, index = sums.tensor(np.concatenate([one.targets for one in batch])), sums.tensor(index)
        sums.add(lambda: _losses(sums.model, inputs, index, targets), int(ends[-1]))  # noqa: B023, called at once
    return {"objective": "causal", "tokens": tokens, **chosen._asdict()}


def _losses(model, inputs, index, targets):
    hidden = model.decode(**inputs).index_select(0, index)  # the head runs on what is predicted alone
    return ops.linear_cross_entropy(hidden, model.word, targets, reduction="none")


def describe(result: dict[str, object]) -> str:
    window, stride = result["window"], result["stride"]
    ends = "ends of documents among them" if result["ends"] else "ends of documents aside"
    return (
        f"{result['predicted']:,} tokens predicted, {ends}; windows of {window:,} tokens, stride {stride:,}: from all "
        f"tokens before it in the document, or at least {window - stride + 1:,}"
    )
