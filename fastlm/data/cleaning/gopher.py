"""The quality and repetition filters of MassiveText (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1).

A word stands between white space. A document is dropped by the first rule that it breaks.

Quality, for English text:

gopher: words                 fewer than 50 or more than 100,000
gopher: mean word length      below 3 or above 10 characters
gopher: symbols               more hash signs, or more ellipses (... or U+2026), than 0.1 a word
gopher: bullet lines          more than 90% of the lines begin with a bullet
gopher: ellipsis lines        more than 30% of the lines end with an ellipsis
gopher: words without letters fewer than 80% of the words have a letter
gopher: stop words            fewer than two of: the, be, to, of, and, that, have, with

Repetition (table A1), shares of the lines, of the paragraphs or of the characters in words:

gopher: duplicate lines       lines that occur before above 0.30, or their characters above 0.20
gopher: duplicate paragraphs  paragraphs that occur before above 0.30, or their characters above 0.20
gopher: top n-gram            characters in the most frequent n-gram above 0.20 (n = 2), 0.18 (3), 0.16 (4)
gopher: duplicate n-grams     characters in n-grams that occur more than once above 0.15 (n = 5), 0.14 (6), 0.13 (7),
                              0.12 (8), 0.11 (9), 0.10 (10); characters in overlapping n-grams count once
"""

from __future__ import annotations

import re

import numpy as np

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN, MAX_MEAN = 3, 10
SYMBOLS_PER_WORD = 0.1
BULLET_LINES, ELLIPSIS_LINES = 0.9, 0.3
WORDS_WITH_LETTERS = 0.8
STOP_WORDS, MIN_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with")), 2
DUPLICATES, DUPLICATE_CHARACTERS = 0.30, 0.20
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

_BULLETS = ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25e6", "\u25aa", "\u2043")
_ELLIPSES = ("...", "\u2026")
_LETTER = re.compile(r"[^\W\d_]").search


def gopher(text: str) -> str | None:
    """The rule that drops the document, or None."""
    words = text.split()
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return _quality(text, words, lines) or _repetition(text, words, lines)


def _quality(text: str, words: list[str], lines: list[str]) -> str | None:
    count = len(words)
    if not MIN_WORDS <= count <= MAX_WORDS:
        return "gopher: words"
    if not MIN_MEAN <= sum(map(len, words)) / count <= MAX_MEAN:
        return "gopher: mean word length"
    if max(text.count("#"), text.count("...") + text.count("\u2026")) / count > SYMBOLS_PER_WORD:
        return "gopher: symbols"
    if sum(line.startswith(_BULLETS) for line in lines) / len(lines) > BULLET_LINES:
        return "gopher: bullet lines"
    if sum(line.endswith(_ELLIPSES) for line in lines) / len(lines) > ELLIPSIS_LINES:
        return "gopher: ellipsis lines"
    # isalpha and the end of a word without its punctuation tell of nearly all words, in half the time of the pattern.
    letters = sum([word.isalpha() or word[:-1].isalpha() or _LETTER(word) is not None for word in words])
    if letters / count < WORDS_WITH_LETTERS:
        return "gopher: words without letters"
    if len(STOP_WORDS.intersection(words)) < MIN_STOP_WORDS and (
        len(STOP_WORDS.intersection(map(str.lower, words))) < MIN_STOP_WORDS
    ):
        return "gopher: stop words"
    return None


def _repetition(text: str, words: list[str], lines: list[str]) -> str | None:
    if _duplicates(lines):
        return "gopher: duplicate lines"
    if _duplicates([block for block in text.split("\n\n") if block.strip()]):
        return "gopher: duplicate paragraphs"
    ids: dict[str, int] = {}
    numbers = np.array([ids.setdefault(word, len(ids)) for word in words], np.int64)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    total = lengths.sum()
    # The class of the n-gram at each place, -1 where it occurs once. A longer n-gram occurs twice only where its first
    # n - 1 words and its last word do, so that few places are left for larger n.
    kind, counts = _classes(numbers, np.arange(len(words)), len(words))
    occurs = kind >= 0
    for n in range(2, max(REPEATED) + 1):
        places = np.flatnonzero(kind[: len(words) - n + 1] >= 0)
        places = places[occurs[places + n - 1]]
        kind, counts = _classes(kind[places] * len(ids) + numbers[places + n - 1], places, len(words))
        if not len(counts):
            return None
        if n in TOP:
            most = np.flatnonzero(counts == counts.max())
            share = max(_covered(np.flatnonzero(kind == top), n, lengths) for top in most[:_TIES].tolist()) / total
            if share > TOP[n]:
                return "gopher: top n-gram"
        elif n in REPEATED and _covered(np.flatnonzero(kind >= 0), n, lengths) / total > REPEATED[n]:
            return "gopher: duplicate n-grams"
    return None


_TIES = 16  # of n-grams that are equally frequent, the first so many in the text are looked at


def _duplicates(parts: list[str]) -> bool:
    """Whether too many of the parts, or of their characters, are those of parts that came before."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return False
    total = sum(map(len, parts))
    repeated = total - sum(map(len, distinct))
    return 1 - len(distinct) / len(parts) > DUPLICATES or repeated / total > DUPLICATE_CHARACTERS


def _classes(keys: np.ndarray, places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """kind (count,) int64: at `places` whose key occurs more than once its class, else -1; how often each class occurs.

    Classes are numbered by where they occur first.
    """
    kind = np.full(count, -1, np.int64)
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    repeated = repeated[np.argsort(first[repeated])]
    number = np.full(len(counts), -1, np.int64)
    number[repeated] = np.arange(len(repeated))
    kind[places] = number[inverse]
    return kind, counts[repeated]


def _covered(starts: np.ndarray, n: int, lengths: np.ndarray) -> int:
    """Characters of the words in the n-grams at `starts`, each word once."""
    inside = np.zeros(len(lengths), bool)
    for i in range(n):
        inside[starts + i] = True
    return int(lengths[inside].sum())
