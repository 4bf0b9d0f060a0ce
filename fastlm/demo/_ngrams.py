"""A trigram model of tokens, to hold a neural one against.

    p(c | a, b) = max(n(abc) - D, 0) / n(ab) + D t(ab) / n(ab) · p(c | b)
    p(c | b)    = max(n(bc) - D, 0) / n(b) + D t(b) / n(b) · p(c)
    p(c)        = (n(c) + 1/2) / (n + V/2)

Absolute discounting (Ney, Essen and Kneser 1994): n counts, t(x) is how many different tokens follow x, D = 0.75. The
shares of contexts that never occurred fall to the next shorter one.
"""

from __future__ import annotations

import numpy as np

_DISCOUNT = 0.75


class _Followers:
    """How often each token follows each context, a number from 0; and the most frequent follower."""

    def __init__(self, context: np.ndarray, token: np.ndarray, vocab_size: int):
        self.vocab_size = vocab_size
        self.pairs, self.counts = np.unique(context * vocab_size + token, return_counts=True)
        home, self.first, self.kinds = np.unique(self.pairs // vocab_size, return_index=True, return_counts=True)
        self.contexts, self.totals = home, np.add.reduceat(self.counts, self.first)
        order = np.lexsort((-self.counts, self.pairs // vocab_size))  # stable: of equal ones the smallest id
        self.best = self.pairs[order[self.first]] % vocab_size

    def look(self, context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place of each context, whether it occurred)."""
        place = np.minimum(np.searchsorted(self.contexts, context), len(self.contexts) - 1)
        return place, self.contexts[place] == context

    def share(self, context: np.ndarray, token: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """p of each token after its context; `shorter`: after the shorter one."""
        place, known = self.look(context)
        pair = context * self.vocab_size + token
        at = np.minimum(np.searchsorted(self.pairs, pair), len(self.pairs) - 1)
        count = np.where(self.pairs[at] == pair, self.counts[at], 0)
        found = np.maximum(count - _DISCOUNT, 0.0) + _DISCOUNT * self.kinds[place] * shorter
        return np.where(known, found / self.totals[place], shorter)


class Trigrams:
    """a, b, c: (n,) int64, a token c and the two before it; `vocab_size` stands for one that is missing."""

    def __init__(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, vocab_size: int):
        self.vocab_size = vocab_size
        counts = np.bincount(c, minlength=vocab_size) + 0.5
        self.unigram = counts / counts.sum()
        self.after_one = _Followers(b, c, vocab_size)
        self.after_two = _Followers(self._context(a, b), c, vocab_size)

    def _context(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a * (self.vocab_size + 1) + b

    def nats(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """-log p(c | a, b), (n,)."""
        shorter = self.after_one.share(b, c, self.unigram[c])
        return -np.log(self.after_two.share(self._context(a, b), c, shorter))

    def best(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The most frequent token after a, b; after b where a, b never occurred; else of all, (n,)."""
        found = np.full(len(a), self.unigram.argmax())
        for followers, context in ((self.after_one, b), (self.after_two, self._context(a, b))):
            place, known = followers.look(context)
            found = np.where(known, followers.best[place], found)
        return found


def before(ids: np.ndarray, positions: np.ndarray, distance: int, missing: int) -> np.ndarray:
    """The token `distance` before each, `missing` where its piece begins later; ids, positions: (T,)."""
    return np.where(positions >= distance, np.roll(ids, distance), missing)
