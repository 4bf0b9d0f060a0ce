"""Documents -> pieces -> rows of fixed length.

A piece is a cut of one document, in the form of a `fastlm.data.layouts.Layout`. For masked rows it stands between its
own special tokens. Unless best fit is asked for (`fastlm.data.best_fit`), pieces are laid into a row one after
another, and cut where the row ends:

    row i      [CLS] the end of document 7 [SEP] [CLS] all of document 8 [SEP] [CLS] the start of docu [SEP]
    row i+1    [CLS] ment 9 and so on ...

A piece's *sample id* is (document ordinal)·2^24 + (its number in the document); a mask depends on it (see
`fastlm.ops.mlm_mask`). What remains of a row is padding where a useful piece no longer fits, or where the row holds
`Layout.max_pieces`; the padding is listed as a last piece, with the sample id PADDING_SAMPLE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from fastlm.data.layouts import NO_NEXT, Layout
from fastlm.data.tokenizer import Tokenizer, chunks

PIECE_BITS = 24
PADDING_SAMPLE = 2**63 - 1  # no document has it: ordinals stay below 2^39

_GROUP = 1024  # rows that are laid before they are copied into the shard: a piece takes 250 bytes until then
_BATCH_CHARS = 1 << 20  # this much text is tokenised at once: about 150 bytes of memory a token in flight


@dataclass
class Shard:
    """Consecutive rows. The pieces of row i are pieces[offsets[i] : offsets[i + 1]].

    tokens   (rows, Layout.width) the smallest unsigned type that holds the vocabulary
    offsets  (rows + 1,) int64
    pieces   (pieces, Layout.columns) int64: sample id, the column of the row where the piece starts, and for causal
             rows the token that follows the piece in its document
    used     of `Layout.capacity`, summed over the rows
    """

    tokens: np.ndarray
    offsets: np.ndarray
    pieces: np.ndarray
    used: tuple[int, ...] = ()


Look = Callable[[list[str], np.ndarray, np.ndarray], None]


def encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer, look: Look = lambda chunks, ids, lengths: None
) -> Iterator[np.ndarray]:
    """Token ids (n,) uint32 of each text, in order, whatever its length; the memory is that of one document.

    look: called with some chunks of the texts, their ids one after another (m,), and how many each has (chunks,).
    """
    done = []
    for batch in _batches(texts):
        found = [chunk for chunk, _ in batch]
        rows = tokenizer.encode_batch(found)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(chain.from_iterable(rows), np.uint32, int(lengths.sum()))  # one array: short texts are many
        look(found, ids, lengths)
        start = 0
        for stop, (_, last) in zip(np.cumsum(lengths).tolist(), batch, strict=True):
            of_chunk, start = ids[start:stop], stop
            if last and not done:
                yield of_chunk
                continue
            done.append(of_chunk)
            if last:
                yield np.concatenate(done)
                done = []


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    batch, chars = [], 0
    for text in texts:
        left = len(text)
        for chunk in chunks(text):
            left -= len(chunk)
            batch.append((chunk, not left))
            chars += len(chunk)
            if chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


class Piece(NamedTuple):
    """A cut of a document: its sample id, the document's tokens in it, and the one after them, or `end`."""

    sample: int
    ids: np.ndarray
    next: int


class Row(NamedTuple):
    """The pieces of a row, and what they take of `Layout.capacity`."""

    pieces: list[Piece]
    used: tuple[int, ...]


def sample_id(ordinal: int, piece: int, layout: Layout) -> int:
    """Of piece number `piece` of a document. ValueError past 2^24 pieces."""
    if piece >= 1 << PIECE_BITS:
        raise ValueError(
            f"data: document {ordinal} has more than 2^{PIECE_BITS} pieces of row_tokens={layout.row_tokens}; "
            'split it, or set documents to "blank" or "line"'
        )
    return (ordinal << PIECE_BITS) + piece


def lay_rows(documents: Iterable[np.ndarray], layout: Layout, end: int = NO_NEXT) -> Iterator[Row]:
    """The rows that hold the documents' tokens (n,).

    end: the token that follows the last one of a document.

    ValueError for a document of more than 2^24 pieces.
    """
    empty, most, least = (0,) * len(layout.capacity()), layout.max_pieces, layout.least()
    row, used, room = [], empty, layout.fits(empty)
    for ordinal, ids in enumerate(documents):
        piece, at, size = 0, 0, len(ids)
        while at < size:
            rest = size - at
            if len(row) == most or room < min(rest, least):
                yield Row(row, used)
                row, used, room = [], empty, layout.fits(empty)
                continue
            cut = min(rest, room)
            after = int(ids[at + cut]) if cut < rest else end
            row.append(Piece(sample_id(ordinal, piece, layout), ids[at : at + cut], after))
            piece, at, used = piece + 1, at + cut, layout.add(used, cut)
            room = layout.fits(used)
    if row:
        yield Row(row, used)


def pack(
    documents: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    layout: Layout,
    shard_rows: int,
    lay: Callable[..., Iterator[Row]] = lay_rows,
) -> Iterator[Shard]:
    """Shards of `shard_rows` rows (the last may have fewer) from the token ids of each document.

    lay   called as lay(documents, layout, end), as `lay_rows`
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    end = tokenizer.eos_id if layout.columns == 3 else NO_NEXT
    rows = lay((layout.document(ids, tokenizer) for ids in documents), layout, end)
    more = True
    while more:
        tokens, filled = np.empty((shard_rows, layout.width), dtype), 0
        counts, pieces, used = [], [], []
        while filled < shard_rows and (group := list(islice(rows, min(_GROUP, shard_rows - filled)))):
            laid = _fill(tokens[filled : filled + len(group)], group, tokenizer, layout)
            counts.append(laid[0])
            pieces.append(laid[1])
            used.append(np.sum([row.used for row in group], axis=0))
            filled += len(group)
        more = filled == shard_rows
        if filled:
            offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
            yield Shard(tokens[:filled], offsets, np.concatenate(pieces), tuple(np.sum(used, axis=0).tolist()))


def _fill(cells: np.ndarray, rows: list[Row], tokenizer: Tokenizer, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Write the rows into `cells` (len(rows), width); the number of pieces of each row, and `Shard.pieces` of them.

    All pieces are copied by a few calls of NumPy: one at a time took 4 times as long.
    """
    laid = [piece for row in rows for piece in row.pieces]
    before, after = layout.frame(tokenizer)
    counts = np.array([len(row.pieces) for row in rows])
    lengths = np.array([len(piece.ids) for piece in laid])
    whole = lengths + (len(before) + len(after))
    starts = np.cumsum(whole) - whole
    first = np.cumsum(counts) - counts
    taken = np.add.reduceat(whole, first)  # cells of each row
    columns = starts - np.repeat(starts[first], counts)
    at = columns + np.repeat(np.arange(len(rows)) * layout.width, counts)

    cells.fill(tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id)
    flat = cells.reshape(-1)
    flat[ragged(at + len(before), lengths)] = np.concatenate([piece.ids for piece in laid])
    for i, token in enumerate(before):
        flat[at + i] = token
    for i, token in enumerate(after):
        flat[at + len(before) + lengths + i] = token

    padded = taken < layout.width  # these rows have one more piece, at their end
    pieces = np.empty((len(laid) + int(padded.sum()), layout.columns), np.int64)
    ends = np.cumsum(counts + padded)
    place = np.arange(len(laid)) + np.repeat(np.cumsum(padded) - padded, counts)
    entries = [piece.sample for piece in laid], columns, [piece.next for piece in laid]
    for column, (entry, padding) in enumerate(zip(entries[: layout.columns], (PADDING_SAMPLE, taken[padded], NO_NEXT))):
        pieces[place, column] = entry
        pieces[ends[padded] - 1, column] = padding
    return counts + padded, pieces


def ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ...: (sum of counts,) int64."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
