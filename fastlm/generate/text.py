"""What the tokens of a row spell, as they come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_CONTEXT = 8  # tokens of the prompt that decide how the first new one is spelled: a space, or a word's end


class Decodes(Protocol):
    """A tokenizer: fastlm.data's, or one of Transformers."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class Text:
    """The text of a row after its prompt.

    text      of the tokens so far, before the first stop string
    stopped   whether there is one
    """

    def __init__(self, tokenizer: Decodes, context: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop, self._ids = tokenizer, stop, list(context[-_CONTEXT:])
        self._start, self._given = len(self._decode()), 0
        self.text, self.stopped = "", False

    def add(self, *ids: int) -> None:
        self._ids += ids
        self.text = self._decode()[self._start :]
        found = [at for at in map(self.text.find, self._stop) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def fresh(self, ended: bool) -> str:
        """The text since the last call, without an end that the next tokens may change or complete to a stop string."""
        text = self.text
        if not (ended or self.stopped):
            text = text.rstrip("\ufffd")  # the first bytes of a character
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
        fresh, self._given = text[self._given :], max(self._given, len(text))
        return fresh

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
