"""Token ids on disk, in parts that any number of processes make: a stage of a large preparation (`fastlm.data.stages`).

A token file has the ids of a part's documents one after another, in the smallest unsigned type that holds the
vocabulary, then as .npy arrays their lengths (documents,) int64 and the counts (`Counts.as_array`), and last in 8 bytes
where the two begin. It is written, and read, in constant memory whatever the part's size.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastlm.data.counts import Counts
from fastlm.data.selection import HELD_OUT, TRAINED
from fastlm.data.stages import CleanedText, part_file, texts_of
from fastlm.data.tokenizer import Tokenizer

_BLOCK = 1 << 20  # ids that are read at once


@dataclass(frozen=True)
class TokenTask:
    """A part of cleaned text that one process tokenises.

    source      of the text; codes: (documents,) uint8, of `fastlm.data.selection.choose`
    tokenizer   its directory
    path        the token file of the documents that are trained on, written last; held_out: that of the others
    size        of the part in the source, in bytes
    """

    source: Path
    codes: np.ndarray
    tokenizer: Path
    path: Path
    size: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def held_out(self) -> Path:
        return self.path.with_suffix(".held-out")


def token_tasks(text: CleanedText, codes: list[np.ndarray], tokenizer: Path) -> list[TokenTask]:
    """A task for each part of the cleaned text."""
    return [
        TokenTask(task.path, of_part, tokenizer, task.path.with_suffix(".tokens"), task.size)
        for task, of_part in zip(text.tasks, codes, strict=True)
    ]


def tokenise(task: TokenTask) -> TokenTask:
    """Write the token files of a part."""
    tokenizer = _loaded(task.tokenizer)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    for code, path in ((HELD_OUT, task.held_out), (TRAINED, task.path)):
        if code == HELD_OUT and not (task.codes == HELD_OUT).any():
            continue
        counts, lengths = Counts(tokenizer), array("q")
        with part_file(path, "wb") as file:
            for ids in counts.encode(texts_of(task.source, task.codes, code)):
                lengths.append(len(ids))
                file.write(ids.astype(dtype))
            at = file.tell()
            np.save(file, np.array(lengths))
            np.save(file, counts.as_array())
            file.write(at.to_bytes(8, "little"))
    return task


@lru_cache(1)
def _loaded(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def read_tokens(path: Path, counts: Counts) -> Iterator[np.ndarray]:
    """The ids (n,) of each document in a token file, which counts are added to `counts`."""
    dtype = np.min_scalar_type(counts.tokenizer.vocab_size - 1)
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        file.seek(int.from_bytes(file.read(8), "little"))
        lengths = np.load(file, allow_pickle=False)
        counts.add(np.load(file, allow_pickle=False))
        file.seek(0)
        ends, document, start = np.cumsum(lengths), 0, 0
        while document < len(lengths):
            last = max(document + 1, int(np.searchsorted(ends, start + _BLOCK, "right")))
            block = np.fromfile(file, dtype, int(ends[last - 1]) - start)
            yield from np.split(block, ends[document : last - 1] - start)
            document, start = last, int(ends[last - 1])
