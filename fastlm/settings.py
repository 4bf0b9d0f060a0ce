"""Keys of recipes and model configurations: a default, a meaning, the type and the range of a value.

Fields of frozen dataclasses: `lr: float = key(1e-3, "peak learning rate", above=0.0)`. Their modules need
`from __future__ import annotations`: types are read as they are written.
"""

from __future__ import annotations

import math
import operator
from dataclasses import Field, field, fields
from typing import ClassVar

AUTO = "auto"  # the value of a key that the machine decides, before the first step of a run

_KINDS = {"bool": bool, "int": int, "float": float, "str": str}
_WORDS = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "a string"}
_HOLDS = {"at least": operator.ge, "more than": operator.gt, "at most": operator.le, "less than": operator.lt}


def key(
    default,
    doc: str,
    *,
    least=None,
    above=None,
    most=None,
    below=None,
    one_of: tuple = (),
    several: bool = False,
    word: str = "",
):
    """A field with its default, its meaning, and the values that it may have.

    several: a string of values by commas, which may also be given as a list, or as one number
    word: of a number, the one string that may stand in its place
    """
    bounds = {"at least": least, "more than": above, "at most": most, "less than": below}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    metadata = {"doc": doc, "bounds": bounds, "one_of": one_of, "several": several, "word": word}
    return field(default=default, metadata=metadata)


def meaning(of: Field) -> str:
    return of.metadata.get("doc", "")


def typed(name: str, value, of: Field):
    """`value`, read from a file or a command line, in the field's type. ValueError where it has another."""
    kind, _, alternative = of.type.partition(" | ")
    if value is None and alternative == "None":
        return None
    if (word := of.metadata.get("word")) and value == word:
        return value
    alternative = "" if word else alternative
    if of.metadata.get("several") and type(value) in (list, int, float):
        value = ",".join(map(str, value if type(value) is list else [value]))
    if kind == "float" and type(value) is int:
        return float(value)
    if kind == "int" and type(value) is float and value.is_integer():
        return int(value)  # 1e6
    if type(value) is not _KINDS[kind] and type(value) is not _KINDS.get(alternative):
        words = " or ".join([*(_WORDS[k] for k in (kind, alternative) if k in _WORDS), *([repr(word)] if word else [])])
        raise ValueError(f"{name}: expected {words}, got {value!r}")
    return value


class Table:
    """Base of a table of a recipe: a frozen dataclass of keys, whose ranges are checked when it is made.

    table: its name in a recipe.
    """

    table: ClassVar[str]

    def __post_init__(self):
        for of in fields(self):
            _check_range(f"{self.table}.{of.name}", getattr(self, of.name), of.metadata)


def _check_range(name: str, value, meta) -> None:
    if value in (math.inf, -math.inf):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if meta["one_of"] and value not in meta["one_of"]:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, meta['one_of']))}, got {value!r}")
    bounds = {} if meta["word"] and value == meta["word"] else meta["bounds"]
    if not all(_HOLDS[words](value, bound) for words, bound in bounds.items()):
        raise ValueError(f"{name}: expected {' and '.join(f'{w} {b}' for w, b in bounds.items())}, got {value}")
