"""Modules with torch.nn's names, arguments, defaults and state_dict keys, on fastlm's ops.

An unsupported argument is a ValueError that names an alternative.
"""

from fastlm.nn.attention import MultiheadAttention
from fastlm.nn.dropout import Dropout
from fastlm.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from fastlm.nn.masking import MLMMasking
from fastlm.nn.mlp import MLP
from fastlm.nn.normalization import LayerNorm, RMSNorm
from fastlm.nn.transformer import TransformerEncoderLayer

__all__ = [
    "MLP",
    "CrossEntropyLoss",
    "Dropout",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MLMMasking",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerEncoderLayer",
]
