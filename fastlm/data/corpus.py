"""A corpus that every machine has: the documentation of the Python that runs this, as prose.

Docstrings and comments of the standard library, the language reference that `help()` prints, the docstrings of the
built-in modules, then the same of the installed packages with their descriptions and text files, up to a limit.
Code examples, tables and licence boilerplate are left out. The standard library alone gives more than 2 MB.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fastlm.storage import atomic_file

# One pass over a source: every string and comment, so that a quote inside one cannot start another. A docstring is a
# triple-quoted string with nothing before it on its line. ast finds the same at a tenth of the speed (2 against
# 18 MB/s), and no comments.
_TOKEN = re.compile(
    r'''
      ^[ \t]*[rRuU]?(?:"""(?P<double>[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*)"""
                      |\'\'\'(?P<single>[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*)\'\'\')
    | ^(?P<comments>(?:[ \t]*\#[^\n]*\n)+)
    | """[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""
    | \'\'\'[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*\'\'\'
    | "[^"\\\n]*(?:\\.[^"\\\n]*)*"
    | '[^'\\\n]*(?:\\.[^'\\\n]*)*'
    | \#[^\n]*
    ''',
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_PROSE_SUFFIXES = {".txt", ".rst", ".md"}
_SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "testing", "site-packages", "dist-packages", "lib-dynload"}

_COMMENT = re.compile(r"^[ \t]*#+[:!]?[ ]?", re.MULTILINE)
_ROLE = re.compile(r":[a-z][a-z:+-]*:(?=`)")  # :class:`Path` -> `Path`
_TARGET = re.compile(r"`~?([^`<\n]*?)(?:\s*<[^`\n]*>)?`_*")  # `text <link>`_ -> text
_LINK = re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)")  # Markdown's [text](link) -> text
_MARKUP = re.compile(r"`+|\*\*|^[ \t]*(?:[-=~^*+#\"']{3,}|\.\. [\w-]+::.*)[ \t]*$", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z]{2,}")
_CODE = re.compile(r"[=<>{}\[\]|\\@$%^~_/#]")


def prose(text: str) -> list[str]:
    """The paragraphs of `text` that read as prose, a line each, without markup."""
    text = _MARKUP.sub("", _TARGET.sub(r"\1", _ROLE.sub("", _LINK.sub(r"\1", text.replace("``", "`")))))
    paragraphs = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if paragraph.lstrip().startswith(">>>"):
            continue  # a doctest, with the output after it
        line = " ".join(paragraph.split())
        words = sum(map(len, _WORD.findall(line)))
        # Five letters in eight, and little of what code is made of: measured by eye on the standard library.
        if len(line) >= 40 and words >= 0.58 * len(line) and len(_CODE.findall(line)) <= 0.05 * len(line):
            paragraphs.append(line)
    return paragraphs


def _python_source(source: str) -> list[str]:
    paragraphs = []
    for match in _TOKEN.finditer(source):
        if match.lastgroup == "comments":
            paragraphs += prose(_COMMENT.sub("", match["comments"]))
        elif match.lastgroup:
            paragraphs += prose(inspect.cleandoc(match[match.lastgroup]))
    return paragraphs


def _built_in() -> Iterator[tuple[str, str]]:
    """The docstrings of what is written in C: (module name, text)."""
    for name in sorted(sys.builtin_module_names):
        module = builtins if name == "builtins" else importlib.import_module(name)
        docs = [module.__doc__]
        for _, value in sorted(vars(module).items()):
            docs.append(value.__doc__ if callable(value) else None)
            if isinstance(value, type) and value.__module__ == name:
                docs += [getattr(member, "__doc__", None) for _, member in sorted(vars(value).items())]
        yield name, "\n\n".join(inspect.cleandoc(doc) for doc in docs if isinstance(doc, str))


def _files(root: Path) -> Iterator[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names]
    return iter(sorted(found, key=lambda path: path.relative_to(root).parts))


def _documents() -> Iterator[tuple[str, list[str]]]:
    """(name, paragraphs) of everything there is, in a fixed order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out, and help() does without it too
        topics = {}
    for name, text in sorted(topics.items()):
        yield f"help/{name}", prose(text)
    for name, text in _built_in():
        yield f"builtin/{name}", prose(text)
    roots = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    for root in dict.fromkeys(Path(os.path.realpath(root)) for root in roots):
        for path in _files(root):
            is_text = path.suffix in _PROSE_SUFFIXES or path.name == "METADATA"
            if path.suffix != ".py" and not is_text:
                continue
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue  # not prose that can be read; the rest is plenty
            yield path.relative_to(root).as_posix(), prose(text) if is_text else _python_source(text)


def python_documentation(path, *, max_bytes: int = 10_000_000) -> int:
    """Write the corpus as JSON lines ({"text", "source"}, one file of documentation a line) to `path`, a `.jsonl`.

    Stops after `max_bytes` of text; returns how many bytes of text were written. A paragraph occurs once. The file is
    replaced whole, and depends on the Python installation alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen, written = set(), 0
    with atomic_file(path, what="the corpus", need=max_bytes) as partial, open(partial, "w", encoding="utf-8") as file:
        for source, paragraphs in _documents():
            fresh = []
            for paragraph in paragraphs:
                digest = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
                if digest not in seen:
                    seen.add(digest)
                    fresh.append(paragraph)
            if fresh:
                text = "\n\n".join(fresh)
                file.write(json.dumps({"text": text, "source": source}) + "\n")
                written += len(text.encode())
            if written >= max_bytes:
                break
    return written
