"""The table of Transformers' classes that are replaced or left. It holds names, so that nothing is imported."""

from __future__ import annotations

from fastlm.hf import modules
from fastlm.hf.loss import FusedLoss, FusedLossFunction, T5FusedLoss
from fastlm.hf.positions import OffsetPositions, Positions
from fastlm.hf.t5_attention import T5Attention

# model_type -> {class of transformers.models.<model_type>: (mixin, what it does)}
_BERT = {
    "SelfOutput": (modules.DenseAddNorm, "dropout, addition and LayerNorm in one pass"),
    "Output": (modules.DenseAddNorm, "dropout, addition and LayerNorm in one pass"),
    "Intermediate": (modules.Intermediate, "bias and GELU in one pass"),
}
_POSITIONS = "positions of packed rows, from cu_seq_lens_q"
MODULES = {
    "bert": {
        "BertModel": (Positions, _POSITIONS),
        **{f"Bert{name}": entry for name, entry in _BERT.items()},
        "BertPredictionHeadTransform": (modules.HeadTransform, "bias and GELU in one pass"),
    },
    "roberta": {
        "RobertaModel": (OffsetPositions, _POSITIONS),
        **{f"Roberta{name}": entry for name, entry in _BERT.items()},
        "RobertaLMHead": (modules.RobertaLMHead, "bias and GELU in one pass"),
    },
    "distilbert": {
        "DistilBertModel": (Positions, _POSITIONS),
        "TransformerBlock": (modules.DistilBertBlock, "addition and LayerNorm in one pass"),
        "FFN": (modules.DistilBertFFN, "bias and GELU in one pass"),
    },
    "modernbert": {
        "ModernBertEncoderLayer": (modules.ModernBertLayer, "addition and second LayerNorm in one pass"),
        "ModernBertMLP": (modules.ModernBertMLP, "activation and gate in one pass"),
        "ModernBertPredictionHead": (modules.ModernBertHead, "bias and GELU in one pass"),
    },
    "gpt2": {
        "GPT2Model": (Positions, _POSITIONS),
        "GPT2Block": (modules.GPT2Block, "addition and second LayerNorm in one pass"),
        "GPT2MLP": (modules.GPT2MLP, "bias and GELU in one pass"),
    },
    "t5": {
        "T5LayerNorm": (modules.T5LayerNorm, "RMSNorm"),
        "T5Attention": (T5Attention, "attention, the relative bias and its gradient inside"),
        "T5DenseGatedActDense": (modules.T5GatedDense, "activation and gate in one pass"),
    },
    "llama": {
        "LlamaDecoderLayer": (modules.LlamaLayer, "addition and second RMSNorm in one pass"),
        "LlamaRMSNorm": (modules.RMSNorm, "RMSNorm"),
        "LlamaMLP": (modules.LlamaMLP, "activation and gate in one pass"),
    },
}

# Classes that are replaced in every family: full name -> (mixin, what it does)
COMMON = {
    "torch.nn.modules.normalization.LayerNorm": (modules.LayerNorm, "LayerNorm"),
    "transformers.activations.GELUActivation": (modules.GELU, "GELU"),
    "transformers.activations.GELUTanh": (modules.TanhGELU, "GELU by tanh"),
    "transformers.activations.NewGELUActivation": (modules.TanhGELU, "GELU by tanh"),
    "transformers.activations.AccurateGELUActivation": (modules.TanhGELU, "GELU by tanh"),
    "transformers.activations.SiLUActivation": (modules.SiLU, "SiLU"),
    "torch.nn.modules.activation.SiLU": (modules.SiLU, "SiLU"),
}

LOSSES = {
    "BertForMaskedLM": FusedLoss,
    "RobertaForMaskedLM": FusedLoss,
    "DistilBertForMaskedLM": FusedLoss,
    "T5ForConditionalGeneration": T5FusedLoss,
    "BertLMHeadModel": FusedLossFunction,
    "RobertaForCausalLM": FusedLossFunction,
    "ModernBertForMaskedLM": FusedLossFunction,
    "GPT2LMHeadModel": FusedLossFunction,
    "LlamaForCausalLM": FusedLossFunction,
}

_EMBEDDINGS = "its lookups and their sum; its LayerNorm is replaced by itself"
# Classes that are left: class name -> reason
LEFT = {
    **dict.fromkeys(("BertEmbeddings", "RobertaEmbeddings", "Embeddings", "ModernBertEmbeddings"), _EMBEDDINGS),
    "T5DenseActDense": "no bias or gate to fuse; a GELU or SiLU in it is replaced by itself",
    "LlamaRotaryEmbedding": "fastlm has no rotary embedding",
    "ModernBertRotaryEmbedding": "fastlm has no rotary embedding",
    "BertPooler": "tanh of one token a row",
}


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def replacement(module, model_type: str):
    """(mixin, what it does); (None, the reason) for a module that is left; None for any other module."""
    cls = type(module)
    name = full_name(cls)
    if name in COMMON:
        return COMMON[name]
    prefix, _, last = name.rpartition(".")
    if not prefix.startswith(f"transformers.models.{model_type}."):
        return None
    if last in LEFT:
        return None, LEFT[last]
    mixin, what = MODULES[model_type].get(last, (None, None))
    if mixin is None:
        return None
    name = getattr(mixin, "act_name", None)
    if name and not _is_or_becomes(getattr(module, name), mixin.activations):
        known = " and ".join(known.__name__ for known in mixin.activations)
        return None, f"its activation is a {type(getattr(module, name)).__name__}; fastlm has {known}"
    return mixin, what


def _is_or_becomes(activation, mixins: tuple[type, ...]) -> bool:
    if isinstance(activation, mixins):
        return True
    mixin, _ = COMMON.get(full_name(type(activation)), (None, None))
    return mixin is not None and issubclass(mixin, mixins)
