"""The label that stands for "nothing to predict here", as in torch and Transformers."""

IGNORE_INDEX = -100
