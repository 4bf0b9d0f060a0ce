"""The sample of the text that a tokenizer is trained on: bounded, and chosen by a hash."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

_BUCKETS = 20  # bits of the hash by which a sample is cut to its size


class Sample:
    """At most `limit` bytes (UTF-8) of the texts that are added, chosen by a hash, in a temporary file.

    size   bytes of the sample
    total  bytes of all that were added

    The chosen texts have a hash below a bound, which falls while texts are added: their order does not matter. The
    file, in `directory` or where the system has temporary files, may hold `limit` · (1 + ln(total / limit)) bytes.
    """

    def __init__(self, limit: int, directory=None):
        self.limit, self.size, self.total = limit, 0, 0
        self._directory = directory
        self._bound, self._bytes = 1 << _BUCKETS, np.zeros(1 << _BUCKETS, np.int64)

    def __enter__(self) -> Sample:
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8", dir=self._directory)
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            data = text.encode()
            word = hashlib.blake2b(data, digest_size=8, person=b"tokenizer").digest()
            bucket = int.from_bytes(word, "big") >> (64 - _BUCKETS)
            self.total += len(data)
            if bucket < self._bound:
                self._bytes[bucket] += len(data)
                self.size += len(data)
                self._file.write(json.dumps([bucket, text], ensure_ascii=False) + "\n")
                while self.size > self.limit:
                    self._bound -= 1
                    self.size -= int(self._bytes[self._bound])

    def texts(self) -> Iterator[str]:
        """The sample, in the order in which it was added."""
        self._file.seek(0)
        entries = map(json.loads, self._file)
        return (text for bucket, text in entries if bucket < self._bound)
