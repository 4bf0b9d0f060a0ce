"""What the tokens of a row spell, as they come, and the strings that end it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

_CONTEXT = 8  # tokens that decide how the next one is spelled: a space, or a word's end
_MOST = 3 * _CONTEXT  # tokens that are decoded again with each new one: all of them would take time as their square


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
        # What the first of `_ids` spell, and what the new tokens spell up to their end.
        self._before, self._settled, self._given = self._decode(self._ids), "", 0
        self.text, self.stopped = "", False

    def add(self, *ids: int) -> None:
        self._ids = [*self._ids, *ids]
        decoded, before = self._decode(self._ids), self._before
        if not decoded.startswith(before):
            before = before.rstrip("\ufffd")  # the first bytes of a character that is whole now
        self.text, settled = self._settled + decoded[len(before) :], len(self._settled)
        found = [self.text.find(stop, max(0, settled - len(stop) + 1)) for stop in self._stop]
        if max(found, default=-1) >= 0:
            self.text, self.stopped = self.text[: min(at for at in found if at >= 0)], True
        elif len(self._ids) > _MOST:
            self._settle(decoded)

    def copy(self) -> Text:
        """Another text that goes on from here by itself."""
        return copy.copy(self)

    def _settle(self, decoded: str) -> None:
        """Only the last tokens are decoded again from now on, where they alone are spelled as they are here."""
        last = self._ids[-_CONTEXT:]
        before = self._decode(last)
        if before and decoded.endswith(before) and not before.endswith("\ufffd"):
            self._ids, self._before, self._settled = last, before, self.text

    def fresh(self, ended: bool) -> str:
        """The text since the last call, without an end that the next tokens may change or complete to a stop string."""
        text = self.text
        if not (ended or self.stopped):
            text = text.rstrip("\ufffd")  # the first bytes of a character
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
        fresh, self._given = text[self._given :], max(self._given, len(text))
        return fresh

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
