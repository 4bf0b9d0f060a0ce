"""Rows by best fit: a document that fits into a row stays whole, and a longer one is cut at the end of a sentence.

1. A document longer than a row is cut after the last token in a row's final quarter that ends a sentence or a line
   (`sentence_ends`); where there is none, where the row ends.
2. Each piece goes, in the documents' order, into the open row that it leaves the least room in; the oldest of several.
   A piece that fits into none opens a row. Past OPEN_ROWS the fullest row is closed.

So a row is a function of the documents before it and of at most OPEN_ROWS rows in memory. No token is dropped: what a
row has left is padding. Best fit decreasing needs the whole corpus in memory; over a stream this is the nearest to it.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np

from fastlm.data.layouts import NO_NEXT, Layout
from fastlm.data.packing import Piece, Row, sample_id
from fastlm.data.tokenizer import Tokenizer

OPEN_ROWS = 256
_FINAL = 4  # a cut lies in the final quarter of a row, so that a cut alone leaves no more than that empty

# A token with a line break ("Ċ" in byte-level vocabularies), or that ends as a sentence does, quotes and brackets aside
_END = re.compile(r"[\nĊ]|[.!?。！？][\"'”’)\]]*\Z")


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) bool: the tokens after which a document is best cut."""
    ends = np.zeros(tokenizer.vocab_size, bool)
    for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        ends[id] = _END.search(token) is not None
    ends[list(tokenizer.special_ids)] = False
    return ends


def cuts(ids: np.ndarray, longest: int, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each piece of a document's tokens (n,), none with more than `longest` tokens."""
    start = 0
    while len(ids) - start > longest:
        first = start + longest - longest // _FINAL
        good = np.flatnonzero(ends[ids[first : start + longest]])
        stop = first + int(good[-1]) + 1 if len(good) else start + longest
        yield start, stop
        start = stop
    if start < len(ids):
        yield start, len(ids)


def best_fit_rows(
    documents: Iterable[np.ndarray], layout: Layout, end: int = NO_NEXT, *, ends: np.ndarray
) -> Iterator[Row]:
    """The rows that hold the documents' tokens (n,), as `fastlm.data.packing.lay_rows` gives them.

    end    the token that follows the last one of a document
    ends   (vocab_size,) bool, of `sentence_ends`

    ValueError for a document of more than 2^24 pieces.
    """
    empty = (0,) * len(layout.capacity())
    longest = layout.fits(empty)
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, number) of each open row, ascending
    rows: dict[int, Row] = {}
    opened = 0
    for ordinal, ids in enumerate(documents):
        for number, (start, stop) in enumerate(cuts(ids, longest, ends)):
            after = int(ids[stop]) if stop < len(ids) else end
            # A copy: a row may stay open for long, and a view would keep all that was read with it.
            piece = Piece(sample_id(ordinal, number, layout), ids[start:stop].copy(), after)
            at = bisect_left(rooms, (stop - start, 0))
            if at < len(rooms):
                index = rooms.pop(at)[1]
                pieces, used = rows[index]
            else:
                index, opened = opened, opened + 1
                pieces, used = [], empty
            pieces.append(piece)
            used = layout.add(used, stop - start)
            rows[index] = Row(pieces, used)
            room = layout.fits(used)
            if room < 1 or len(pieces) == layout.max_pieces:
                yield rows.pop(index)
                continue
            insort(rooms, (room, index))
            if len(rooms) > OPEN_ROWS:
                yield rows.pop(rooms.pop(0)[1])
    yield from rows.values()  # in the order in which they were opened
