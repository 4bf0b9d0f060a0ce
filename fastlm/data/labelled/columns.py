"""Which columns of a table hold the texts and the labels."""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.data.labelled.records import Record, is_text

# Names that tables have, the first that is there is taken; two texts where there are two.
TEXTS = (
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("sentence",),
    ("review",),
    ("content",),
)
_LOOKED_AT = 1024  # rows whose columns are looked at: a line of JSON may leave one out
LABELS = (("label",), ("labels",), ("class",), ("category",), ("target",), ("score",))
TOKENS = (("tokens",), ("words",))
TAGS = (("tags",), ("ner_tags",), ("labels",))


class MissingColumn(ValueError):
    """No row has a column that is needed."""


def choose_columns(
    setting: str, asked: str, defaults: Sequence[tuple[str, ...]], rows: Sequence[Record], *, needed: bool = True
) -> tuple[str, ...]:
    """The columns that `asked` names, by commas; "" for the first of `defaults` that is there.

    setting  the key of the recipe, for messages, as "data.text"
    needed   False: () where no default is there
    MissingColumn where none of the first rows has it, with the place of the first and the columns that are there.
    """
    first = rows[0]
    there = list(dict.fromkeys(name for row in rows[:_LOOKED_AT] for name in row.values))
    if asked:
        names = tuple(name.strip() for name in asked.split(","))
        missing = [name for name in names if name not in there]
        if missing:
            raise MissingColumn(
                f'{setting}: expected a column "{missing[0]}" in {first.place}, found {_named(there)}; name one of them'
            )
        return names
    for names in defaults:
        if all(name in there for name in names):
            return names
    if not needed:
        return ()
    expected = " or ".join(" and ".join(f'"{name}"' for name in names) for names in defaults)
    raise MissingColumn(
        f"{setting}: expected a column {expected} in {first.place}, found {_named(there)}; name one with --set "
        f"{setting}=NAME"
    )


def _named(columns: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in columns[:12]) + (", ..." if len(columns) > 12 else "") or "none"


def text_of(record: Record, columns: Sequence[str]) -> tuple[str, ...] | str:
    """The texts of the columns; a string is the reason for which there are none."""
    texts = []
    for column in columns:
        value = record.values.get(column)
        if not isinstance(value, str):
            return f'no string in column "{column}"'
        if not value.strip():
            return f'empty text in column "{column}"'
        if not is_text(value):
            return f'not UTF-8 in column "{column}"'
        texts.append(value)
    return tuple(texts)
