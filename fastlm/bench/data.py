"""What each stage of data preparation takes: the program of benchmarks/bench_data.py.

The text is made (`fastlm.bench.made_text`). A stage's rate is its megabytes of UTF-8 in a second of processor time, of
all threads together, so that it is that of one core on a busy machine too. The best of the rounds counts. Loading
models is not timed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastlm.bench.made_text import made_text
from fastlm.data.best_fit import best_fit_rows, sentence_ends
from fastlm.data.cleaning import Cleaner, Cleaning
from fastlm.data.counts import Counts
from fastlm.data.duplicates import exact_digest, near_duplicates, signature
from fastlm.data.layouts import CausalRows, Layout
from fastlm.data.packing import lay_rows, pack
from fastlm.data.scrub import KINDS
from fastlm.data.selection import TRAINED
from fastlm.data.sources import Report, find_files, read_documents
from fastlm.data.stages import text_line
from fastlm.data.token_parts import TokenTask, read_tokens, tokenise
from fastlm.data.tokenizer import Tokenizer

GOALS = {"near duplicates": 6.0, "cleaning": 1.5, "all": 0.8}  # MB/s a core
LIBRARY = "tokenizers' encode_batch"
SHARE = 0.8  # of the library's rate that tokenising and packing are to reach


def _cleaning(**settings) -> Callable[[list[str]], int]:
    def clean(texts: list[str]) -> int:
        cleaner = Cleaner(Cleaning(**settings))
        return sum(cleaner(text, i)[0] is not None for i, text in enumerate(texts))

    return clean


def _near(texts: list[str]) -> int:
    return int(near_duplicates(signature(texts)).kept.sum())


_EVERYTHING = {
    "repair": True,
    "filters": ("c4", "gopher"),
    "languages": ("en", "fr", "de", "ru", "el", "ar", "hi", "zh"),
}

# Stage -> function of the texts that returns how many are left.
STAGES: dict[str, Callable[[list[str]], int]] = {
    "tidy": _cleaning(),
    "tidy, repair": _cleaning(repair=True),
    "tidy, C4": _cleaning(filters=("c4",)),
    "tidy, Gopher": _cleaning(filters=("gopher",)),
    "tidy, language by py3langid": _cleaning(languages=_EVERYTHING["languages"]),
    "tidy, language by lingua": _cleaning(languages=_EVERYTHING["languages"], detector="lingua"),
    **{f"tidy, scrub {kind}": _cleaning(scrub=(kind,)) for kind in KINDS},
    "cleaning": _cleaning(**_EVERYTHING),
    "cleaning, scrub": _cleaning(**_EVERYTHING, scrub=KINDS),
    "exact duplicates": lambda texts: len(set(map(exact_digest, texts))),
    "signatures": lambda texts: len(signature(texts)),
    "near duplicates": _near,
}


def _readers(texts: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    yield from (("read JSONL", folder / "a.jsonl"), ("read JSONL, gzip", folder / "a.jsonl.gz"))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    yield "read Parquet", folder / "a.parquet"


def _read(path: Path) -> list[str]:
    report = Report()
    return [text for _, text in read_documents(find_files([path], report), "file", report)]


def _everything(path: Path) -> int:
    """All stages from a file: read, clean with all filters, scrub, exact and near duplicates."""
    cleaner = Cleaner(Cleaning(**_EVERYTHING, scrub=KINDS))
    seen, kept = set(), []
    for i, text in enumerate(_read(path)):
        cleaned, _ = cleaner(text, i)
        if cleaned is not None and (digest := exact_digest(cleaned)) not in seen:
            seen.add(digest)
            kept.append(cleaned)
    return _near(kept)


def _library(texts: list[str], tokenizer: Tokenizer) -> int:
    """How many tokens `tokenizers` makes of the texts, about a megabyte of them at once, as `fastlm.data.packing`."""
    count, batch, chars = 0, [], 0
    for text in [*texts, None]:
        if text is not None:
            batch.append(text)
            chars += len(text)
        if batch and (text is None or chars >= 1 << 20):
            found = tokenizer.backend.encode_batch(batch, add_special_tokens=False)
            count, batch, chars = count + sum(map(len, found)), [], 0
    return count


def _packed(task: TokenTask, tokenizer: Tokenizer, layout: Layout, lay: Callable) -> int:
    """The stages after cleaning: from a part of cleaned text to rows; how many tokens they hold."""
    tokenise(task)
    documents = read_tokens(task.path, Counts(tokenizer))
    return sum(shard.used[0] for shard in pack(documents, tokenizer, layout, 1 << 17, lay))


def _tokenising(texts: list[str], folder: Path) -> dict[str, Callable[[], int]]:
    """Jobs that make tokens of the texts, the library's first."""
    tokenizer, layout = Tokenizer.train(lambda: texts, 8192, "bpe", "causal"), CausalRows(1024)
    tokenizer.save(folder / "tokenizer")
    (folder / "part.jsonl").write_text("".join(map(text_line, texts)), encoding="utf-8")
    codes = np.full(len(texts), TRAINED, np.uint8)
    task = TokenTask(folder / "part.jsonl", codes, folder / "tokenizer", folder / "part.tokens", 0)
    fitted = partial(best_fit_rows, ends=sentence_ends(tokenizer))
    return {
        LIBRARY: lambda: _library(texts, tokenizer),
        "tokenising, packing": lambda: _packed(task, tokenizer, layout, lay_rows),
        "tokenising, best fit": lambda: _packed(task, tokenizer, layout, fitted),
    }


def measure(texts: list[str], rounds: int, now: Callable[[], float] = time.process_time) -> Iterator[dict]:
    """{"stage", "mb_s", "left"} of each stage, and "share" of the library's rate of those that make tokens.

    now: seconds of processor time.
    """
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def timed(jobs: dict[str, Callable[[], int]]) -> Iterator[dict]:
        """The jobs in turn, in every round."""
        best, left = dict.fromkeys(jobs, float("inf")), {}
        for _ in range(rounds):
            for name, job in jobs.items():
                start = now()
                left[name] = job()
                best[name] = min(best[name], now() - start)
        for name in jobs:
            yield {"stage": name, "mb_s": round(megabytes / best[name], 2), "left": left[name]}

    with tempfile.TemporaryDirectory() as folder:
        paths = dict(_readers(texts, Path(folder)))
        jobs = {name: lambda path=path: len(_read(path)) for name, path in paths.items()}
        jobs |= {name: lambda stage=stage: stage(texts) for name, stage in STAGES.items()}
        jobs["all"] = lambda: _everything(paths["read JSONL"])
        _cleaning(**_EVERYTHING, scrub=KINDS)(texts[:20])  # loads the models
        _cleaning(languages=("en",), detector="lingua")(texts[:20])
        for name, job in jobs.items():
            yield from timed({name: job})
        library, *ours = timed(_tokenising(texts, Path(folder)))
        yield library
        for row in ours:
            yield {**row, "share": round(row["mb_s"] / library["mb_s"], 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=float, default=8, help="megabytes of text")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument(
        "--whole", type=int, metavar="PROCESSES", help="prepare the text with rules, and show time and peak memory"
    )
    parser.add_argument("--tokenizer", default="train:8192", help="of --whole; a trained one leaves its training out")
    arguments = parser.parse_args()
    if arguments.whole:
        return _whole(arguments)
    texts = made_text(int(arguments.mb * 1e6), arguments.seed)
    print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB; MB/s a core")
    rows, slow = [], []
    for row in measure(texts, arguments.rounds):
        goal, share = GOALS.get(row["stage"]), row.get("share")
        says = f"   goal {goal}" if goal else f"   {share:.0%} of the library's, goal {SHARE:.0%}" if share else ""
        print(f"{row['stage']:30} {row['mb_s']:9.2f} {row['left']:7} left{says}", flush=True)
        rows.append(row)
        slow += [row["stage"]] if (goal and row["mb_s"] < goal) or (share and share < SHARE) else []
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if slow:
        print(f"below the goal: {', '.join(slow)}", file=sys.stderr)
    return bool(slow)


def _whole(arguments: argparse.Namespace) -> int:
    from fastlm.bench.data_scale import line, measure

    row = measure(arguments.mb, arguments.whole, seed=arguments.seed, tokenizer=arguments.tokenizer)
    print(line(row))
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=1) + "\n")
    return 0
