"""What a large preparation will take, from a sample of its text: disk, and the time of cleaning."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlm.data.cleaning import Cleaner, clean_text
from fastlm.data.duplicates import signature
from fastlm.data.sources import Report, read_documents
from fastlm.data.stages import Task, text_line

SAMPLED = 4  # tasks, spread over all
SAMPLE_BYTES = 256 << 10  # of text of each: together under a second at 1.5 MB/s
EXPANSION = 4  # bytes of text for one of a compressed file or a Parquet file: prose in gzip and zstd has 2.5 to 5
TOKEN_BYTES = 4.0  # of text for a token of two bytes: English by a vocabulary of 8k to 50k has 3.8 to 4.6


@dataclass(frozen=True)
class Estimate:
    """text, parts, rows in bytes, the last two on disk; seconds of one process for cleaning.

    parts: of cleaned text. The token files are as large as the rows.
    """

    text: int
    parts: int
    rows: int
    seconds: float

    def line(self, out: Path, processes: int | None) -> str:
        """One line, which says where the disk of `out` has too little room. processes: None where it is not known."""
        place = out.absolute()
        while not place.exists():
            place = place.parent
        parts = self.parts + self.rows
        free, need = shutil.disk_usage(place).free, parts + self.rows
        seconds = math.ceil(self.seconds / (processes or 1))
        takes = f"{seconds} s" if seconds < 100 else f"{seconds / 60:,.1f} minutes"
        where = {None: "divided by the cluster's cores", 1: "in one process"}.get(
            processes, f"in {processes} processes"
        )
        return (
            f"about {_bytes(self.text)} of text: cleaning takes about {takes} {where}; disk: about {_bytes(parts)} of "
            f"parts until the end and {_bytes(self.rows)} of rows, {_bytes(free)} are free"
            + (", too few" if need > free else "")
        )


def _bytes(count: int) -> str:
    """999 kB, 12.3 MB, 45.6 GB."""
    unit = next((power for power in (9, 6) if count >= 10**power), 3)
    digits = 0 if unit == 3 else 1
    return f"{count / 10**unit:,.{digits}f} {({3: 'kB', 6: 'MB', 9: 'GB'})[unit]}"


def estimate(tasks: Sequence[Task]) -> Estimate | None:
    """Of the tasks, scaled from some documents of four of them; None where these have no text."""
    if not tasks:
        return None
    text = sum(_text_bytes(task) for task in tasks)
    sampled = kept = written = 0
    began = time.perf_counter()
    for task in tasks[:: -(-len(tasks) // SAMPLED)]:
        of_task = _sample(task)
        sampled, kept, written = sampled + of_task[0], kept + of_task[1], written + of_task[2]
    if not sampled:
        return None
    seconds = time.perf_counter() - began
    rows = text * (kept / sampled) / TOKEN_BYTES * 2
    return Estimate(text, int(text * written / sampled), int(rows), seconds * text / sampled)


def _text_bytes(task: Task) -> int:
    return task.size + (EXPANSION - 1) * task.packed


def _sample(task: Task) -> tuple[int, int, int]:
    """Bytes of text that were cleaned, of what was kept of it, and of the part files that come of it."""
    reading, sampled, kept = task.reading, 0, []
    cleaner = None if reading.plain else Cleaner(reading.cleaning)
    for place, text in read_documents(task.parts, reading.documents, Report(), fields=reading.fields):
        text = text[: SAMPLE_BYTES - sampled]  # at most: a character has a byte or more
        sampled += len(text.encode("utf-8", "surrogatepass"))
        became = clean_text(text) if cleaner is None else cleaner(text)[0]
        if became:
            kept.append((place, became))
        if sampled >= SAMPLE_BYTES:
            break
    written = sum(len(text_line(text).encode("utf-8", "surrogatepass")) for _, text in kept)
    written += sum(len(json.dumps(["text", place, len(text)])) + 1 + 24 for place, text in kept)
    if reading.threshold:
        signed = signature(text for _, text in kept)
        written += signed.minima.nbytes + signed.offsets.nbytes + signed.shingles.nbytes
    return sampled, sum(len(text.encode()) for _, text in kept), written
