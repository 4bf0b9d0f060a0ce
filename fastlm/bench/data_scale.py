"""A whole preparation of much text: seconds, rate and peak memory of each process.

The text is Python's own library, its documentation, and made documents (`fastlm.bench.made_text`) up to the size. It is
written as JSON lines into a temporary directory, which takes two and a half times its size with the part files and is
removed at the end. The preparation runs in a process of its own, from this Python.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from fastlm.bench.made_text import made_documents
from fastlm.data.corpus import python_documentation

_PREPARE = "import sys; from fastlm.bench.data_scale import prepare_here; prepare_here(*sys.argv[1:])"


def library(folder: Path) -> Iterator[str]:
    """Python's documentation, then the source of its library."""
    documentation = folder / "documentation.jsonl"
    python_documentation(documentation)
    with open(documentation, encoding="utf-8") as lines:
        yield from (json.loads(line)["text"] for line in lines)
    documentation.unlink()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")


def write_text(path: Path, size: int, seed: int = 0) -> int:
    """Write documents of about `size` bytes of UTF-8 as JSON lines; how many bytes of text they have."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in chain(library(path.parent), made_documents(size, seed)):
            if written >= size:
                break
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
    return written


def prepare_here(text: str, out: str, processes: str, rules: str, tokenizer: str) -> None:
    """Prepare `text` in this process and `processes` more; print the seconds and the peaks of memory as JSON.

    rules: "plain", or "rules" with encoding repair, scrubbing of addresses and near duplicates
    """
    from fastlm.data import prepare
    from fastlm.data.cleaning import Cleaning

    options = {"cleaning": Cleaning(repair=True, scrub=("email", "ip")), "near_duplicates": 0.8}
    began, stages = time.perf_counter(), {}

    def progress(stage: str, done: int, total: int) -> None:
        stages.setdefault(stage, [time.perf_counter() - began, 0.0])[1] = time.perf_counter() - began

    dataset = prepare(
        [text],
        tokenizer,
        out,
        processes=int(processes),
        progress=progress,
        note=lambda line: print(line, file=sys.stderr, flush=True),
        **(options if rules == "rules" else {}),
    )
    ours, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in (ours, workers)),
        "peak_mb": ours.ru_maxrss / 1024,
        "worker_peak_mb": workers.ru_maxrss / 1024,
        "stages": {stage: [round(moment, 1) for moment in moments] for stage, moments in stages.items()},
        "documents": dataset.documents,
        "rows": dataset.rows,
        "set_aside": {name: entry["count"] for name, entry in dataset.manifest["report"]["set_aside"].items()},
        "accepted": dataset.accepted,
    }
    print(json.dumps(found))


def measure(
    megabytes: float,
    processes: int,
    rules: str = "rules",
    seed: int = 0,
    folder: str | None = None,
    tokenizer: str = "train:8192",
) -> dict:
    """What `prepare_here` printed for text of that size, with "mb", that of the text. folder: for temporary files."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        text = Path(temporary, "text.jsonl")
        written = write_text(text, int(megabytes * 1e6), seed)
        rows = Path(temporary, "rows")
        command = [sys.executable, "-c", _PREPARE, str(text), str(rows), str(processes), rules, tokenizer]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {"mb": written / 1e6, "processes": processes, **json.loads(done.stdout)}


def line(row: dict) -> str:
    return (
        f"{row['mb']:,.0f} MB, {row['processes']} processes: {row['seconds']:,.0f} s, {row['mb'] / row['seconds']:.2f} "
        f"MB/s; {row['cpu_seconds']:,.0f} s of processor time, {row['mb'] / row['cpu_seconds']:.2f} MB/s a core; peak "
        f"{row['peak_mb']:,.0f} MB, of a worker {row['worker_peak_mb']:,.0f} MB"
    )
