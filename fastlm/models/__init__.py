"""Whole models that compute on packed sequences, and read and write checkpoints in Transformers' layout."""

from fastlm.models._cache import Cache, Generative
from fastlm.models._config import Config
from fastlm.models._model import Counts, Model
from fastlm.models.bert import Bert, BertConfig
from fastlm.models.bert_heads import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from fastlm.models.gpt2 import GPT2, GPT2Config
from fastlm.models.t5 import T5, T5Config

__all__ = [
    "GPT2",
    "T5",
    "Bert",
    "BertConfig",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "Cache",
    "Config",
    "Counts",
    "GPT2Config",
    "Generative",
    "Model",
    "T5Config",
]
