"""The base of the models' configurations: it reads, writes and checks the entries of config.json."""

from __future__ import annotations

import math
from dataclasses import Field, asdict, fields
from typing import ClassVar

# an activation in config.json -> `approximate` of ops.gelu
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


LARGEST = 2**28  # of an integer entry: the bytes of a matrix of two of them, thrice, still fit into int64
DEEPEST = 10_000  # layers: more take minutes to build even where each is tiny; the deepest published has 1,000


class Config:
    """Base of the frozen dataclasses whose fields are entries of config.json, with Transformers' names and defaults.

    model_type: Transformers' name of the family.
    fixed: entries that must have these values, or be absent: what the model does not do.
    decided: entries that the tokenizer or the head decides. The others are keys of a recipe's [model] table, with the
        meaning that fastlm.settings.key gives them.
    length: the entry that bounds a sequence's length; None where nothing does.
    attention_dropout: the entry with the dropout of attention.
    depths: the entries that count layers.
    """

    model_type: ClassVar[str]
    fixed: ClassVar[dict[str, object]]
    decided: ClassVar[tuple[str, ...]]
    length: ClassVar[str | None] = None
    attention_dropout: ClassVar[str]
    depths: ClassVar[tuple[str, ...]]

    @classmethod
    def settings(cls) -> list[Field]:
        """The entries that a recipe has."""
        return [field for field in fields(cls) if field.name not in cls.decided]

    @property
    def longest(self) -> tuple[str, int] | None:
        """The entry that bounds a sequence's length, and its value."""
        return None if self.length is None else (self.length, getattr(self, self.length))

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{field.name}: expected a positive integer, got {value!r}")
            if field.type == "float" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{field.name}: expected a number that is not negative, got {value!r}")
            most = DEEPEST if field.name in self.depths else LARGEST
            if isinstance(value, int) and value > most and field.type.startswith("int"):
                raise ValueError(f"{field.name}: expected at most {most}, got {value}")

    def _check_id(self, name: str) -> None:
        """ValueError for a token id outside the vocabulary. None means that there is no such id."""
        value = getattr(self, name)
        if value is not None and not (isinstance(value, int) and 0 <= value < self.vocab_size):
            raise ValueError(f"{name}: expected None or an id below vocab_size={self.vocab_size}, got {value!r}")

    @classmethod
    def from_dict(cls, config: dict) -> Config:
        """From the content of a config.json. Entries without a field are ignored; ValueError for another model."""
        for name, want in cls.fixed.items():
            if config.get(name, want) != want:
                raise ValueError(f"{name}: expected {want!r}, as in the model's paper, got {config[name]!r}")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def to_dict(self) -> dict:
        """The content of a config.json, without `architectures` and `dtype`, which the model adds."""
        return {"model_type": self.model_type, **asdict(self)}
