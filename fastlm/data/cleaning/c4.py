"""C4's rules for English web pages (Raffel et al. 2020, arXiv 1910.10683, section 2.2).

Lines are taken out, each for the first rule that it breaks:

c4: line without an end mark    it ends in none of . ! ? " or a closing quotation mark, or in an ellipsis
c4: line of few words           fewer than 5 words, which stand between white space
c4: line with javascript        it has the word "javascript" in any case
c4: policy line                 "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies" or
                                "use cookies" in any case
c4: citation marks              [1], [edit] and [citation needed] go, the line stays

Documents are dropped:

c4: lorem ipsum                 "lorem ipsum" in any case
c4: curly bracket               a "{"
c4: few sentences               fewer than 3 sentences in the lines that are left

Left out: the list of bad words, since it removes pages about minorities more than others (Dodge et al. 2021, arXiv
2104.08758); removal of repeated spans of three sentences, in whose place `fastlm.data.duplicates` removes documents;
the language, which is `Cleaning.languages`. C4 counts sentences with NLTK's model; here one ends in . ! or ?, closing
marks and white space.
"""

from __future__ import annotations

import re
from itertools import islice

MIN_LINE_WORDS = 5
MIN_SENTENCES = 3

_END_MARKS = (".", "!", "?", '"', "\u201d", "\u2019")
_ELLIPSES = ("...", "\u2026")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\s?\[(?:\d{1,3}|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*(?=\s|$)")


def c4(text: str) -> tuple[str | None, str | None, dict[str, int]]:
    """(text of the lines that stay, None, taken) or (None, the rule that drops the document, taken).

    taken: characters by the rule that took lines or marks out.
    """
    taken: dict[str, int] = {}
    lower = text.lower()
    if "lorem ipsum" in lower:
        return None, "c4: lorem ipsum", taken
    if "{" in text:
        return None, "c4: curly bracket", taken
    if "[" in text:
        without = _CITATION.sub("", text)
        if without != text:
            taken["c4: citation marks"] = len(text) - len(without)
            text = without
    javascript = "javascript" in lower
    policy = any(phrase in lower for phrase in _POLICY)
    lines = []
    for line in text.split("\n"):
        rule = _broken(line, javascript, policy)
        if rule is None:
            lines.append(line)
        else:
            taken[rule] = taken.get(rule, 0) + len(line)
    text = "\n".join(lines)
    sentences = sum(1 for _ in islice(_SENTENCE_END.finditer(text), MIN_SENTENCES))
    return (None, "c4: few sentences", taken) if sentences < MIN_SENTENCES else (text, None, taken)


def _broken(line: str, javascript: bool, policy: bool) -> str | None:
    line = line.strip()
    if not line:
        return None
    if not line.endswith(_END_MARKS) or line.endswith(_ELLIPSES):
        return "c4: line without an end mark"
    if len(line.split(None, MIN_LINE_WORDS)) < MIN_LINE_WORDS:
        return "c4: line of few words"
    if javascript and "javascript" in line.lower():
        return "c4: line with javascript"
    if policy:
        lower = line.lower()
        if any(phrase in lower for phrase in _POLICY):
            return "c4: policy line"
    return None
