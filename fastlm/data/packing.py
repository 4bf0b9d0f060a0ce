"""Documents -> pieces -> rows of fixed length.

A piece is a cut of one document between its own special tokens:  [CLS] t0 t1 ... [SEP].
Pieces are laid into a row one after another, and cut where the row ends:

    row i      [CLS] the end of document 7 [SEP] [CLS] all of document 8 [SEP] [CLS] the start of docu [SEP]
    row i+1    [CLS] ment 9 and so on ...

A piece's *sample id* is (document ordinal)·2^24 + (its number in the document); a mask depends on it (see
`fastlm.ops.mlm_mask`). What remains of a row is padding where a useful piece no longer fits, or where the row holds
`max_pieces`; the padding is listed as a last piece, with the sample id PADDING_SAMPLE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fastlm.data.tokenizer import Tokenizer, chunks

PIECE_BITS = 24
PADDING_SAMPLE = 2**63 - 1  # no document has it: ordinals stay below 2^39
MIN_PIECE = 8  # a document is cut only where at least this many tokens fit, special ones included

_BATCH_CHARS = 1 << 20  # this much text is tokenised at once: about 150 bytes of memory a token in flight


@dataclass
class Shard:
    """Consecutive rows. The pieces of row i are pieces[offsets[i] : offsets[i + 1]].

    tokens   (rows, row_tokens) the smallest unsigned type that holds the vocabulary
    offsets  (rows + 1,) int64
    pieces   (pieces, 2) int64: sample id, and the column of the row where the piece starts
    """

    tokens: np.ndarray
    offsets: np.ndarray
    pieces: np.ndarray


def max_pieces(row_tokens: int) -> int:
    """How many pieces a row may hold, padding aside: one in MIN_PIECE tokens, since a shorter average is rare."""
    return row_tokens // MIN_PIECE


def encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer, look: Callable[[str, np.ndarray], None] = lambda chunk, ids: None
) -> Iterator[np.ndarray]:
    """Token ids (n,) uint32 of each text, in order, whatever its length; the memory is that of one document.

    look: called with each chunk of a text and its ids.
    """
    done = []
    for batch in _batches(texts):
        for ids, (chunk, last) in zip(tokenizer.encode_batch([chunk for chunk, _ in batch]), batch, strict=True):
            done.append(np.array(ids, dtype=np.uint32))
            look(chunk, done[-1])
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


def lay_rows(documents: Iterable[np.ndarray], row_tokens: int) -> Iterator[list[tuple[int, int, np.ndarray]]]:
    """The rows that hold the documents' token ids, each a list of pieces (sample id, column, ids without [CLS], [SEP]).

    ValueError for a document of more than 2^24 pieces.
    """
    bound = max_pieces(row_tokens)
    row, column = [], 0
    for ordinal, ids in enumerate(documents):
        piece = at = 0
        while at < len(ids):
            rest, room = len(ids) - at + 2, row_tokens - column
            if len(row) == bound or room < min(rest, MIN_PIECE):
                yield row
                row, column = [], 0
                continue
            if piece == 1 << PIECE_BITS:
                raise ValueError(
                    f"data: document {ordinal} has more than 2^{PIECE_BITS} pieces of row_tokens={row_tokens}; "
                    'split it, or set documents to "blank" or "line"'
                )
            length = min(rest, room)
            row.append(((ordinal << PIECE_BITS) + piece, column, ids[at : at + length - 2]))
            piece, at, column = piece + 1, at + length - 2, column + length
    if row:
        yield row


def pack(documents: Iterable[np.ndarray], tokenizer: Tokenizer, row_tokens: int, shard_rows: int) -> Iterator[Shard]:
    """Shards of `shard_rows` rows (the last may have fewer) from the token ids of each document."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    rows = lay_rows(documents, row_tokens)
    while batch := list(islice(rows, shard_rows)):
        tokens = np.full((len(batch), row_tokens), tokenizer.pad_id, dtype)
        offsets, pieces = [0], []
        for cells, row in zip(tokens, batch, strict=True):
            for sample, start, ids in row:
                end = start + len(ids) + 2
                cells[start], cells[start + 1 : end - 1], cells[end - 1] = tokenizer.cls_id, ids, tokenizer.sep_id
                pieces.append((sample, start))
            if end < row_tokens:
                pieces.append((PADDING_SAMPLE, end))
            offsets.append(len(pieces))
        yield Shard(tokens, np.array(offsets, dtype=np.int64), np.array(pieces, dtype=np.int64))
