"""The language of a text, by `py3langid` (about 140 languages) or `lingua` (75, a sixth of the speed)."""

from __future__ import annotations

from functools import cache

from fastlm.data._extras import require

_HALF = 500  # characters from the start and from the middle: py3langid takes 0.3 ms for 1000


def sample(text: str) -> str:
    """What the language is detected by: the start of the text and a piece from its middle."""
    if len(text) <= 2 * _HALF:
        return text
    middle = max(_HALF, (len(text) - _HALF) // 2)
    return text[:_HALF] + "\n" + text[middle : middle + _HALF]


@cache
def _py3langid():
    langid = require("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@cache
def _lingua():
    # The smaller models: the full ones take 1 GB of memory, and tell texts of fewer than 120 characters better.
    return require("lingua").LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()


def detect(text: str, detector: str) -> tuple[str, float]:
    """(ISO 639-1 code, confidence from 0 to 1). ValueError without the detector's package (extra `language`)."""
    text = sample(text)
    if detector == "py3langid":
        code, confidence = _py3langid().classify(text)
        return code, float(confidence)
    best = _lingua().compute_language_confidence_values(text)[0]
    return best.language.iso_code_639_1.name.lower(), best.value


def known(detector: str) -> list[str]:
    """The codes that the detector can give, sorted."""
    if detector == "py3langid":
        return sorted(_py3langid().labels)
    return sorted(language.iso_code_639_1.name.lower() for language in require("lingua").Language.all())
