"""The label of a token that is not predicted, as in torch and Transformers."""

IGNORE_INDEX = -100
