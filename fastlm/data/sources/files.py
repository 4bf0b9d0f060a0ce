"""What a source file is: its name, kind and compression, by its suffixes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
KINDS = {
    "json": {".jsonl", ".ndjson", ".json"},
    "text": {".txt", ".md", ".rst", ".text"},
    "csv": {".csv", ".tsv"},
    "parquet": {".parquet"},
    "arrow": {".arrow"},
}
OTHER_TABLES = {".tab", ".psv", ".feather", ".xlsx", ".xls", ".ods"}
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"  # the two make a directory the output of `fastlm prepare`
RUN_FILES = "recipe.json", "metrics.jsonl"  # the two make a directory that of a training run
SAVED_SPLIT = "state.json", "dataset_info.json"  # the two make a directory a split that `datasets` saved
SAVED_SPLITS = "dataset_dict.json"  # it makes a directory one of such splits, each a directory

KIND_OF = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}


@dataclass(frozen=True)
class SourceFile:
    """A file to read; `name` is its place as reports give it, relative to the directory the user named."""

    name: str
    path: Path
    size: int  # bytes on disk

    @property
    def compression(self) -> str:
        """ "gzip", "zstd" or "", by the last suffix."""
        return COMPRESSIONS.get(self.path.suffix.lower(), "")

    @property
    def kind(self) -> str:
        """ "json", "text", "csv", "parquet" or "arrow", by the suffix before that of a compression; else "text"."""
        return KIND_OF.get(inner_suffix(self.path), "text")

    @property
    def delimiter(self) -> str:
        """What separates the columns of a CSV file: a tab where the suffix is .tsv."""
        return "\t" if inner_suffix(self.path) == ".tsv" else ","


def inner_suffix(path: Path) -> str:
    """The suffix in lower case, without that of a compression: ".jsonl" of "a.JSONL.gz"."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()


def label(name: str) -> str:
    """A file's name as text: on Linux it is bytes, and may be no UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")
