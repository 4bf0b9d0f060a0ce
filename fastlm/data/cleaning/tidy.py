"""A small, deterministic cleaner. What it changes, and what it drops:

text        Unicode NFC; line ends (CR, CRLF, VT, FF, NEL, LS, PS) become LF; control characters, lone surrogates,
            byte-order marks and zero-width spaces go; a tab or an odd space becomes a space, a run of spaces
            inside a line one space (indentation stays, since in code it means something); spaces at line ends
            go; blank lines come one at a time, and none at either end.
documents   dropped, with a count and the first places: `empty`, `too short` (fewer than `min_chars` characters),
            `duplicate` (the cleaned text equals an earlier document's, by a 128-bit hash).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

from fastlm.data.sources import Report

VERSION = 1  # part of a preparation's identity: raise it when the same input gives another output

_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_JUNK = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\u200b\ufeff\ufffe\uffff\ud800-\udfff]")
_SPACE = re.compile("[\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_SPACES = re.compile(r"(?<=[^ \n])  +")
_LINE_TAIL = re.compile(r"(?<! ) +$", re.MULTILINE)  # without the look-behind, quadratic in the indentation
_BLANK_LINES = re.compile(r"\n{3,}")


def clean_text(text: str) -> str:
    """`text` as the table above says. Idempotent: clean_text(clean_text(x)) == clean_text(x)."""
    text = _JUNK.sub("", _LINE_END.sub("\n", text))
    text = unicodedata.normalize("NFC", text)
    text = _LINE_TAIL.sub("", _SPACES.sub(" ", _SPACE.sub(" ", text)))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def clean_documents(records: Iterable[tuple[str, str]], report: Report, min_chars: int) -> Iterator[str]:
    """The cleaned text of each (place, text) that is worth training on; the others are entered in the report.

    Memory: about 110 bytes for each distinct document, a 16-byte hash in a set.
    """
    seen = set()
    for place, text in records:
        text = clean_text(text)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if not text.strip():
            report.reject("empty", place)
        elif len(text) < min_chars:
            report.reject("too short", place)
        elif digest in seen:
            report.reject("duplicate", place)
        else:
            seen.add(digest)
            report.kept += 1
            yield text
