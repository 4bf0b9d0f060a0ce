"""Counts of the tokens that pass to the rows, which parts of the text add up to."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from fastlm.data.packing import encode_documents
from fastlm.data.sources import Report
from fastlm.data.tokenizer import LONGEST, Tokenizer

_WARNED, _REFUSED = 0.05, 0.9  # shares of [UNK]


class Counts:
    """What passes to the rows: documents, bytes of UTF-8, how often each token occurs (vocab_size,) int64, and how many
    characters, white space aside, there are and are lost to [UNK]."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.documents, self.bytes, self.tokens = 0, 0, np.zeros(tokenizer.vocab_size, np.int64)
        self.characters = self.lost = 0

    @cached_property
    def _lengths(self) -> np.ndarray:
        """(vocab_size,) int64: characters that a token stands for."""
        lengths = np.zeros(self.tokenizer.vocab_size, np.int64)
        for token, id in self.tokenizer.backend.get_vocab(with_added_tokens=True).items():
            lengths[id] = len(token.removeprefix("##").lstrip("▁"))
        return lengths

    def look(self, chunks: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        """Count the chunks of text, their tokens, and the characters that these do not spell; as `encode_documents`."""
        text = "".join(chunks)
        self.bytes += len(text.encode())
        self.characters += _visible(text)
        self.tokens += np.bincount(ids, minlength=len(self.tokens))
        unknown = ids == self.tokenizer.unk_id
        if not unknown.any():  # where characters differ all the same, it is the normalizer's doing
            return
        start = 0
        for chunk, stop in zip(chunks, np.cumsum(lengths).tolist(), strict=True):
            if count := int(unknown[start:stop].sum()):
                known = ids[start:stop][~unknown[start:stop]]
                self.lost += max(count, _visible(chunk) - int(self._lengths[known].sum()))
            start = stop

    def unknown(self) -> dict[str, float]:
        """The shares of the tokens that are [UNK], and of the characters that it stands for: the manifest's entry."""
        tokens = 0 if self.tokenizer.unk_id is None else int(self.tokens[self.tokenizer.unk_id])
        shares = tokens / max(1, self.tokens.sum()), self.lost / max(1, self.characters)
        return dict(zip(("tokens", "characters"), (round(float(share), 6) for share in shares)))

    def check_unknown(self) -> None:
        """ValueError where nearly all of the text is [UNK], and a warning where much of it is."""
        found = self.unknown()
        worst = max(found.values())
        says = (
            f"{found['tokens']:.1%} of the tokens are [UNK], which stands for {found['characters']:.1%} of the "
            f"characters: words of more than {LONGEST} characters, or with characters that the vocabulary lacks; give "
            "text with spaces between words, or a tokenizer that was trained on such text"
        )
        if worst >= _REFUSED:
            raise ValueError(f"data: expected text that the tokenizer can spell, but {says}")
        if worst >= _WARNED:
            warnings.warn(f"data: {says}", stacklevel=3)

    def encode(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Token ids (n,) uint32 of each text, counted."""
        return encode_documents(texts, self.tokenizer, self.look)

    def filled(self, documents: Iterable[np.ndarray], empty: Report) -> Iterator[np.ndarray]:
        """The documents with tokens. The others are entered in `empty`."""
        for ids in documents:
            if ids.size:
                self.documents += 1
                yield ids
            else:
                empty.kept -= 1
                empty.reject("no tokens", f"kept document {self.documents}")

    def as_array(self) -> np.ndarray:
        """(vocab_size + 3,) int64, of which the sum over parts is the array of the whole."""
        return np.concatenate([self.tokens, [self.bytes, self.characters, self.lost]])

    def add(self, array: np.ndarray) -> None:
        """Add what `as_array` gave of a part."""
        self.tokens += array[:-3]
        for name, value in zip(("bytes", "characters", "lost"), array[-3:].tolist(), strict=True):
            setattr(self, name, getattr(self, name) + value)


def _visible(text: str) -> int:
    """Characters, white space aside."""
    return len(text) - text.count(" ") - text.count("\n")
