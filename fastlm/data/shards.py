"""Prepared data on disk: memory-mapped shards of packed rows, and the manifest that vouches for them.

    OUT/manifest.json            counts, settings, report, and a checksum for every shard
    OUT/tokenizer/               in Transformers' layout
    OUT/00000.tokens.npy         (rows, width) the smallest unsigned type that holds the vocabulary
    OUT/00000.offsets.npy        (rows + 1,) int64
    OUT/00000.pieces.npy         (pieces, 2 or 3) int64; see `fastlm.data.packing.Shard`
    OUT/validation-00000...      the same of text that is held out

Rows are numbered through the accepted shards in the manifest's order. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastlm.data.packing import Shard, ragged
from fastlm.data.sources import MANIFEST, TOKENIZER
from fastlm.data.tokenizer import Tokenizer
from fastlm.storage import file_checksum, json_checksum

FORMAT = "fastlm rows"
VERSION = 2
SPLITS = ("train", "validation")


def _paths(directory: Path, name: str) -> list[Path]:
    return [directory / f"{name}.{part}.npy" for part in ("tokens", "offsets", "pieces")]


def write_shard(directory: Path, name: str, shard: Shard) -> dict:
    """Write `shard` under `name`; its entry in the manifest."""
    paths = _paths(directory, name)
    for path, array in zip(paths, (shard.tokens, shard.offsets, shard.pieces), strict=True):
        np.save(path, array, allow_pickle=False)
    return {
        "name": name,
        "rows": len(shard.tokens),
        "pieces": len(shard.pieces),
        "used": list(shard.used),
        "checksum": file_checksum(*paths),
    }


def remedy(directory: Path) -> str:
    """What to do about damage that nothing can be restored from."""
    return f"delete {directory} and prepare the data again"


def tokenizer_checksum(directory: Path) -> str:
    """Of the tokenizer's files as they lie there. OSError where one is missing."""
    return file_checksum(*(directory / TOKENIZER / name for name in ("tokenizer.json", "tokenizer_config.json")))


def read_manifest(directory: Path) -> dict:
    """The manifest in `directory`, checked. ValueError where it is missing, damaged, or of another version."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"data: expected a directory that `fastlm prepare` wrote, but {path} does not exist")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"], manifest["version"]
        whole = manifest.pop("checksum") == json_checksum(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data: {path} is damaged ({error!r}); {remedy(directory)}") from error
    if found != (FORMAT, VERSION):
        raise ValueError(f"data: {path} has format {found}, expected {(FORMAT, VERSION)}; {remedy(directory)}")
    if not whole:
        raise ValueError(f"data: {path} does not match its own checksum; {remedy(directory)}")
    return manifest


class Dataset:
    """Prepared rows, open for reading. Make one with `open_dataset`.

    rows             how many, over the accepted shards
    row_tokens       the recipe's length of each
    width            cells of each, as stored; more than row_tokens for span rows, before their corruption
    layout           "masked", "causal" or "span"; `fastlm.data.layouts`
    max_pieces       the most pieces that one holds, the padding at its end counted as one
    fill             share of the rows that is no padding; with span rows, of the encoder's and of the decoder's
    documents, text_tokens, text_bytes     of the text as a whole; the bytes in UTF-8
    accepted         {shard name: checksum}, in order: a checkpoint stores it, a resume passes it to open_dataset
    set_aside        {shard name: reason}
    unigram_entropy  in nats, of the corpus's tokens, special ones aside: the loss of a model that knows frequencies
    tokenizer        the Tokenizer it was prepared with
    manifest         everything else that preparation recorded
    """

    def __init__(
        self, directory: Path, manifest: dict, accepted: dict[str, str], set_aside: dict[str, str], split: str
    ):
        self.directory, self.manifest, self.split = directory, manifest, split
        self.accepted, self.set_aside = accepted, set_aside
        self.row_tokens: int = manifest["row_tokens"]
        self.width: int = manifest["width"]
        self.layout: str = manifest["settings"]["layout"]
        part = _part(manifest, split)
        self.documents: int = part["documents"]
        self.fill: list[float] = part["fill"]
        self.text_bytes: int = part["text_bytes"]
        self.text_tokens: int = part["text_tokens"]
        self.unigram_entropy: float = part["unigram_entropy"]
        self.tokenizer = Tokenizer.load(directory / TOKENIZER)
        self._shards = [
            Shard(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in _paths(directory, name)))
            for name in accepted
        ]
        # (shards + 1,) the number of each shard's first row, and after the last the number of rows
        self._first = np.cumsum([0] + [len(shard.tokens) for shard in self._shards])
        self.rows = int(self._first[-1])
        self.max_pieces = max(int(np.diff(shard.offsets).max()) for shard in self._shards)

    def shards(self) -> Iterator[Shard]:
        """The accepted shards in the rows' order, memory-mapped."""
        return iter(self._shards)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the rows numbered `rows` (k,): tokens (k, width), how many pieces in each (k,), the pieces (p, 2 or 3)."""
        home = np.searchsorted(self._first, rows, side="right") - 1
        places = [(index, np.flatnonzero(home == index)) for index in np.unique(home)]
        places = [(self._shards[index], at, rows[at] - self._first[index]) for index, at in places]
        tokens = np.empty((len(rows), self.width), self._shards[0].tokens.dtype)
        counts = np.empty(len(rows), np.int64)
        for shard, at, local in places:
            tokens[at] = shard.tokens[local]
            counts[at] = shard.offsets[local + 1] - shard.offsets[local]
        ends = np.cumsum(counts)
        pieces = np.empty((ends[-1] if len(ends) else 0, self._shards[0].pieces.shape[1]), np.int64)
        for shard, at, local in places:
            pieces[ragged(ends[at] - counts[at], counts[at])] = shard.pieces[ragged(shard.offsets[local], counts[at])]
        return tokens, counts, pieces


def _part(manifest: dict, split: str) -> dict:
    return manifest if split == "train" else manifest["validation"]


def open_dataset(
    directory, accepted: dict[str, str] | None = None, *, strict: bool = False, split: str = "train"
) -> Dataset:
    """Open what `prepare` wrote, after checking every shard's checksum.

    accepted   None: a shard that fails is set aside with a warning, or, if `strict`, raises.
               A dict from `Dataset.accepted` (a checkpoint's): exactly those shards, and any that fails raises.
    split      "train", or "validation": the text that was held out

    ValueError where a manifest, a tokenizer or (as above) a shard is missing or damaged, or no shard is left.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    # The files' checksum, not Tokenizer.hash: a later release of `tokenizers` may write the same rules in other words.
    try:
        found = tokenizer_checksum(directory)
    except OSError as error:
        raise ValueError(f"data: {error.filename}: {error.strerror}; {remedy(directory)}") from error
    if found != manifest["tokenizer"]["checksum"]:
        raise ValueError(
            f"data: {directory / TOKENIZER} is not the one the data was prepared with; restore it, or "
            f"{remedy(directory)}"
        )
    if split not in SPLITS:
        raise ValueError(f"split: expected {' or '.join(SPLITS)}, got {split!r}")
    checksums = {shard["name"]: shard["checksum"] for shard in _part(manifest, split)["shards"]}
    if not checksums:
        raise ValueError(
            f"data: {directory} holds no {split} rows; prepare it again with a validation text or a validation_share"
        )
    if accepted is not None:
        for name, checksum in accepted.items():
            if checksums.get(name) != checksum:
                raise ValueError(
                    f"data: the run was started on a shard {name} that {directory} does not list; resume with the data "
                    "it was started on"
                )
        checksums = {name: checksum for name, checksum in checksums.items() if name in accepted}
    good, bad = {}, {}
    for name, checksum in checksums.items():
        if reason := _damage(directory, name, checksum):
            bad[name] = reason
        else:
            good[name] = checksum
    reasons = "; ".join(f"shard {name}: {reason}" for name, reason in bad.items())
    if bad and (strict or accepted is not None):
        raise ValueError(f"data: in {directory}, {reasons}; restore it, or {remedy(directory)}")
    if not good:
        raise ValueError(f"data: no shard in {directory} can be used ({reasons}); {remedy(directory)}")
    if bad:
        message = f"data: set aside, and not trained on, in {directory}: {reasons}; restore it, or {remedy(directory)}"
        warnings.warn(message, stacklevel=2)
    return Dataset(directory, manifest, good, bad, split)


def _damage(directory: Path, name: str, checksum: str) -> str | None:
    """Why the shard cannot be used, or None."""
    try:
        found = file_checksum(*_paths(directory, name))
    except OSError as error:
        return f"{os.path.basename(error.filename)}: {error.strerror}"
    return None if found == checksum else f"checksum {found[:12]}, expected {checksum[:12]}"
