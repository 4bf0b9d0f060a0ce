"""The ops. Each file: the maths, a reference, the schema, autograd, the public function; start there."""

from fastlm.ops._labels import IGNORE_INDEX
from fastlm.ops.attention import RelativeBias, attention, attention_reference
from fastlm.ops.cross_entropy import cross_entropy, cross_entropy_reference
from fastlm.ops.dropout import dropout, dropout_reference
from fastlm.ops.embedding import embedding, embedding_reference
from fastlm.ops.gelu import gelu, gelu_reference
from fastlm.ops.layer_norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from fastlm.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fastlm.ops.mlm_mask import MaskedTokens, mlm_mask, mlm_mask_reference

__all__ = [
    "IGNORE_INDEX",
    "MaskedTokens",
    "RelativeBias",
    "attention",
    "attention_reference",
    "cross_entropy",
    "cross_entropy_reference",
    "dropout",
    "dropout_reference",
    "embedding",
    "embedding_reference",
    "gelu",
    "gelu_reference",
    "layer_norm",
    "layer_norm_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "mlm_mask",
    "mlm_mask_reference",
    "rms_norm",
    "rms_norm_reference",
]
