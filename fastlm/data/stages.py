"""Cleaned text on disk, in parts that any number of processes make: the first stage of a large preparation.

    tasks -> clean(task), a process each -> part files -> CleanedText.texts(), in the order of the documents

A task is some consecutive `Part`s of the source files; its result is a function of them and the settings alone. A part
file is renamed into place when it is whole, so that a preparation that was killed continues with the missing ones.
Duplicates depend on other documents: they are found while the parts are read, in their order, for any number of
processes alike.

A part file has a JSON list a line: ["text", place, text] of a document that passed, ["reject", place, reason] of one
that did not, in the order of the source, and last ["end", counts, cleaning report or null].
"""

from __future__ import annotations

import fcntl
import glob
import json
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path

from fastlm.data._extras import require
from fastlm.data.cleaning import Cleaner, Cleaning, CleaningReport, tidied
from fastlm.data.duplicates import Signatures, exact_digest, near_duplicates, signature
from fastlm.data.sources import FIELDS, Part, Report, SourceFile, read_documents, split
from fastlm.storage import atomic_file

PART_BYTES = (
    16 << 20
)  # of the source in a task: about 10 s of cleaning, and the text that is cleaned again after a kill
SMALL = 64 << 20  # bytes of a corpus that is cleaned while it is packed, without part files

_KEPT = "the finished parts are kept; make room and rerun the same command"


@dataclass(frozen=True)
class Reading:
    """How documents are read and cleaned; `threshold` is the similarity of near duplicates, 0 where all stay."""

    documents: str
    fields: tuple[str, ...]
    cleaning: Cleaning
    threshold: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether nothing but length is asked for, which needs no `Cleaner`."""
        return self.cleaning == Cleaning(min_chars=self.cleaning.min_chars)

    def settings(self) -> dict[str, object]:
        """What is not the default, by the recipe's names: entries of a manifest."""
        default = Cleaning(min_chars=self.cleaning.min_chars).as_dict()
        rules = {name: value for name, value in self.cleaning.as_dict().items() if value != default[name]}
        fields = {} if self.fields == FIELDS else {"field": list(self.fields)}
        near = {"near_duplicates": self.threshold} if self.threshold else {}
        return {**fields, **rules, **near}


@dataclass(frozen=True)
class Task:
    """Parts of the source that one process reads, and the file `path` that it writes.

    size    bytes of the source; packed: of these, in compressed files and Parquet files
    """

    index: int
    parts: tuple[Part, ...]
    size: int
    packed: int
    path: Path
    reading: Reading

    @property
    def signatures(self) -> Path:
        return self.path.with_suffix(".signatures")


class _Events(Report):
    """A report that also writes its rejections into a part file, between the texts."""

    def __init__(self, write: Callable[[list], object]):
        super().__init__()
        self._write = write

    def reject(self, reason: str, place: str) -> None:
        self._write(["reject", place, reason])


def clean(task: Task) -> Task:
    """Write the part file of `task`, and before it the signatures where near duplicates are wanted."""
    with atomic_file(task.path, what="a part", kept=_KEPT) as partial, open(partial, "w", encoding="utf-8") as file:

        def write(event: list) -> None:
            file.write(json.dumps(event) + "\n")

        report = _Events(write)
        records = read_documents(task.parts, task.reading.documents, report, fields=task.reading.fields)
        cleaner = None if task.reading.plain else Cleaner(task.reading.cleaning)
        if cleaner is None:
            found = tidied(records, report, task.reading.cleaning.min_chars)
        else:
            found = _passed(records, report, cleaner, task.index)

        def texts() -> Iterator[str]:
            for place, text in found:
                write(["text", place, text])
                yield text

        if task.reading.threshold:
            signature(texts()).save(task.signatures)
        else:
            for _ in texts():
                pass
        counts = {"read": report.read, "bytes_read": report.bytes_read}
        write(["end", counts, None if cleaner is None else cleaner.report.as_dict()])
    return task


def _passed(
    records: Iterable[tuple[str, str]], report: Report, cleaner: Cleaner, index: int
) -> Iterator[tuple[str, str]]:
    for number, (place, text) in enumerate(records):
        text, rule = cleaner(text, ordinal=(index, number), place=place)
        if rule is None:
            yield place, text
        else:
            report.reject(rule, place)


class CleanedText:
    """The cleaned text of `files`, as part files in `directory` whose names begin with `prefix`."""

    def __init__(self, files: Iterable[SourceFile], reading: Reading, directory: Path, prefix: str):
        self.reading = reading
        self.tasks = [
            Task(index, parts, size, packed, directory / f"{prefix}{index:06d}.jsonl", reading)
            for index, (parts, size, packed) in enumerate(_grouped(files, reading.documents))
        ]

    def make(self, run: Callable[[list[Task]], Iterator[Task]], progress: Callable[[int, int], None]) -> None:
        """Make the part files that are missing.

        run: yields each task when `clean` is done with it, as `in_processes`. progress: called with the bytes
            done, and those in all.
        """
        total = sum(task.size for task in self.tasks)
        missing = [task for task in self.tasks if not task.path.exists()]
        done = total - sum(task.size for task in missing)
        for task in run(missing) if missing else ():
            done += task.size
            progress(done, total)

    def texts(self, report: Report, cleaned: CleaningReport | None = None) -> Iterator[str]:
        """The documents that stay, in order. What was rejected is entered in `report`, and in `cleaned` by rule."""
        seen, ordinal = set(), -1
        for task in self.tasks:
            for number, (kind, *entries) in enumerate(_events(task.path)):
                if kind == "reject":
                    place, reason = entries
                    report.reject(reason, place)
                elif kind == "text":
                    place, text = entries
                    ordinal += 1
                    rule = self._duplicate(text, ordinal, seen)
                    if rule is None:
                        report.kept += 1
                        yield text
                        continue
                    report.reject(rule, place)
                    if cleaned is not None:
                        cleaned.take_kept(rule, text, ordinal=(task.index, number), place=place)
                else:
                    counts, rules = entries
                    report.merge(Report(**counts))
                    if cleaned is not None and rules is not None:
                        cleaned.merge(CleaningReport.from_dict(rules))

    def _duplicate(self, text: str, ordinal: int, seen: set[bytes]) -> str | None:
        digest = exact_digest(text)
        if digest in seen:
            return "duplicate"
        seen.add(digest)
        return "near duplicate" if self.reading.threshold and not self._kept[ordinal] else None

    @cached_property
    def _kept(self):
        """(documents,) bool, exact duplicates among them: one is similar to all that its first is similar to."""
        parts = [Signatures.open(task.signatures) for task in self.tasks]
        return near_duplicates(parts, threshold=self.reading.threshold).kept


def _events(path: Path) -> Iterator[list]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def _grouped(files: Iterable[SourceFile], documents: str) -> Iterator[tuple[tuple[Part, ...], int, int]]:
    """Parts one after another until they have PART_BYTES, with `Task.size` and `Task.packed`; a large file is split."""
    group, size, packed = [], 0, 0
    for file in files:
        file = replace(file, path=file.path.absolute())  # another machine's process has another directory
        parts = split(file, PART_BYTES, documents)
        for part in parts:
            group.append(part)
            size += file.size // len(parts)
            packed += file.size // len(parts) if file.compression or file.kind == "parquet" else 0
            if size >= PART_BYTES:
                yield tuple(group), size, packed
                group, size, packed = [], 0, 0
    if group:
        yield tuple(group), size, packed


def in_processes(tasks: list[Task], processes: int) -> Iterator[Task]:
    """Each task when it is done. New processes are spawned: a fork would copy locks that threads of ours hold."""
    processes = min(processes, len(tasks))
    if processes == 1:
        yield from map(clean, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_end_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(clean, task) for task in tasks]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def on_ray(tasks: list[Task], processes: int | None, address: str) -> Iterator[Task]:
    """Each task when it is done, by the workers of a Ray cluster.

    processes   tasks at a time; None: as many as the cluster has cores
    address     of the cluster's head; "": one is started on this machine, and ended with the last task

    ValueError where a worker's part file cannot be seen from here: the machines have to share the directory.
    """
    ray = require("ray")
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is reported is the user's decision
        where = {"address": address} if address else {"address": "local", "num_cpus": processes}
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    try:
        most = processes or int(ray.cluster_resources()["CPU"])
        remote, left, running = ray.remote(clean), deque(tasks), []
        while left or running:
            while left and len(running) < most:
                running.append(remote.remote(left.popleft()))
            (done,), running = ray.wait(running, num_returns=1)
            task = ray.get(done)
            if not task.path.exists():
                raise ValueError(
                    f"out: expected a directory that all machines of the Ray cluster share, got {task.path.parent}, "
                    f"in which the part of {task.parts[0].name} by a worker is not found"
                )
            yield task
    finally:
        if started:
            ray.shutdown()


def _end_with_parent() -> None:
    """End this process when its parent does: a pool's workers wait forever for one that was killed."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()


@contextmanager
def kept_parts(out: Path, identity: str) -> Iterator[Path]:
    """The hidden directory beside `out` for the parts of the preparation `identity`, which a killed one may have left.

    It is removed at the end, where `out` exists meanwhile (FileExistsError), and after a ValueError, which the same
    command would meet again. Other errors keep it.
    Those of other preparations of `out` are removed. Another process that prepares the same is waited for.
    """
    out = Path(os.path.realpath(out))
    directory = out.parent / f".{out.name}.parts-{identity[:16]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    for other in out.parent.glob(f".{glob.escape(out.name)}.parts-*"):
        if other != directory and (lock := _lock(other, fcntl.LOCK_NB)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    lock = None
    while lock is None:
        directory.mkdir(exist_ok=True)
        lock = _lock(directory)
    try:
        yield directory
        shutil.rmtree(directory)
    except (ValueError, FileExistsError):
        shutil.rmtree(directory)
        raise
    finally:
        os.close(lock)


def _lock(directory: Path, flag: int = 0) -> int | None:
    """A descriptor that holds the lock of `directory`; None where another has it, with LOCK_NB, or removed it."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | flag)
    except OSError:
        os.close(fd)
        return None
    if directory.exists() and os.path.samestat(os.fstat(fd), os.stat(directory)):
        return fd
    os.close(fd)
    return None
