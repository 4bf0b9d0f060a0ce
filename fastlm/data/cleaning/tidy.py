"""What is done to every text. Each step is a rule of the cleaning report:

line ends             CR, CRLF, VT, FF, NEL, LS, PS become LF
control characters    they go, with lone surrogates, byte-order marks and zero-width spaces
NFC                   Unicode normalization form C
spaces                a tab or an odd space becomes a space, a run of spaces inside a line one space (indentation stays,
                      since in code it means something); spaces at line ends go
blank lines           they come one at a time, and none at either end
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Set

from fastlm.data.duplicates import exact_digest
from fastlm.data.selection import DUPLICATE, REASONS, VALIDATION
from fastlm.data.sources import Report

VERSION = 1  # part of a preparation's identity: raise it when the same input gives another output

_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_ASCII_LINE_END = re.compile("\r\n|[\r\v\f]")
_JUNK = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\u200b\ufeff\ufffe\uffff\ud800-\udfff]")
_ASCII_JUNK = dict.fromkeys((*range(9), *range(14, 32), 127))
_SPACE = re.compile("[\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_SPACES = re.compile(r"(?<=[^ \n])  +")
_LINE_TAIL = re.compile(r"(?<! ) +$", re.MULTILINE)  # without the look-behind, quadratic in the indentation
_BLANK_LINES = re.compile(r"\n{3,}")


def _line_ends(text: str) -> str:
    return (_ASCII_LINE_END if text.isascii() else _LINE_END).sub("\n", text)


def _control(text: str) -> str:
    return text.translate(_ASCII_JUNK) if text.isascii() else _JUNK.sub("", text)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _spaces(text: str) -> str:
    text = text.replace("\t", " ") if text.isascii() else _SPACE.sub(" ", text)
    if "  " in text:
        text = _SPACES.sub(" ", text)
    return _LINE_TAIL.sub("", text) if " \n" in text or text.endswith(" ") else text


def _blank_lines(text: str) -> str:
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


STEPS = {
    "line ends": _line_ends,
    "control characters": _control,
    "NFC": _nfc,
    "spaces": _spaces,
    "blank lines": _blank_lines,
}


def clean_text(text: str) -> str:
    """`text` as the table above says. Idempotent: clean_text(clean_text(x)) == clean_text(x)."""
    for step in STEPS.values():
        text = step(text)
    return text


def tidied(records: Iterable[tuple[str, str]], report: Report, min_chars: int) -> Iterator[tuple[str, str]]:
    """(place, cleaned text) of each (place, text); `empty` and `too short` ones are entered in the report."""
    for place, text in records:
        text = clean_text(text)
        if not text.strip():
            report.reject("empty", place)
        elif len(text) < min_chars:
            report.reject("too short", place)
        else:
            yield place, text


def clean_documents(
    records: Iterable[tuple[str, str]], report: Report, min_chars: int, validation: Set[bytes] = frozenset()
) -> Iterator[str]:
    """The cleaned text of each (place, text) that is worth training on; the others are entered in the report: as by
    `tidied`, `duplicate` (the cleaned text equals an earlier document's, by a 128-bit hash), and those whose hash is in
    `validation` as `in the validation text`.

    Memory: about 110 bytes for each distinct document, a 16-byte hash in a set.
    """
    seen = set()
    for place, text in tidied(records, report, min_chars):
        digest = exact_digest(text)
        if digest in validation:
            report.reject(REASONS[VALIDATION], place)
        elif digest in seen:
            report.reject(REASONS[DUPLICATE], place)
        else:
            seen.add(digest)
            report.kept += 1
            yield text
