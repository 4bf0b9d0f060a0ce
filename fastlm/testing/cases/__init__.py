"""The OpCase of every op: one file per op. What an OpCase is stands in `_case.py`."""

from fastlm.testing.cases._case import OpCase, Variant
from fastlm.testing.cases.attention import ATTENTION
from fastlm.testing.cases.cross_entropy import CROSS_ENTROPY
from fastlm.testing.cases.dropout import DROPOUT
from fastlm.testing.cases.embedding import EMBEDDING
from fastlm.testing.cases.gelu import GELU
from fastlm.testing.cases.layer_norm import LAYER_NORM, RMS_NORM
from fastlm.testing.cases.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from fastlm.testing.cases.mlm_mask import MLM_MASK

CASES: dict[str, OpCase] = {
    case.op: case
    for case in (
        ATTENTION,
        LAYER_NORM,
        RMS_NORM,
        CROSS_ENTROPY,
        LINEAR_CROSS_ENTROPY,
        MLM_MASK,
        GELU,
        EMBEDDING,
        DROPOUT,
    )
}

__all__ = ["CASES", "OpCase", "Variant"]
