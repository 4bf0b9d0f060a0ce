"""Layouts: what the pieces of documents look like in a row, for each kind of objective.

masked   a piece is [CLS] t0 t1 ... [SEP]
causal   a document is <bos> t0 t1 ... <eos>, and every token but <bos> is predicted from those before it. A piece is
         a cut of it without the last token, and `next` is the token that follows: each token is predicted exactly
         once, also the one after the end of a row
span     a piece is t0 t1 ..., which span corruption (`fastlm.data.spans`) divides between the encoder and the decoder.
         A row fills up when either side does

A layout knows how many tokens of a document fit into what is left of a row, and how they are written there.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastlm.data.tokenizer import Tokenizer
from fastlm.data.vocabulary import SENTINELS

MIN_PIECE = 8  # a document is cut only where at least this many tokens fit, special ones included
NO_NEXT = -100  # the `next` of a piece that predicts nothing after its end: padding


class Layout:
    """How documents are laid into rows.

    name       "masked", "causal" or "span": what the tokenizer must have special tokens for
    columns    numbers kept of a piece: sample id, column, and with causal rows `next`
    """

    name: str
    columns = 2

    def __init__(self, row_tokens: int):
        self.row_tokens = row_tokens

    @property
    def width(self) -> int:
        """Cells of a row."""
        return self.row_tokens

    @property
    def max_pieces(self) -> int:
        """How many pieces a row may hold, padding aside: one in MIN_PIECE tokens, since a shorter average is rare."""
        return self.width // MIN_PIECE

    def settings(self) -> dict[str, object]:
        """What of it the manifest of prepared data stores; data of other settings does not fit."""
        return {"layout": self.name, "row_tokens": self.row_tokens}

    def check(self, tokenizer: Tokenizer) -> None:
        """ValueError for a tokenizer without the special tokens that these rows need."""
        tokenizer.check(self.name)

    def capacity(self) -> tuple[int, ...]:
        """Tokens that a row holds: of the encoder, and with span rows of the decoder."""
        return (self.row_tokens,)

    def fits(self, used: tuple[int, ...]) -> int:
        """How many tokens of a document still fit into a row of which `used` is taken."""
        raise NotImplementedError

    def add(self, used: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """What is taken of the row after a piece with so many of the document's tokens."""
        raise NotImplementedError

    def document(self, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
        """The tokens that are cut into pieces, of a document's token ids."""
        return ids

    def frame(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens that stand in the cells before and after those of a piece."""
        return (), ()

    def least(self) -> int:
        """Tokens of a document that a piece holds at least, where the document is cut."""
        return MIN_PIECE


class MaskedRows(Layout):
    name = "masked"

    def fits(self, used):
        return self.row_tokens - used[0] - 2

    def add(self, used, tokens):
        return (used[0] + tokens + 2,)

    def frame(self, tokenizer):
        return (tokenizer.cls_id,), (tokenizer.sep_id,)

    def least(self):
        return MIN_PIECE - 2


class CausalRows(Layout):
    name = "causal"
    columns = 3

    def fits(self, used):
        return self.row_tokens - used[0]

    def add(self, used, tokens):
        return (used[0] + tokens,)

    def document(self, ids, tokenizer):
        begun = np.empty(len(ids) + 1, ids.dtype)
        begun[0] = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        begun[1:] = ids
        return begun


@dataclass(frozen=True)
class Corruption:
    """Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4.

    noise_density      share of a piece's tokens that the decoder predicts
    mean_span          their mean number in a span
    """

    noise_density: float = 0.15
    mean_span: float = 3.0

    def counts(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens that are taken out, spans that they form) of pieces of so many tokens each; 0, 0 of fewer than two.

        At least one token is taken out and one stays. Both numbers, and what is left, rise with the number of tokens.
        """
        tokens = np.asarray(tokens)
        noise = np.clip(np.floor(tokens * self.noise_density + 0.5).astype(np.int64), 1, np.maximum(tokens - 1, 1))
        spans = np.clip(np.floor(noise / self.mean_span + 0.5).astype(np.int64), 1, np.minimum(noise, tokens - noise))
        whole = tokens < 2
        return np.where(whole, 0, noise), np.where(whole, 0, spans)

    def lengths(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the encoder and of the decoder for pieces of so many tokens: sentinels and </s> included."""
        noise, spans = self.counts(tokens)
        return tokens - noise + spans + 1, noise + spans + 1


class SpanRows(Layout):
    """Rows of at most `row_tokens` encoder and `target_tokens` decoder tokens after corruption.

    target_tokens   0: those of the longest piece that fits, 114 for 512
    sentinels       the most spans that a piece may lose

    ValueError where no useful piece fits: a document would never end.
    """

    name = "span"

    def __init__(
        self,
        row_tokens: int,
        target_tokens: int = 0,
        corruption: Corruption = Corruption(),
        sentinels: int = SENTINELS,
    ):
        super().__init__(row_tokens)
        self.corruption = corruption
        self._tables = _span_tables(row_tokens, corruption, sentinels)
        self.target_tokens = target_tokens or int(self._tables[1][-1])
        longest = self.fits((0, 0))
        if longest < self.least():
            raise ValueError(
                f"row_tokens: expected rows that hold pieces of {self.least()} tokens, got {row_tokens} tokens for the "
                f"encoder and {self.target_tokens} for the decoder, which hold {max(longest, 0)}; set longer "
                "data.row_tokens or data.target_tokens"
            )

    @property
    def width(self):
        # A piece of n tokens leaves more than n · (1 - density · (1 - 1 / mean_span)) to the encoder, since rounding
        # takes less from it than its </s> adds.
        corruption = self.corruption
        return int(self.row_tokens / (1 - corruption.noise_density * (1 - 1 / corruption.mean_span)))

    def settings(self):
        return {
            **super().settings(),
            "target_tokens": self.target_tokens,
            "noise_density": self.corruption.noise_density,
            "mean_span": self.corruption.mean_span,
        }

    def check(self, tokenizer):
        super().check(tokenizer)
        needed = int(self.corruption.counts(len(self._tables[0]) - 1)[1])
        if len(tokenizer.sentinel_ids) < needed:
            raise ValueError(
                f"tokenizer: expected at least {needed} sentinels (<extra_id_0> ...) for rows of {self.row_tokens} "
                f"tokens, found {len(tokenizer.sentinel_ids)}; set shorter data.row_tokens, or take another tokenizer"
            )

    def capacity(self):
        return self.row_tokens, self.target_tokens

    def fits(self, used):
        rooms = self.row_tokens - used[0], self.target_tokens - used[1]
        return min(bisect_right(table, room) - 1 for table, room in zip(self._tables, rooms))

    def add(self, used, tokens):
        return tuple(taken + table[tokens] for taken, table in zip(used, self._tables))


@lru_cache
def _span_tables(row_tokens: int, corruption: Corruption, sentinels: int) -> tuple[list[int], list[int]]:
    """Lengths of both sides for pieces of 0, 1, ... tokens, up to the longest that fits; rising."""
    tokens = np.arange(4 * row_tokens + 8)
    encoder, decoder = corruption.lengths(tokens)
    fits = (encoder <= row_tokens) & (corruption.counts(tokens)[1] <= sentinels)
    longest = int(np.flatnonzero(fits)[-1])
    return encoder[: longest + 1].tolist(), decoder[: longest + 1].tolist()
