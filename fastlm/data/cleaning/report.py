"""What cleaning took: documents and characters by rule, with one sample of each rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

SAMPLE_CHARS = 200
_LONGEST_NAME = 64  # characters beyond a sample that are looked at, so that an address is not cut


@dataclass
class Taken:
    """What one rule took.

    documents   that it dropped or changed
    dropped     of those, the ones that it dropped
    characters  that it took away, or for a replacement how many were replaced
    sample      {"ordinal", "place", "text"} of the first document by ordinal, and "became" where it was changed
    """

    documents: int = 0
    dropped: int = 0
    characters: int = 0
    sample: dict | None = None


def _key(sample: dict) -> tuple[int, ...]:
    ordinal = sample["ordinal"]
    return (ordinal,) if isinstance(ordinal, int) else tuple(ordinal)


@dataclass
class CleaningReport:
    """Counts by rule. Merging is associative and commutative, so that any number of processes gives the same report.

    An ordinal is an int, or a sequence of ints (the part, the document in it), the same kind in one report.
    """

    documents: int = 0
    characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    rules: dict[str, Taken] = field(default_factory=dict)
    redact: Callable[[str], str] | None = field(default=None, compare=False, repr=False)  # applied to every sample

    def __getstate__(self) -> dict:
        return {**self.__dict__, "redact": None}  # a function of the process: what is entered is redacted already

    def take(self, rule: str, characters: int, *, ordinal, place: str, text: str, became: str | None = None) -> None:
        """Enter that `rule` dropped the document, or where `became` is given that it changed `text` to that."""
        entry = self.rules.setdefault(rule, Taken())
        entry.documents += 1
        entry.dropped += became is None
        entry.characters += characters
        sample = {"ordinal": ordinal}
        if entry.sample is None or _key(sample) < _key(entry.sample):
            entry.sample = sample | {"place": place} | self._excerpt(text, became)

    def take_kept(self, rule: str, characters: int, *, ordinal, place: str, text: Callable[[], str]) -> None:
        """Enter that `rule` dropped a document that was counted as kept: a duplicate of another one.

        text: called for the first document that the rule takes, in the order of the calls, whose sample stays
        """
        self.kept -= 1
        self.kept_characters -= characters
        sample = "" if rule in self.rules else text()
        self.take(rule, characters, ordinal=ordinal, place=place, text=sample)

    def merge(self, other: CleaningReport) -> None:
        """Add the counts of `other`; of two samples that of the smaller ordinal stays."""
        self.documents += other.documents
        self.characters += other.characters
        self.kept += other.kept
        self.kept_characters += other.kept_characters
        for rule, theirs in other.rules.items():
            entry = self.rules.setdefault(rule, Taken())
            entry.documents += theirs.documents
            entry.dropped += theirs.dropped
            entry.characters += theirs.characters
            if theirs.sample and (entry.sample is None or _key(theirs.sample) < _key(entry.sample)):
                entry.sample = theirs.sample

    def as_dict(self) -> dict:
        """As JSON; the rules in the order of their names."""
        counts = {name: getattr(self, name) for name in ("documents", "characters", "kept", "kept_characters")}
        return {**counts, "rules": {rule: vars(self.rules[rule]).copy() for rule in sorted(self.rules)}}

    @classmethod
    def from_dict(cls, entries: dict) -> CleaningReport:
        rules = {rule: Taken(**taken) for rule, taken in entries["rules"].items()}
        return cls(**{**entries, "rules": rules})

    def _excerpt(self, text: str, became: str | None) -> dict[str, str]:
        if became is None:
            return {"text": self._cut(text, 0)}
        start = max(0, _common(text, became) - 20)
        return {"text": self._cut(text, start), "became": self._cut(became, start)}

    def _cut(self, text: str, start: int) -> str:
        if self.redact is None:
            return text[start : start + SAMPLE_CHARS]
        return self.redact(text[start : start + SAMPLE_CHARS + _LONGEST_NAME])[:SAMPLE_CHARS]


def _common(text: str, became: str) -> int:
    """How many characters both begin with, by halves: slices compare faster than characters."""
    low, high = 0, min(len(text), len(became))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[low:middle] == became[low:middle] else (low, middle - 1)
    return low
