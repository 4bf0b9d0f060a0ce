"""`Cleaner`: the rules of a `Cleaning` on one document after another, each rule counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from numbers import Real

from fastlm.data._checks import integer
from fastlm.data.cleaning.c4 import c4
from fastlm.data.cleaning.gopher import gopher
from fastlm.data.cleaning.language import detect, known
from fastlm.data.cleaning.repair import Repair
from fastlm.data.cleaning.report import CleaningReport
from fastlm.data.cleaning.tidy import STEPS
from fastlm.data.scrub import KINDS, Scrubber

FILTERS = ("c4", "gopher")
RULES_VERSION = 1  # part of a preparation's identity: raise it when a rule gives another output for the same text
DETECTORS = ("py3langid", "lingua")


@dataclass(frozen=True)
class Cleaning:
    """Which rules a `Cleaner` has. Every one is a function of the document alone.

    repair               encoding repair by `ftfy`: mojibake, lone surrogates, terminal escapes (extra `data`)
    filters              "gopher" and "c4", for English prose: `fastlm.data.cleaning.gopher`, `.c4`
    min_chars, max_chars a document of fewer or more characters is dropped; max_chars 0: no bound
    languages            ISO 639-1 codes to keep; empty: all (extra `language`)
    detector             "py3langid" or "lingua"
    min_confidence       of the detected language, from 0 to 1
    scrub                any of "email", "ip", "phone", "card", "iban", replaced by <EMAIL>, <IP> and so on (extra
                         `privacy` for the last three): `fastlm.data.scrub`
    phone_regions        ISO 3166 codes: phone numbers without a country code are looked for in these

    ValueError for an unknown name or a wrong number.
    """

    repair: bool = False
    filters: tuple[str, ...] = ()
    min_chars: int = 8
    max_chars: int = 0
    languages: tuple[str, ...] = ()
    detector: str = "py3langid"
    min_confidence: float = 0.5
    scrub: tuple[str, ...] = ()
    phone_regions: tuple[str, ...] = ("US", "GB")

    def __post_init__(self) -> None:
        for name, allowed in (("filters", FILTERS), ("scrub", KINDS), ("languages", None), ("phone_regions", None)):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else tuple(value)
            wrong = [v for v in value if not isinstance(v, str) or not v or (allowed and v not in allowed)]
            if wrong or len(set(value)) < len(value):
                expected = f"any of {', '.join(allowed)}" if allowed else "codes of two letters"
                raise ValueError(f"{name}: expected {expected}, each once, got {value!r}")
            object.__setattr__(self, name, value)
        if self.detector not in DETECTORS:
            raise ValueError(f"detector: expected one of {', '.join(DETECTORS)}, got {self.detector!r}")
        if not isinstance(self.min_confidence, Real) or not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence: expected a number from 0 to 1, got {self.min_confidence!r}")
        integer("min_chars", self.min_chars, 0)
        integer("max_chars", self.max_chars, 0)

    def as_dict(self) -> dict:
        """The settings as JSON, for the identity of a preparation."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Cleaner:
    """Applies `settings` to documents, and counts in `report` what each rule took.

    Order: encoding repair, the steps of `fastlm.data.cleaning.tidy`, length, language, C4, Gopher, personal data, and
    length again. ValueError where a package is missing (it names the extra) or a language is unknown to the detector.
    """

    def __init__(self, settings: Cleaning, report: CleaningReport | None = None):
        self.settings = settings
        self.report = CleaningReport() if report is None else report
        self._repair = Repair() if settings.repair else None
        self._scrub = Scrubber(settings.scrub, settings.phone_regions) if settings.scrub else None
        if self._scrub:
            self.report.redact = lambda sample: self._scrub(sample)[0]
        if settings.languages:
            unknown = sorted(set(settings.languages) - set(known(settings.detector)))
            if unknown:
                raise ValueError(
                    f"languages: expected codes that {settings.detector} knows ({' '.join(known(settings.detector))}), "
                    f"got {' '.join(unknown)}"
                )

    def __call__(self, text: str, ordinal=0, place: str = "") -> tuple[str | None, str | None]:
        """(cleaned text, None), or (None, the rule that dropped it).

        ordinal, place: of the document, for the report's samples; see `CleaningReport`.
        """
        report = self.report
        report.documents += 1
        report.characters += len(text)
        for rule, step in self._steps():
            became = step(text)
            if became != text:
                taken = max(0, len(text) - len(became))
                report.take(rule, taken, ordinal=ordinal, place=place, text=text, became=became)
                text = became
        rule = self._length(text) or self._language(text)
        before = text
        if rule is None:
            text, rule = self._filter(text, ordinal, place)
        if rule is None and self._scrub:
            text = self._scrubbed(text, ordinal, place)
        if rule is None and text is not before:
            rule = self._length(text)
        if rule is not None:
            before = text or before
            report.take(rule, len(before), ordinal=ordinal, place=place, text=before)
            return None, rule
        report.kept += 1
        report.kept_characters += len(text)
        return text, None

    def _steps(self) -> Iterator[tuple[str, Callable[[str], str]]]:
        if self._repair:
            yield "encoding repair", self._repair
        yield from STEPS.items()

    def _length(self, text: str) -> str | None:
        if not text.strip():
            return "empty"
        if len(text) < self.settings.min_chars:
            return "too short"
        return "too long" if 0 < self.settings.max_chars < len(text) else None

    def _language(self, text: str) -> str | None:
        if not self.settings.languages:
            return None
        code, confidence = detect(text, self.settings.detector)
        if code not in self.settings.languages:
            return f"language: {code}"
        return "language: unsure" if confidence < self.settings.min_confidence else None

    def _filter(self, text: str, ordinal, place: str) -> tuple[str | None, str | None]:
        if "c4" in self.settings.filters:
            left, rule, taken = c4(text)
            if rule is not None:
                return None, rule
            for name, characters in taken.items():
                self.report.take(name, characters, ordinal=ordinal, place=place, text=text, became=left)
            text = left
        rule = gopher(text) if "gopher" in self.settings.filters and text.strip() else None
        return (text, None) if rule is None else (None, rule)

    def _scrubbed(self, text: str, ordinal, place: str) -> str:
        became, taken = self._scrub(text)
        for kind, (_, characters) in taken.items():
            # The sample has the placeholder and what is around it, never what it stands for.
            start = became[: became.index(f"<{kind.upper()}>")]
            self.report.take(f"scrub: {kind}", characters, ordinal=ordinal, place=place, text=start, became=became)
        return became
