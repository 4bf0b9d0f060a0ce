"""`Cleaner`: the rules of a `Cleaning` on one document after another, each rule counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Real

from fastlm.data._checks import integer
from fastlm.data.cleaning.report import CleaningReport
from fastlm.data.cleaning.tidy import clean_text

FILTERS = ("c4", "gopher")
SCRUBBED = ("email", "ip", "phone", "card", "iban")
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
    scrub                any of "email", "ip", "phone", "card", "iban", replaced by <EMAIL>, <IP>, <PHONE>, <CARD>, <IBAN>
                         (extra `privacy` for the last three)
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
        for name, allowed in (("filters", FILTERS), ("scrub", SCRUBBED), ("languages", None), ("phone_regions", None)):
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
    """Applies `settings` to documents, and counts in `report` what each rule took."""

    def __init__(self, settings: Cleaning, report: CleaningReport | None = None):
        self.settings = settings
        self.report = CleaningReport() if report is None else report

    def __call__(self, text: str, ordinal=0, place: str = "") -> tuple[str | None, str | None]:
        """(cleaned text, None), or (None, the rule that dropped it).

        ordinal, place: of the document, for the report's samples; see `CleaningReport`.
        """
        report = self.report
        report.documents += 1
        report.characters += len(text)
        cleaned = clean_text(text)
        rule = "empty" if not cleaned.strip() else "too short" if len(cleaned) < self.settings.min_chars else None
        if rule:
            report.take(rule, len(cleaned), ordinal=ordinal, place=place, text=cleaned)
            return None, rule
        report.kept += 1
        report.kept_characters += len(cleaned)
        return cleaned, None
