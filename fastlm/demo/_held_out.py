"""Sentences of the corpus that were never trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastlm.data.cleaning import clean_text
from fastlm.data.selection import is_held_out

_END = re.compile(r"(?<=[a-z]\.)\s+(?=[A-Z])")
_PLAIN = re.compile(r"[A-Z][a-z]*(?:,? [a-z]+){6,}\.")  # words only: neither names of functions nor numbers


def held_out_sentences(corpus: Path, share: float, count: int, longest: int = 66) -> list[str]:
    """`count` sentences from the held-out documents of the JSON lines in `corpus`, as evenly as may be over all there
    are; fewer where there are fewer. They consist of words, and have at most `longest` characters.
    """
    found = {}
    for line in corpus.read_text(encoding="utf-8").splitlines():
        text = clean_text(json.loads(line)["text"])
        if is_held_out(text, share):
            for sentence in _END.split(text):
                if len(sentence) <= longest and _PLAIN.fullmatch(sentence):
                    found.setdefault(sentence)
    sentences = list(found)
    count = min(count, len(sentences))
    return [sentences[(2 * i + 1) * len(sentences) // (2 * count)] for i in range(count)]
