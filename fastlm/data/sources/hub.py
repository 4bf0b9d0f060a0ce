"""Hugging Face datasets by name, written to local JSONL shards before anything reads them.

    hf:owner/name?config=en&split=train&revision=main

The shards have the columns of strings; `fields` of `read_documents` says which is the text. They are written one after
another, `SHARD_ROWS` rows each, whole or absent. After each one the position of the stream is saved. A download that is
killed continues after its last shard, and a finished one is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qsl

from fastlm.data._extras import require
from fastlm.data.sources.files import SourceFile
from fastlm.storage import atomic_file, json_checksum, replace_json

PREFIX = "hf:"
SHARD_ROWS = 10_000

_KEYS = {"config": None, "split": "train", "revision": None}


def parse(given: str) -> dict[str, str | None]:
    """The parts of "hf:owner/name?key=value&...": name, config, split, revision. ValueError for another key."""
    name, _, query = given.removeprefix(PREFIX).partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    wrong = [key for key, value in pairs if key not in _KEYS or not value]
    if not name or wrong or (query and not pairs):
        raise ValueError(f"data: expected hf:owner/name?split=train with any of {', '.join(_KEYS)}, got {given}")
    return {"name": name, **_KEYS, **dict(pairs)}


def materialise(given: str, spool: Path) -> list[SourceFile]:
    """The shards of the dataset `given`, in a directory of its own in `spool`; downloaded where they are not yet."""
    source = parse(given)
    folder = spool / f"hf-{json_checksum(source)[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "state.json"
    state = {"source": source, "shards": 0, "stream": None, "complete": False}
    if state_file.exists():
        state = json.loads(state_file.read_text(encoding="utf-8"))
    if not state["complete"]:
        for after in _download(source, state, folder):
            replace_json(state_file, after)
            state = after
    paths = [_shard(folder, index) for index in range(state["shards"])]
    return [SourceFile(f"{source['name']}/{path.name}", path, path.stat().st_size) for path in paths]


def _shard(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.jsonl"


def _download(source: dict, state: dict, folder: Path) -> Iterator[dict]:
    """Write the shards that are missing; the state after each one."""
    datasets = require("datasets")
    rows = datasets.load_dataset(
        source["name"], source["config"], split=source["split"], revision=source["revision"], streaming=True
    )
    if state["stream"] is not None:
        rows.load_state_dict(state["stream"])
    stream = iter(rows)
    shards = state["shards"]
    while batch := list(islice(stream, SHARD_ROWS)):
        with atomic_file(_shard(folder, shards)) as partial, open(partial, "w", encoding="utf-8") as file:
            for row in batch:
                strings = {name: value for name, value in row.items() if isinstance(value, str)}
                file.write(json.dumps(strings) + "\n")
        shards += 1
        state = {**state, "shards": shards, "stream": rows.state_dict()}
        yield state
    yield {**state, "complete": True}
