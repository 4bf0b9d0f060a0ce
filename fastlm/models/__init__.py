"""Whole models, packed end to end; they read and write checkpoints in Transformers' layout."""

from fastlm.models.bert import Bert, BertConfig

__all__ = ["Bert", "BertConfig"]
