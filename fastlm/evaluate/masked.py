"""Pseudo-perplexity of a masked model (Salazar et al. 2020, arXiv:1910.14659): each token is predicted from all others.

A document is cut into parts of nearly equal length, [CLS] t1 ... tn [SEP] each, at most as long as the window. For each
token a copy of its part has [MASK] in its place alone:

    pseudo-perplexity = exp(- mean over t of log p(t | all others of its part))

A part of n tokens costs n forwards of n + 2 tokens. So of a long text only a share is masked, each token still alone.
It is chosen by hash: where word r0 of Philox(position in the part, 0, sample id) < share · 2^32, as
`fastlm.ops.mlm_mask` selects. The same text gives the same choice for every model with its tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from fastlm.data import Tokenizer
from fastlm.data._checks import integer
from fastlm.data.layouts import MaskedRows
from fastlm.data.packing import sample_id
from fastlm.evaluate._sums import Sums, parts
from fastlm.models import Model
from fastlm.philox import MASK_DOMAIN, key, philox4x32, threshold
from fastlm.tasks import EVALUATION_SEED

SETTINGS = ("window", "share")
_PREDICTED = 4096  # tokens that are masked of a text whose share is not given


class Settings(NamedTuple):
    window: int
    share: float | None


class Copy(NamedTuple):
    """A part with its token at `place` masked, and that token."""

    ids: np.ndarray
    place: int
    target: int


def settings(model: Model, tokenizer: Tokenizer, window: int, share: float | None) -> Settings:
    window = integer("window", window, 3, model.config.max_position_embeddings)
    if share is not None and not (isinstance(share, (int, float)) and 0 < share <= 1):
        raise ValueError(f"share: expected a share of the tokens, above 0 and at most 1, got {share!r}")
    return Settings(window, share)


def run(sums: Sums, documents: Iterable[np.ndarray], tokenizer: Tokenizer, chosen: Settings) -> dict[str, object]:
    documents = list(documents)  # the share depends on their number of tokens
    tokens = sum(map(len, documents))
    share = min(1.0, _PREDICTED / max(1, tokens)) if chosen.share is None else chosen.share
    for batch in sums.batches(copies(documents, tokenizer, chosen.window, share), lambda copy: len(copy.ids)):
        inputs, lengths = sums.packed([copy.ids for copy in batch]), np.array([len(copy.ids) for copy in batch])
        starts = np.cumsum(lengths) - lengths
        index = sums.tensor(starts + np.array([copy.place for copy in batch]))
        inputs |= {"index": index, "targets": sums.tensor(np.array([copy.target for copy in batch]))}
        sums.add(lambda: sums.model(**inputs, reduction="none"), int(lengths.sum()))  # noqa: B023, called at once
    return {"objective": "masked", "tokens": tokens, "window": chosen.window, "share": share}


def copies(documents: Iterable[np.ndarray], tokenizer: Tokenizer, window: int, share: float) -> Iterator[Copy]:
    """The parts of the documents, once for each token that is masked in them."""
    layout = MaskedRows(window)
    for ordinal, document in enumerate(documents):
        for number, part in enumerate(parts(document, layout.fits((0,)))):
            before, after = layout.frame(tokenizer)
            ids, sample = np.array([*before, *part, *after], np.int64), sample_id(ordinal, number, layout)
            places = np.arange(1, len(ids) - 1)
            words = philox4x32(places, 0, sample & 0xFFFFFFFF, sample >> 32, *key(EVALUATION_SEED, MASK_DOMAIN))
            for place in places[words[0] < threshold(share)].tolist():
                masked = ids.copy()
                masked[place] = tokenizer.mask_id
                yield Copy(masked, place, int(ids[place]))


def describe(result: dict[str, object]) -> str:
    share = "each" if result["share"] == 1 else f"a share of {result['share']:.3g} of them, chosen by hash, each"
    return (
        f"{result['predicted']:,} tokens predicted: {share} masked alone, from all others of its part of the document, "
        f"at most {result['window']:,} tokens"
    )
