"""Text put aside in a temporary file: documents that are held out, and the sample that a tokenizer is trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from fastlm.data.tokenizer import chunks

_BUCKETS = 20  # bits of the hash by which a sample is cut to its size


class Spool:
    """Documents put aside while the others pass, so that the text is read and cleaned once.

    A context manager: the file at `path` is removed at its end.
    """

    def __init__(self, path: Path):
        self.path, self.count = path, 0

    def __enter__(self) -> Spool:
        self._file = open(self.path, "w+", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self.path.unlink()

    def put(self, entry: object) -> None:
        self.count += 1
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def entries(self) -> Iterator:
        self._file.seek(0)
        return map(json.loads, self._file)

    def take(self, texts: Iterable[str], chosen: Callable[[str], bool]) -> Iterator[str]:
        """The texts that are not chosen; the chosen ones are put aside."""
        for text in texts:
            if chosen(text):
                self.put(text)
            else:
                yield text


class Sample(Spool):
    """At most `limit` bytes (UTF-8) of the documents that are added, chosen by a hash of their text.

    size   bytes of the sample
    total  bytes of all that were added

    A document of more than 32,768 characters is chosen in parts, those of `fastlm.data.tokenizer.chunks`. The chosen
    ones have a hash below a bound, which falls while documents are added: their order does not matter. The file may
    hold `limit` · (1 + ln(total / limit)) bytes.
    """

    def __init__(self, path: Path, limit: int):
        super().__init__(path)
        self.limit, self.size, self.total = limit, 0, 0
        self._bound, self._bytes = 1 << _BUCKETS, np.zeros(1 << _BUCKETS, np.int64)

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            for part in chunks(text):
                data = part.encode()
                word = hashlib.blake2b(data, digest_size=8, person=b"tokenizer").digest()
                bucket = int.from_bytes(word, "big") >> (64 - _BUCKETS)
                self.total += len(data)
                if bucket < self._bound:
                    self._bytes[bucket] += len(data)
                    self.size += len(data)
                    self.put([bucket, part])
                    self._shrink()

    def _shrink(self) -> None:
        while self.size > self.limit:
            self._bound -= 1
            self.size -= int(self._bytes[self._bound])

    def texts(self) -> Iterator[str]:
        """The sample, in the order in which it was added."""
        return (part for bucket, part in self.entries() if bucket < self._bound)

    def __str__(self) -> str:
        if self.size == self.total:
            return f"all of the text, {self.total:,} bytes"
        return f"{self.size:,} of {self.total:,} bytes of the text, chosen by a hash"
