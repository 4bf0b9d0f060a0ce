"""Several prepared datasets as one: joined one after another, or mixed by weight without end.

Weights are integers w_1, w_2, ... without a common divisor, and W is their sum. Global row g is a row of the source

    turn[g mod W],   and so the k-th of this source,   k = (g div W)·w + how many of turn[: g mod W] are the source's,

that is row perm(k mod n) of the source's epoch k div n (`fastlm.data.order`). Nothing depends on the rows before but
through these counts, which are read from a table: a resume is a seek.

`turn` is a schedule of W rows. The k-th row of a source may have any place from floor(k·W/w) to ceil((k+1)·W/w) - 1;
just then, the source's rows among the first n differ from n·w/W by less than one, for every n. Among the sources whose
row may come, the one whose last place is nearest is taken. No row misses its last place: a source has at most
floor(b·w/W) - ceil(a·w/W) rows that must lie within the places from a to b - 1, and all sources together at most b - a.
Source: Baruah, Cohen, Plaxton, Varvel, "Proportionate progress", 1996 (the windows).
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np

from fastlm.data.order import rows_at
from fastlm.data.packing import PADDING_SAMPLE, PIECE_BITS
from fastlm.data.shards import Dataset, ragged

LARGEST_SUM = 1_000_000  # of the weights: six decimals; a schedule of so many rows takes 1.5 s and 9 MB
_HUGE = re.compile(r"e[+-]?\d{3}", re.IGNORECASE)  # a Fraction has all digits of 1e-999999999
_COUNTED_ROWS = 1 << 14  # two million tokens at 128 a row
_COUNTED_SHARDS = 16  # of a source: 0.6 GB to check first, at two bytes a token


def parse_weights(text: str, sources: Sequence[object] | None = None) -> tuple[int, ...]:
    """Integers without a common divisor of "0.7, 0.3" or "2/3,1/3", in these proportions exactly.

    sources: of which there must be as many

    ValueError for another number of weights, what is no positive number, or a sum of more than LARGEST_SUM.
    """
    if _HUGE.search(text):
        raise ValueError(f"weights: expected numbers with an exponent of two digits at most, got {text!r}")
    try:
        given = [Fraction(weight.strip()) for weight in text.split(",")]
    except (ValueError, ZeroDivisionError):
        given = []
    if not given or min(given) <= 0:
        raise ValueError(f"weights: expected positive numbers by commas, as 0.7,0.3, got {text!r}")
    if sources is not None and len(given) != len(sources):
        raise ValueError(
            f"weights: expected {len(sources)}, one for each of {' '.join(map(str, sources))}, got {text!r}"
        )
    whole = math.lcm(*(weight.denominator for weight in given))
    weights = [int(weight * whole) for weight in given]
    divisor = math.gcd(*weights)
    weights = tuple(weight // divisor for weight in weights)
    if sum(weights) > LARGEST_SUM:
        raise ValueError(
            f"weights: expected multiples of a {LARGEST_SUM:,}th of their sum, got {text!r}, which are finer; round "
            "them"
        )
    return weights


def schedule(weights: Sequence[int]) -> np.ndarray:
    """`turn`: (sum of the weights,) the smallest unsigned type; how often a source occurs is its weight."""
    total = sum(weights)
    turn = np.empty(total, np.min_scalar_type(len(weights) - 1))
    waiting = [(0, source, 0) for source in range(len(weights))]  # (first place, source, k)
    ready = []  # (place after the last, source, k)
    for place in range(total):
        while waiting and waiting[0][0] <= place:
            _, source, k = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(k + 1) * total // weights[source]), source, k))
        _, source, k = heapq.heappop(ready)
        turn[place] = source
        heapq.heappush(waiting, ((k + 1) * total // weights[source], source, k + 1))
    return turn


class Joined:
    """The rows of several datasets, one dataset after another, as if they were one `Dataset`.

    sources   of one tokenizer, one layout and one width. Sample ids of each are moved behind those of the ones before:
              no two samples share one
    """

    def __init__(self, sources: Iterable[Dataset]):
        self.sources = tuple(sources)
        self.row_tokens, self.width, self.layout, self.tokenizer = self._shared()
        self.max_pieces = max(source.max_pieces for source in self.sources)
        self._first = np.cumsum([0] + [source.rows for source in self.sources])
        self.rows = int(self._first[-1])
        documents = [source.documents for source in self.sources]
        self.documents = sum(documents)
        if self.documents >= 1 << (63 - PIECE_BITS):
            raise ValueError(f"data: expected fewer than 2^{63 - PIECE_BITS} documents in all, got {self.documents:,}")
        self._samples = np.cumsum([0] + documents[:-1]) << PIECE_BITS
        self.text_bytes = sum(source.text_bytes for source in self.sources)
        self.text_tokens = sum(source.text_tokens for source in self.sources)

    def _shared(self) -> tuple:
        first, *others = self.sources
        for other in others:
            if other.tokenizer.hash != first.tokenizer.hash:
                raise ValueError(
                    f"data: expected sources with one tokenizer, but that of {other.directory} is not that of "
                    f"{first.directory}; prepare it again with --tokenizer {first.directory / 'tokenizer'}"
                )
            for name in ("layout", "row_tokens", "width"):
                wanted, found = getattr(first, name), getattr(other, name)
                if found != wanted:
                    raise ValueError(
                        f"data: expected sources with one {name}, but {other.directory} has {found}, {first.directory} "
                        f"{wanted}; prepare one of them again"
                    )
        return first.row_tokens, first.width, first.layout, first.tokenizer

    def split(self, rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(number of a source, where its rows are in `rows`, their numbers in the source) of each that has some."""
        home = np.searchsorted(self._first, rows, side="right") - 1
        places = [(source, np.flatnonzero(home == source)) for source in np.unique(home).tolist()]
        return [(source, at, rows[at] - self._first[source]) for source, at in places]

    def nearby(self, rows: np.ndarray, shards: int) -> np.ndarray:
        """As `Dataset.nearby`, of as many shards of each source."""
        found = np.empty_like(rows)
        for source, at, local in self.split(rows):
            found[at] = self._first[source] + self.sources[source].nearby(local, shards)
        return found

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Dataset.gather`."""
        if not len(rows):
            return self.sources[0].gather(rows)
        parts = [(at, *self._gather(source, local)) for source, at, local in self.split(rows)]
        tokens = np.empty((len(rows), self.width), parts[0][1].dtype)
        counts = np.empty(len(rows), np.int64)
        for at, cells, each, _ in parts:
            tokens[at], counts[at] = cells, each
        ends = np.cumsum(counts)
        pieces = np.empty((ends[-1], parts[0][3].shape[1]), np.int64)
        for at, _, each, found in parts:
            pieces[ragged(ends[at] - each, each)] = found
        return tokens, counts, pieces

    def _gather(self, source: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, counts, pieces = self.sources[source].gather(rows)
        pieces[pieces[:, 0] != PADDING_SAMPLE, 0] += self._samples[source]
        return tokens, counts, pieces


class Mixture(Joined):
    """Rows of several datasets in the proportions of `weights`; see above. Row numbers are those of `Joined`.

    weights   one for each source, for `parse_weights`; the attribute has the integers
    fill      of the mixed rows, as of a `Dataset`

    ValueError for another number of weights, or sources that do not fit together.
    """

    def __init__(self, sources: Iterable[Dataset], weights: str):
        super().__init__(sources)
        self.weights = parse_weights(weights, [source.directory for source in self.sources])
        self.shares = [weight / sum(self.weights) for weight in self.weights]
        fills = zip(*(source.fill for source in self.sources))
        self.fill = [sum(share * fill for share, fill in zip(self.shares, side)) for side in fills]
        self._turn = schedule(self.weights)
        self._before = np.empty(len(self._turn), np.int64)  # of the same source, in the schedule
        for source, weight in enumerate(self.weights):
            self._before[self._turn == source] = np.arange(weight)

    @property
    def endless_rows(self) -> int:
        """As of `Dataset`: no source comes to epoch 2^32."""
        lasts = ((source.rows << 32) // weight for source, weight in zip(self.sources, self.weights))
        return min(min(lasts) * len(self._turn), 2**63)

    def order(self, g, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch of its source, row), both int64 of g's shape, of the global row numbers `g`."""
        turns, place = np.divmod(np.asarray(g, dtype=np.int64), len(self._turn))
        source = self._turn[place]
        k = turns * np.array(self.weights)[source] + self._before[place]
        epoch, row = np.empty_like(k), np.empty_like(k)
        for number, dataset in enumerate(self.sources):
            mine = source == number
            epoch[mine], local = rows_at(k[mine], dataset.rows, seed, number)
            row[mine] = local + self._first[number]
        return epoch, row

    def counts(self, n: int) -> list[int]:
        """Rows of each source among the first n global rows."""
        turns, rest = divmod(n, len(self._turn))
        found = np.bincount(self._turn[:rest], minlength=len(self.weights)).tolist()
        return [turns * weight + more for weight, more in zip(self.weights, found)]

    def report(self, n: int) -> list[dict[str, object]]:
        """Of each source among the first n global rows, for a summary: rows, about how many tokens, and epochs."""
        return [
            {
                "data": str(source.directory),
                "weight": round(share, 6),
                "rows": rows,
                "tokens": round(rows * self.row_tokens * source.fill[0]),
                "epochs": round(rows / source.rows, 4),
            }
            for source, share, rows in zip(self.sources, self.shares, self.counts(n))
        ]

    @cached_property
    def unigram_entropy(self) -> float:
        """As of a `Dataset`, estimated by the mixed rows that `token_counts` counts."""
        return token_entropy(token_counts(self, 0), self.tokenizer.special_ids)


def token_counts(dataset: Dataset | Mixture, seed: int) -> np.ndarray:
    """(vocab_size,) int64: how often each token occurs in the rows that training with `seed` sees first.

    Of many shards, other rows are counted in those that the first rows are from, which training has to check anyway.
    """
    rows = dataset.order(np.arange(min(_COUNTED_ROWS, dataset.rows)), seed)[1]
    tokens, _, _ = dataset.gather(dataset.nearby(rows, _COUNTED_SHARDS))
    return np.bincount(tokens.ravel(), minlength=dataset.tokenizer.vocab_size)


def token_entropy(counts: np.ndarray, special_ids: Iterable[int]) -> float:
    """-sum p ln p over the tokens that are not special, in nats: 0 where there are none. counts: (vocab_size,) int64"""
    counts = np.delete(counts, list(special_ids))
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum())
