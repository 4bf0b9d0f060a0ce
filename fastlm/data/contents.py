"""What lies in prepared data: lengths of pieces and fill of rows, a shard at a time, and rows as text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastlm.data.packing import PADDING_SAMPLE, Shard
from fastlm.data.shards import Dataset
from fastlm.data.tokenizer import TRAINED_ON, Tokenizer

_SHOWN = 60  # characters of a sample


@dataclass
class Contents:
    """Counts over all rows of a dataset; the memory is that of one shard.

    pieces    padding aside
    lengths   (width + 1,) int64: how many pieces have 0, 1, ... cells, special tokens included
    filled    (width + 1,) int64: how many rows have 0, 1, ... cells that are no padding
    cut       pieces that are no document's first: how often documents were cut
    """

    lengths: np.ndarray
    filled: np.ndarray
    pieces: int = 0
    cut: int = 0


def trained_on(dataset: Dataset) -> Iterator[str]:
    """The size of the sample that the tokenizer was trained on, where it was trained here."""
    if sample := dataset.manifest["tokenizer"].get(TRAINED_ON):
        yield f"tokenizer trained on {sample['bytes']:,} of {sample['of']:,} bytes of its text"


def contents(dataset: Dataset) -> Contents:
    """Count what lies in `dataset`."""
    found = Contents(np.zeros(dataset.width + 1, np.int64), np.zeros(dataset.width + 1, np.int64))
    for shard in dataset.shards():
        samples, lengths, rows = _pieces(shard, dataset.width)
        real = samples != PADDING_SAMPLE
        found.pieces += int(real.sum())
        found.cut += int((samples[real] & 0xFFFFFF > 0).sum())
        found.lengths += np.bincount(lengths[real], minlength=dataset.width + 1)
        filled = np.bincount(rows[real], weights=lengths[real], minlength=len(shard.tokens)).astype(np.int64)
        found.filled += np.bincount(filled, minlength=dataset.width + 1)
    return found


def counted(number: int, what: str) -> str:
    """1 document, 2,345 documents."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def cleaning_lines(dataset: Dataset) -> Iterator[str]:
    """What was set aside, and with rules of cleaning what each took, with a sample; a line each."""
    rules = dataset.manifest.get("cleaning", {"rules": {}})["rules"]
    for reason, entry in dataset.manifest["report"]["set_aside"].items():
        if reason not in rules:
            yield f"  set aside: {entry['count']:,} {reason} (first: {entry['first'][0]})"
    for rule, taken in rules.items():
        changed = taken["documents"] - taken["dropped"]
        counts = [(taken["dropped"], "document", "dropped"), (changed, "document", "changed")]
        counts = [f"{counted(*count)} {what}" for *count, what in counts if count[0]]
        sample = taken["sample"]
        became = f" became {_quoted(sample['became'])}" if "became" in sample else ""
        yield (
            f"  {rule}: {', '.join([*counts, counted(taken['characters'], 'character')])} "
            f"(first: {sample['place']}: {_quoted(sample['text'])}{became})"
        )


def _quoted(text: str) -> str:
    return json.dumps(text[:_SHOWN], ensure_ascii=False)


def _pieces(shard: Shard, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sample id, length in cells, row in the shard) of each piece, int64."""
    pieces = np.asarray(shard.pieces)
    rows = np.repeat(np.arange(len(shard.tokens)), np.diff(shard.offsets))
    lengths = np.diff(rows * width + pieces[:, 1], append=len(shard.tokens) * width)
    return pieces[:, 0], lengths, rows


def shown(ids: np.ndarray, tokenizer: Tokenizer, masked: np.ndarray | None = None) -> str:
    """A piece as text; a run of tokens that are `masked` (n,) bool, stands between ⟦ and ⟧."""
    if masked is None or not masked.any():
        return _text(ids, tokenizer)
    bounds = [0, *(np.flatnonzero(np.diff(masked)) + 1).tolist(), len(ids)]
    runs = [(ids[a:b], bool(masked[a])) for a, b in itertools.pairwise(bounds)]
    return " ".join(f"⟦{_text(run, tokenizer)}⟧" if hidden else _text(run, tokenizer) for run, hidden in runs).strip()


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer.decode(ids, skip_special_tokens=False).split())
