"""Texts as a BERT reads them: [CLS] a [SEP], or [CLS] a [SEP] b [SEP] with token types 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastlm.data import Tokenizer
from fastlm.data.labelled import Ragged

_AT_ONCE = 4096  # texts that are tokenized in one call


class Encoded(NamedTuple):
    """Rows of `ids` and `types` are a text or a pair each.

    types   None where none has a second text
    cut     how many rows were cut
    bare    in how many rows the tokenizer makes nothing of a text
    """

    ids: Ragged
    types: Ragged | None
    cut: int
    bare: int


def encode_texts(texts: Sequence[tuple[str, ...]], tokenizer: Tokenizer, longest: int) -> Encoded:
    """One or two texts a row, of at most `longest` tokens with the special ones; the longer of two is cut first."""
    pieces = [_tokens([row[i] for row in texts], tokenizer) for i in range(len(texts[0]) if texts else 1)]
    room, cut, bare, rows, types = longest - 1 - len(pieces), 0, 0, [], []
    check_room(longest, len(pieces))
    for parts in zip(*pieces):
        bare += not all(parts)
        if sum(map(len, parts)) > room:
            cut += 1
            parts = _shortened(parts, room)
        row = [tokenizer.cls_id]
        for part in parts:
            row += [*part, tokenizer.sep_id]
        rows.append(row)
        if len(parts) == 2:
            first = len(parts[0]) + 2
            types.append([0] * first + [1] * (len(row) - first))
    return Encoded(Ragged.of(rows), Ragged.of(types, np.int8) if types else None, cut, bare)


def check_room(longest: int, texts: int) -> None:
    """ValueError where there is no room for a token of each text beside the special ones."""
    if longest < 1 + 2 * texts:
        raise ValueError(f"data.max_length: expected at least {1 + 2 * texts}, got {longest}")


def _tokens(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    out = []
    for start in range(0, len(texts), _AT_ONCE):
        out += tokenizer.encode_batch(texts[start : start + _AT_ONCE])
    return out


def _shortened(parts: tuple[list[int], ...], room: int) -> tuple[list[int], ...]:
    """Cut at the end to `room` tokens together; a part keeps at least half of the room where it has as many."""
    if len(parts) == 1:
        return (parts[0][:room],)
    first, second = parts
    keep = max(room - len(second), (room + 1) // 2)
    first = first[:keep]
    return first, second[: room - len(first)]
