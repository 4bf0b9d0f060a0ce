"""Encoding repair by `ftfy`, skipped where it is proven to change nothing.

ftfy (Speer 2019, doi 10.5281/zenodo.2591652) repairs text that was decoded by a wrong encoding. Its fixes that change
correct text are off: quotes, ligatures, widths and HTML entities stay as they are.

Line by line, it changes nothing unless the line has an escape character, a surrogate, or matches ftfy's own pattern of
mojibake. Every alternative of that pattern has a character, or a pair, of `_clues`. A line without one needs no look by
the pattern itself: nearly all of English, Cyrillic, Greek, Arabic, Chinese. tests/test_cleaning.py compares with ftfy.
"""

from __future__ import annotations

import re

from fastlm.data._extras import require

_SETTINGS = {
    "unescape_html": False,
    "uncurl_quotes": False,
    "fix_latin_ligatures": False,
    "fix_character_width": False,
    "fix_line_breaks": False,
    "remove_control_chars": False,  # a rule of its own, which comes next
    "normalization": None,  # so is this
    "explain": False,
}
_SEGMENT = 1_000_000  # ftfy cuts a longer line
_ALWAYS = "\x1b\ud800-\udfff"  # terminal escapes and surrogates


class Repair:
    """repair(text) -> the text repaired. ValueError without `ftfy` (extra `data`)."""

    def __init__(self):
        ftfy = require("ftfy")
        badness = require("ftfy.badness")
        self._fix, self._config = ftfy.fix_text, ftfy.TextFixerConfig(**_SETTINGS)
        self._is_bad = badness.is_bad
        self._always = re.compile(f"[{_ALWAYS}]").search
        self._clue = re.compile(_clues(badness.MOJIBAKE_CATEGORIES)).search

    def __call__(self, text: str) -> str:
        if self.is_clean(text):
            return text
        return "".join([line if self.is_clean_line(line) else self._fix(line, self._config) for line in _lines(text)])

    def is_clean(self, text: str) -> bool:
        """Whether nothing of `text` can need a repair, by its characters alone."""
        return (text.isascii() and "\x1b" not in text) or not self._clue(text)

    def is_clean_line(self, line: str) -> bool:
        """Whether ftfy changes nothing of a line, by its own pattern where the characters do not tell."""
        if self.is_clean(line):
            return True
        return len(line) <= _SEGMENT and not (self._always(line) or self._is_bad(line))


def _lines(text: str) -> list[str]:
    """The lines with their ends: ftfy's pattern looks at those too."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines


def _clues(categories: dict[str, str]) -> str:
    """A pattern that finds a part of each alternative of ftfy's BADNESS_RE (6.3)."""
    rare = ("c1", "bad", "law", "currency", "numeric", "box", "lower_accented", "upper_accented")
    quotes = categories["start_punctuation"] + categories["end_punctuation"]
    single = "".join(categories[name] for name in rare)
    # U+201A and U+0402 begin mojibake from MacRoman and Windows-1251, \u00d8 and \u00d9 that of Arabic; capitals of
    # Windows-1251 and 1253 count before a quotation mark or a degree sign.
    return f"[{_ALWAYS}{single}\u00d8\u00d9\u201a\u0402]|[ВГРСΒΓΞΟ][{quotes}°]"
