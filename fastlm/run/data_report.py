"""What `fastlm data` shows of prepared data: lines of text, and a PNG of lengths and fill."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastlm.data.batches import Batch, make_batch
from fastlm.data.contents import Contents, cleaning_lines, contents, counted, shown, trained_on
from fastlm.data.layouts import Corruption
from fastlm.data.order import rows_at
from fastlm.data.packing import PADDING_SAMPLE, PIECE_BITS
from fastlm.data.shards import Dataset
from fastlm.data.spans import choose
from fastlm.storage import atomic_file
from fastlm.tasks.masked_lm import mask

_SEED = 0  # of the order and of the masks that are shown
_SHARES = 0.1, 0.5, 0.9


def report(dataset: Dataset, rows: int = 2) -> Iterator[str]:
    """Counts, lengths, fill, what was set aside, and the first `rows` rows of seed 0 with epoch 0's default masks."""
    found, manifest = contents(dataset), dataset.manifest
    held, cleaned, vocabulary = manifest["validation"], manifest["report"], dataset.tokenizer.vocab_size
    yield (
        f"{dataset.directory}: {dataset.rows:,} {dataset.layout} rows of {dataset.row_tokens} tokens in "
        f"{counted(len(dataset.accepted), 'shard')}, {' and '.join(f'{share:.1%}' for share in dataset.fill)} full"
    )
    yield (
        f"{dataset.documents:,} documents, {dataset.text_bytes:,} bytes, {dataset.text_tokens:,} tokens of a "
        f"vocabulary of {vocabulary:,}; held out: {held['documents']:,} documents in {held['rows']:,} rows"
    )
    yield from trained_on(dataset)
    yield f"{found.pieces:,} pieces, {found.cut:,} of them after a cut; cells a piece: {_quantiles(found)}"
    yield f"documents read: {cleaned['read']:,}, kept: {cleaned['kept']:,}"
    yield from cleaning_lines(dataset)
    chosen = rows_at(np.arange(min(rows, dataset.rows)), dataset.rows, _SEED)[1]
    for row in chosen:
        yield f"row {row}:"
        yield from _row(dataset, int(row))


def _quantiles(found: Contents) -> str:
    """Of the pieces' lengths: `10% have at most 12, 50% at most 30, 90% at most 64`."""
    below = np.cumsum(found.lengths)
    at = [int(np.searchsorted(below, share * below[-1])) for share in _SHARES]
    return "10% have at most {}, 50% at most {}, 90% at most {}".format(*at)


def _row(dataset: Dataset, row: int) -> Iterator[str]:
    batch = make_batch(dataset, np.zeros(1, np.int64), np.array([row]))
    ids, masked = batch.input_ids.numpy(), _masked(dataset, batch)
    starts = batch.cu_seqlens[: batch.pieces + 1].tolist()
    for start, stop in itertools.pairwise(starts):
        sample = int(batch.sample_ids[start])
        if sample == PADDING_SAMPLE:
            yield f"  {stop - start} cells of padding"
        else:
            place = f"document {sample >> PIECE_BITS}, piece {sample & ((1 << PIECE_BITS) - 1)}"
            yield f"  {place}: {shown(ids[start:stop], dataset.tokenizer, masked[start:stop])}"


def _masked(dataset: Dataset, batch: Batch) -> np.ndarray:
    """(T,) bool: what the model is to predict without seeing it, by the default rates; none of causal rows."""
    masked = np.zeros(len(batch.input_ids), bool)
    if dataset.layout == "masked":
        found = mask(batch, dataset.tokenizer, _SEED)
        masked = (found.labels != -100).numpy()
    elif dataset.layout == "span":
        settings = dataset.manifest["settings"]
        corruption = Corruption(settings["noise_density"], settings["mean_span"])
        masked[batch.sample_ids.numpy() != PADDING_SAMPLE] = choose(batch, corruption, _SEED).lost
    return masked


def plot_contents(dataset: Dataset, path: Path) -> None:
    """Two histograms as a PNG: the pieces' lengths, and how full the rows are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = contents(dataset)
    figure = Figure(figsize=(8.0, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    cells = np.arange(dataset.width + 1)
    bins = np.linspace(0, dataset.width, min(dataset.width, 64) + 1)
    left.hist(cells, bins=bins, weights=found.lengths, color="#08519c")
    left.set(xlabel="cells of a piece", ylabel="pieces", title=f"{found.pieces:,} pieces")
    right.hist(cells / dataset.width, bins=50, range=(0, 1), weights=found.filled, color="#238b45")
    fill = " and ".join(f"{share:.1%}" for share in dataset.fill)
    right.set(
        xlabel="share of a row's cells in use", ylabel="rows", yscale="log", title=f"{dataset.rows:,} rows, {fill} full"
    )
    with atomic_file(path, what="the plot", need=1 << 20) as partial:
        figure.savefig(partial, format="png")
