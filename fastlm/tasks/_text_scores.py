"""Figures of generated texts: ROUGE (Lin 2004), BLEU (Papineni et al. 2002), chrF (Popović 2015).

ROUGE is F1 in shares of 1, from the package rouge-score, without stemming, the mean over the texts. BLEU and chrF are
points of 100 over all texts together, from sacrebleu with its defaults: tokens 13a, exponential smoothing, chrF2.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.data._extras import require

ROUGE = ("rouge1", "rouge2", "rougeL")
_OF = {"rouge": ROUGE, "bleu": ("bleu",), "chrf": ("chrf",)}
_PACKAGES = {"rouge": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}
MEASURES = tuple(_OF)


def check_measures(setting: str, names: Sequence[str]) -> None:
    """ValueError for an unknown one, or where its package is missing. setting: the key that names them."""
    for name in names:
        if name not in _OF:
            raise ValueError(f"{setting}: expected some of {', '.join(MEASURES)}, by commas, got {name!r}")
        require(_PACKAGES[name], setting)


def figures_of(names: Sequence[str]) -> tuple[str, ...]:
    """("exact", "rouge1", ...) of ("rouge", ...)."""
    return ("exact", *(figure for name in names for figure in _OF[name]))


def text_scores(predicted: Sequence[str], wanted: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """{"exact": share of equal texts, white space at the ends aside, "rouge1": ..., ...} for the measures `names`."""
    pairs = list(zip(predicted, wanted, strict=True))
    scores = {"exact": sum(text.strip() == right.strip() for text, right in pairs) / len(pairs)}
    if "rouge" in names:
        scorer = require("rouge_score.rouge_scorer", "rouge").RougeScorer(list(ROUGE))
        found = [scorer.score(right, text) for text, right in pairs]
        scores |= {name: sum(one[name].fmeasure for one in found) / len(found) for name in ROUGE}
    if "bleu" in names:
        scores["bleu"] = require("sacrebleu", "bleu").corpus_bleu(list(predicted), [list(wanted)]).score
    if "chrf" in names:
        scores["chrf"] = require("sacrebleu", "chrf").corpus_chrf(list(predicted), [list(wanted)]).score
    return scores
