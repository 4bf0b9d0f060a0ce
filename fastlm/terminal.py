"""Text for a terminal: lines are broken between words, never inside one. Files and pipes get lines as they are."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TextIO


def width_of(stream) -> int | None:
    """Columns of the terminal that `stream` writes to; COLUMNS overrides it. None for a file or a pipe."""
    if not stream.isatty():
        return None
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"])
    return os.get_terminal_size(stream.fileno()).columns


def wrap(text: str, width: int | None) -> str:
    """`text` in lines of at most `width` columns; a longer word, as a path, stays whole. None: unchanged.

    What follows of an indented line is indented by two columns more.
    """
    if not width:
        return text
    return "\n".join(_broken(line, width) if len(line) > width else line for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    indent = len(line) - len(line.lstrip(" "))
    hanging = " " * (indent + 2 if indent else 0)
    return textwrap.fill(line, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def fit(fields: list[str], width: int) -> str:
    """The first fields that fit into `width` columns, two spaces between them; always the first one."""
    text = fields[0]
    for field in fields[1:]:
        if len(text) + 2 + len(field) > width:
            break
        text += f"  {field}"
    return text


def say(text: str, stream: TextIO | None = None) -> None:
    """Print text, wrapped to the width of the stream, standard output by default."""
    stream = stream or sys.stdout
    print(wrap(text, width_of(stream)), file=stream)
