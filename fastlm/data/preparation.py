"""`prepare`: text -> cleaning -> tokenizer -> packed rows -> shards and a manifest, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from fastlm.data import cleaning, duplicates, selection
from fastlm.data._checks import integer
from fastlm.data._extras import require
from fastlm.data.best_fit import best_fit_rows, sentence_ends
from fastlm.data.cleaning import Cleaner, Cleaning
from fastlm.data.cleaning.cleaner import RULES_VERSION
from fastlm.data.counts import Counts
from fastlm.data.executors import Run, in_processes, on_ray
from fastlm.data.identity import already, checksums
from fastlm.data.kept import kept_parts
from fastlm.data.layouts import MIN_PIECE, Layout, MaskedRows
from fastlm.data.mixture import token_entropy
from fastlm.data.packing import lay_rows, pack
from fastlm.data.shards import FORMAT, VERSION, Dataset, open_dataset, tokenizer_checksum, write_shard
from fastlm.data.sources import (
    DOCUMENTS,
    FIELDS,
    MANIFEST,
    TOKENIZER,
    Report,
    SourceFile,
    find_files,
    is_prepared,
)
from fastlm.data.stages import SMALL, Reading
from fastlm.data.stages import VERSION as PARTS_VERSION
from fastlm.data.texts import Progress, Staged, Streamed, Texts
from fastlm.data.tokenizer import SAMPLE, TRAINED_ON, Tokenizer, ToTrain, check_trainable, parse
from fastlm.storage import NoSpace, atomic_directory, json_checksum, write_json

_SHARD_TOKENS = 1 << 24  # 32 MiB of two-byte tokens in a shard: one is held in memory while preparing

EXECUTORS = ("processes", "ray")
PACKINGS = ("cut", "best_fit")


def prepare(
    paths,
    tokenizer,
    out,
    *,
    row_tokens: int = 128,
    layout: Layout | None = None,
    documents: str = "file",
    min_chars: int | None = None,
    cleaning: Cleaning | None = None,
    near_duplicates: float = 0.0,
    fields: Iterable[str] = FIELDS,
    packing: str = "cut",
    validation=None,
    validation_share: float = 0.0,
    shard_rows: int | None = None,
    outputs: Iterable = (),
    processes: int | None = 1,
    executor: str = "processes",
    ray_address: str = "",
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Prepare the text in `paths` for training, into the directory `out`, and open it as `open_dataset(lazy=True)`.

    paths       files and directories; see `fastlm.data.sources`
    tokenizer   "train:8192" to train one of that size on this text (see `Tokenizer.train`), "wordpiece:8192",
                "bpe:8192", "unigram:8192", "chars", a directory to load, a `Tokenizer`, or what
                `fastlm.data.tokenizer.parse` returns
    row_tokens  length of a row, at least 8: the longest piece of a document that the model sees
    layout      how documents lie in rows, a `fastlm.data.layouts.Layout`; default: MaskedRows(row_tokens)
    documents   what of a plain-text file is a document: "file", "line", or "blank" (between blank lines)
    min_chars   a document of fewer characters is dropped; default: what `cleaning` says, 8
    cleaning    further rules, a `fastlm.data.cleaning.Cleaning`; the manifest then has their report
    near_duplicates  the similarity, from 0.5 to 1, from which a document is dropped as a near duplicate of an earlier
                one (`fastlm.data.duplicates`); 0: only equal ones are dropped
    fields      of JSON lines and tables: the first of these that is there is the text
    packing     "cut": documents are cut where a row ends; "best_fit": one that fits into a row stays whole, others are
                cut at sentence ends (`fastlm.data.best_fit`)
    validation  text to evaluate on, paths as `paths`: documents in it, or similar to one in it, are not trained on; or
    validation_share  the share of documents that is held out for it, chosen by a hash of their text; the tokenizer is
                trained without them
    shard_rows  rows in a shard file; the default makes 32 MiB
    outputs     directories that the caller writes: not read where they lie inside one of `paths`
    processes   how many clean and tokenise; None: one for each core where there are more than 64 MiB of text. The
                result is the same for any number. They are spawned: a script needs `if __name__ == "__main__":`
    executor    "processes", or "ray" for the workers of a Ray cluster, on machines that share the directories of the
                text and of `out`; `processes` is then how many parts are made at a time, None: one for each core
    ray_address of the cluster's head, as "10.0.0.1:6379"; "": a cluster is started on this machine
    progress    called as progress(stage, bytes done, bytes in all) now and then; the stages are "checksums",
                "cleaning" (see below), "held out", "tokenizer" (only where one is trained), "tokens" (see below),
                "rows" and "validation"
    note        called with a line before part files are made, an estimate of disk and time (`fastlm.data.estimate`),
                and before a source is written as files

    With rules, near duplicates, several processes, Ray or more than 64 MiB of text, the cleaned text and its tokens are
    written in parts into a hidden directory beside `out`, half as large again as the text. A preparation that was
    killed continues with the parts that are missing when it is called again; the directory is removed at the end.
    Standard input and datasets by name are written into `.NAME.sources` beside `out`; it stays, so that a second call
    need not download again.

    Where `out` already holds the same preparation (same text, settings and tokenizer), its checksums are checked and it
    is opened as it is; so it is where another process prepared the same meanwhile. ValueError where a shard of it is
    damaged, where it holds anything else or cannot be
    written, for a missing path, a bad setting, a corpus of which nothing is left, or one that the tokenizer cannot
    spell: [UNK] is nine tenths of its tokens, or stands for nine tenths of its characters. A twentieth warns.
    """
    out = Path(out)
    layout = MaskedRows(integer("row_tokens", row_tokens, MIN_PIECE)) if layout is None else layout
    cleaning = Cleaning() if cleaning is None else cleaning
    if min_chars is not None:
        cleaning = replace(cleaning, min_chars=integer("min_chars", min_chars, 0))
    reading = _reading(documents, fields, cleaning, near_duplicates)
    processes = None if processes is None else integer("processes", processes, 1)
    if executor not in EXECUTORS or (ray_address and executor != "ray"):
        raise ValueError(
            f"executor: expected one of {', '.join(EXECUTORS)}, and ray where ray_address is given, got {executor!r}"
        )
    if documents not in DOCUMENTS:
        raise ValueError(f"documents: expected one of {', '.join(DOCUMENTS)}, got {documents!r}")
    if packing not in PACKINGS:
        raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}, got {packing!r}")
    if not 0.0 <= validation_share < 1.0 or (validation_share and validation is not None):
        raise ValueError(
            "validation_share: expected a share from 0 up to, but not, 1, and 0 where validation names a text, got "
            f"{validation_share!r}"
        )
    if shard_rows is None:
        shard_rows = max(1, _SHARD_TOKENS // layout.width)
    shard_rows = integer("shard_rows", shard_rows, 1)
    tokenizer = parse(tokenizer)
    if isinstance(tokenizer, Tokenizer):
        layout.check(tokenizer)
    else:
        check_trainable(tokenizer.kind, tokenizer.size, layout.name)
    progress = progress or (lambda stage, done, total: None)

    work = _Work(layout, tokenizer, reading, packing, validation_share, shard_rows)
    report, held_report = Report(), Report()
    spool = out.absolute().with_name(f".{out.name}.sources")
    find = partial(find_files, outputs=outputs, note=note)
    files = find(paths, report, spool=spool)
    held_files = [] if validation is None else find(validation, held_report, spool=spool / "validation")
    contents = checksums([*files, *held_files], progress)
    identity = json_checksum([*work.versions(bool(held_files)), work.settings(), len(files), contents])
    if os.path.exists(out) and not (out.is_dir() and not any(out.iterdir())):
        return already(out, identity, work.settings())
    settings = work.settings()  # "train:8192", before there is a tokenizer
    given = files, held_files, reading, validation_share, report, held_report, progress
    run = on_ray(processes, ray_address) if executor == "ray" else None
    try:
        with _texts(given, out, identity, processes, run, note) as texts, _target(out, texts) as target:
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "preparation": identity,
                "settings": settings,
                "row_tokens": layout.row_tokens,
                "width": layout.width,
                **work.write(target, texts),
                "report": report.as_dict(),
                **({} if reading.plain else {"cleaning": texts.cleaned.as_dict()}),
            }
            write_json(target / MANIFEST, {**manifest, "checksum": json_checksum(manifest)})
    except FileExistsError:  # another process finished meanwhile
        return already(out, identity, settings)
    return open_dataset(out, lazy=True)


@dataclass
class _Work:
    """The settings of a preparation. `tokenizer` is trained by `write`."""

    layout: Layout
    tokenizer: Tokenizer | ToTrain
    reading: Reading
    packing: str
    validation_share: float
    shard_rows: int

    def versions(self, validation: bool) -> list[int]:
        """Of the code that the rows depend on; that of rules, validation text and so on only where there are any."""
        rules = [] if self.reading.plain else [RULES_VERSION]
        near = [duplicates.VERSION] if self.reading.threshold else []
        compared = [selection.VERSION] if validation else []
        trained = self.tokenizer.versions(self.layout.name) if isinstance(self.tokenizer, ToTrain) else []
        return [VERSION, cleaning.VERSION, *rules, *near, *compared, *trained]

    def settings(self) -> dict[str, object]:
        """What the rows depend on, beside the text."""
        trained = isinstance(self.tokenizer, ToTrain)
        return {
            **self.layout.settings(),
            "documents": self.reading.documents,
            "min_chars": self.reading.cleaning.min_chars,
            # A default has no entry, as in version 0.2.
            **({} if self.packing == "cut" else {"packing": self.packing}),
            **self.reading.settings(),
            "validation_share": self.validation_share,
            "shard_rows": self.shard_rows,
            "tokenizer": str(self.tokenizer) if trained else self.tokenizer.hash,
            **({"tokenizer_sample": self.tokenizer.sample} if trained and self.tokenizer.sample != SAMPLE else {}),
        }

    def write(self, out: Path, texts: Texts) -> dict:
        """Write the tokenizer, the rows and the held-out rows into `out`; their entries in the manifest."""
        self.tokenizer = texts.tokenizer(self.tokenizer, self.layout.name)
        self.layout.check(self.tokenizer)
        self.tokenizer.save(out / TOKENIZER)
        counts, held_counts = Counts(self.tokenizer), Counts(self.tokenizer)
        trained = self.rows(out, "", texts.tokens(counts), counts, texts.report)
        if not trained["rows"]:
            raise _nothing_left(texts.files, texts.report)
        validation = self.rows(out, "validation-", texts.held_out(held_counts), held_counts, texts.held_report)
        if (texts.held_files or self.validation_share) and not validation["rows"]:
            raise _nothing_held(self.validation_share, texts, trained["documents"])
        tokenizer = {
            "hash": self.tokenizer.hash,
            "vocab_size": self.tokenizer.vocab_size,
            "checksum": tokenizer_checksum(out),
            **{name: self.tokenizer.config[name] for name in [TRAINED_ON] if name in self.tokenizer.config},
        }
        return {"tokenizer": tokenizer, **trained, "validation": validation}

    def rows(self, out: Path, prefix: str, documents: Iterable[np.ndarray], counts: Counts, report: Report) -> dict:
        """Write shards of the documents' rows; their part of the manifest."""
        empty = Report()
        fitted = self.packing == "best_fit"
        lay = partial(best_fit_rows, ends=sentence_ends(self.tokenizer)) if fitted else lay_rows
        packed = pack(counts.filled(documents, empty), self.tokenizer, self.layout, self.shard_rows, lay)
        shards = [write_shard(out, f"{prefix}{index:05d}", shard) for index, shard in enumerate(packed)]
        report.merge(empty)
        counts.check_unknown()
        return {
            "rows": sum(shard["rows"] for shard in shards),
            "documents": counts.documents,
            "unknown": counts.unknown(),
            "text_bytes": counts.bytes,
            "text_tokens": int(counts.tokens.sum()),
            "unigram_entropy": token_entropy(counts.tokens, self.tokenizer.special_ids),
            "fill": _fill(shards, self.layout),
            "shards": shards,
        }


@contextmanager
def _texts(
    given: tuple, out: Path, identity: str, processes: int | None, ray: Run | None, note: Callable[[str], None]
) -> Iterator[Texts]:
    """The documents: in parts, kept while the block runs, where that is worth while or needed; else as a stream.

    given: the arguments of `Texts`. ray: a context that gives what runs the tasks; None: `processes` processes
    """
    files, held_files, reading, *_ = given
    large = sum(file.size for file in [*files, *held_files]) > SMALL
    if processes is None and ray is None:
        processes = len(os.sched_getaffinity(0)) if large else 1
    if ray is None and reading.plain and not reading.threshold and processes == 1 and not large:
        with Streamed(*given) as texts:
            yield texts
        return
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(kept_parts(out, json_checksum([identity, PARTS_VERSION])))
        except OSError as error:
            raise ValueError(f"out: expected a directory that can be written, got {out} ({error})") from error
        if out.exists() and is_prepared(out):
            raise FileExistsError(f"{out} was prepared by another process")
        run = stack.enter_context(ray or in_processes(processes))
        yield Staged(*given).start(directory, run, note, lambda expected: expected.line(out, processes))


def _reading(documents: str, fields: Iterable[str], cleaning: Cleaning, threshold: float) -> Reading:
    """The settings of reading, checked. ValueError for a wrong one, or where a rule's package is missing."""
    if threshold:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0.5 <= threshold <= 1:
            raise ValueError(f"near_duplicates: expected 0, or a similarity from 0.5 to 1, got {threshold!r}")
        require("rensa"), require("xxhash")
    Cleaner(cleaning)
    fields = (fields,) if isinstance(fields, str) else tuple(fields)
    return Reading(documents, fields, cleaning, float(threshold))


def _fill(shards: list[dict], layout: Layout) -> list[float]:
    """Share of each of the rows' capacities that is used; 0 of no rows."""
    rows = max(1, sum(shard["rows"] for shard in shards))
    return [sum(s["used"][i] for s in shards) / (rows * each) for i, each in enumerate(layout.capacity())]


def _nothing_left(files: list[SourceFile], report: Report) -> ValueError:
    given = ", ".join(file.name for file in files[:5])
    if report.kept:
        return ValueError(
            f"validation_share: all {report.kept} documents in {given} are held out; give a smaller share, or set "
            'documents to "blank" or "line"'
        )
    return ValueError(f"data: no text is left of {report.read} records in {given}: {report.reasons()}")


def _nothing_held(share: float, texts: Texts, documents: int) -> ValueError:
    if texts.held_files:
        return _nothing_left(texts.held_files, texts.held_report)
    return ValueError(
        f"validation_share: none of the {documents} documents falls into a share of {share:g}; give a larger share, "
        'set documents to "blank" or "line", or name a file with validation'
    )


@contextmanager
def _target(out: Path, texts: Texts) -> Iterator[Path]:
    """`atomic_directory`, with a ValueError where it cannot begin."""

    def need(written: int) -> int:
        """The rows written so far, scaled to all of the text; the tokenizer is small."""
        return int(written * texts.total / max(1, texts.packed))

    kept = "nothing of it is kept, and the text is unchanged; make room, or name a directory on another disk"
    with ExitStack() as stack:
        try:
            partial = stack.enter_context(atomic_directory(out, what="the prepared data", need=need, kept=kept))
        except NoSpace:
            raise
        except OSError as error:
            raise ValueError(f"out: expected a directory that can be written, got {out} ({error})") from error
        yield partial
