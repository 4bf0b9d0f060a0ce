"""`prepare`: text -> cleaning -> tokenizer -> packed rows -> shards and a manifest, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from fastlm.data import cleaning, duplicates
from fastlm.data._checks import integer
from fastlm.data._extras import require
from fastlm.data.best_fit import best_fit_rows, sentence_ends
from fastlm.data.cleaning import Cleaner, Cleaning, CleaningReport
from fastlm.data.cleaning.cleaner import RULES_VERSION
from fastlm.data.estimate import estimate
from fastlm.data.layouts import MIN_PIECE, Layout, MaskedRows
from fastlm.data.mixture import token_entropy
from fastlm.data.packing import encode_documents, lay_rows, pack
from fastlm.data.shards import FORMAT, VERSION, Dataset, open_dataset, read_manifest, tokenizer_checksum, write_shard
from fastlm.data.sources import (
    DOCUMENTS,
    FIELDS,
    MANIFEST,
    TOKENIZER,
    Report,
    SourceFile,
    find_files,
    is_prepared,
    read_documents,
)
from fastlm.data.stages import SMALL, CleanedText, Reading, in_processes, kept_parts, on_ray
from fastlm.data.tokenizer import LONGEST, SAMPLE, TRAINED_ON, Tokenizer, ToTrain, parse
from fastlm.storage import NoSpace, atomic_directory, file_checksum, json_checksum, write_json

_SHARD_TOKENS = 1 << 24  # 32 MiB of two-byte tokens in a shard: one is held in memory while preparing

EXECUTORS = ("processes", "ray")
PACKINGS = ("cut", "best_fit")
_WARNED, _REFUSED = 0.05, 0.9  # shares of [UNK]

Progress = Callable[[str, int, int], None]


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
    """Prepare the text in `paths` for training, into the directory `out`, and open it.

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
                one (`fastlm.data.duplicates`); 0: only equal ones are dropped. Each of the text and `validation` alone
    fields      of JSON lines and tables: the first of these that is there is the text
    packing     "cut": documents are cut where a row ends; "best_fit": one that fits into a row stays whole, others are
                cut at sentence ends (`fastlm.data.best_fit`)
    validation  text to evaluate on, paths as `paths`; or
    validation_share  the share of documents that is held out for it, chosen by a hash of their text; the tokenizer is
                trained without them
    shard_rows  rows in a shard file; the default makes 32 MiB
    outputs     directories that the caller writes: not read where they lie inside one of `paths`
    processes   how many read and clean; None: one for each core where there are more than 64 MiB of text. The result
                is the same for any number. They are spawned: a script needs `if __name__ == "__main__":`
    executor    "processes", or "ray" for the workers of a Ray cluster, on machines that share the directories of the
                text and of `out`; `processes` is then how many parts are cleaned at a time, None: one for each core
    ray_address of the cluster's head, as "10.0.0.1:6379"; "": a cluster is started on this machine
    progress    called as progress(stage, bytes done, bytes in all) now and then; the stages are "checksums",
                "cleaning" (see below), "tokenizer" (only where one is trained), "rows" and "validation"
    note        called with a line before part files are made, an estimate of disk and time (`fastlm.data.estimate`),
                and before a source is written as files

    With rules, near duplicates, several processes, Ray or more than 64 MiB of text, the cleaned text is first written
    in parts into a hidden directory beside `out`, as large as the text. A preparation that was killed continues with
    the parts that are missing when it is called again; the directory is removed at the end. Standard input and datasets
    by name are written into `.NAME.sources` beside `out`; it stays, so that a second call need not download again.

    Where `out` already holds the same preparation (same text, settings and tokenizer), it is opened as it is;
    so it is where another process prepared the same meanwhile. ValueError where it holds anything else or cannot be
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
    progress = progress or (lambda stage, done, total: None)

    work = _Work(layout, tokenizer, reading, packing, validation_share, shard_rows, progress, note)
    report, held_report = Report(), Report()
    spool = out.absolute().with_name(f".{out.name}.sources")
    find = partial(find_files, outputs=outputs, note=note)
    files = find(paths, report, spool=spool)
    held_files = [] if validation is None else find(validation, held_report, spool=spool / "validation")
    contents = _contents([*files, *held_files], progress)
    identity = json_checksum([*work.versions(), work.settings(), len(files), contents])
    if os.path.exists(out) and not (out.is_dir() and not any(out.iterdir())):
        return _already(out, identity, work.settings())
    # The rows written so far, scaled to all of the text; the tokenizer is small.
    total = sum(file.size for file in files)
    settings = work.settings()  # "train:8192", before there is a tokenizer
    need = partial(_scaled, total=total, report=report)
    try:
        run = None if executor == "processes" else partial(on_ray, processes=processes, address=ray_address)
        with work.parts(out, identity, files, held_files, processes, run), _target(out, need) as target:
            entries = work.write(target, files, held_files, report, held_report)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "preparation": identity,
                "settings": settings,
                "row_tokens": layout.row_tokens,
                "width": layout.width,
                **entries,
                "report": report.as_dict(),
                **({} if reading.plain else {"cleaning": work.cleaned.as_dict()}),
            }
            write_json(target / MANIFEST, {**manifest, "checksum": json_checksum(manifest)})
    except FileExistsError:  # another process finished meanwhile
        return _already(out, identity, settings)
    return open_dataset(out)


@dataclass
class _Work:
    """The settings of a preparation, and its passes over the text. `tokenizer` is trained by the first."""

    layout: Layout
    tokenizer: Tokenizer | ToTrain
    reading: Reading
    packing: str
    validation_share: float
    shard_rows: int
    progress: Progress
    note: Callable[[str], None]
    cleaned: CleaningReport = field(default_factory=CleaningReport)  # of the text that is trained on
    staged: dict[str, CleanedText] = field(default_factory=dict)  # by stage; empty where text is cleaned while packed

    def versions(self) -> list[int]:
        """Of the code that the rows depend on; that of rules only where there are any."""
        rules = [] if self.reading.plain else [RULES_VERSION]
        near = [duplicates.VERSION] if self.reading.threshold else []
        return [VERSION, cleaning.VERSION, *rules, *near]

    @contextmanager
    def parts(
        self,
        out: Path,
        identity: str,
        files: list[SourceFile],
        held_files: list[SourceFile],
        processes: int | None,
        run: Callable | None,
    ) -> Iterator[None]:
        """Clean the text into part files, kept while the block runs, where that is worth while or needed.

        run: what runs the tasks (`CleanedText.make`); None: `processes` processes
        """
        large = sum(file.size for file in [*files, *held_files]) > SMALL
        if processes is None and run is None:
            processes = len(os.sched_getaffinity(0)) if large else 1
        if run is None and self.reading.plain and not self.reading.threshold and processes == 1 and not large:
            yield
            return
        run = run or partial(in_processes, processes=processes)
        with ExitStack() as stack:
            try:
                directory = stack.enter_context(kept_parts(out, identity))
            except OSError as error:
                raise ValueError(f"out: expected a directory that can be written, got {out} ({error})") from error
            if out.exists() and is_prepared(out):
                raise FileExistsError(f"{out} was prepared by another process")
            for stage, chosen in (("rows", files), ("validation", held_files)):
                self.staged[stage] = CleanedText(chosen, self.reading, directory, f"{stage}-")
            if expected := estimate([task for text in self.staged.values() for task in text.tasks]):
                self.note(expected.line(out, processes))
            for text in self.staged.values():
                text.make(run, partial(self.progress, "cleaning"))
            self.staged["tokenizer"] = self.staged["rows"]
            yield

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

    def write(
        self, out: Path, files: list[SourceFile], held_files: list[SourceFile], report: Report, held_report: Report
    ) -> dict:
        """Write the tokenizer, the rows and the held-out rows into `out`; their entries in the manifest."""
        if isinstance(self.tokenizer, ToTrain):
            self.tokenizer = self.tokenizer.train(lambda: self.seen(files), self.layout.name, out)
            self.layout.check(self.tokenizer)
        self.tokenizer.save(out / TOKENIZER)
        with _Spool(out / "held-out.jsonl") as spool:
            trained = self.rows(out, "", spool.take(self.texts("rows", files, report), self.held_out), report)
            if not trained["rows"]:
                raise _nothing_left(files, report, spool.count)
            held = self.texts("validation", held_files, held_report) if held_files else spool.texts()
            validation = self.rows(out, "validation-", held, held_report)
        if (held_files or self.validation_share) and not validation["rows"]:
            raise _nothing_held(self.validation_share, held_files, held_report, trained["documents"])
        tokenizer = {
            "hash": self.tokenizer.hash,
            "vocab_size": self.tokenizer.vocab_size,
            "checksum": tokenizer_checksum(out),
            **{name: self.tokenizer.config[name] for name in [TRAINED_ON] if name in self.tokenizer.config},
        }
        return {"tokenizer": tokenizer, **trained, "validation": validation}

    def texts(self, stage: str, files: list[SourceFile], report: Report) -> Iterator[str]:
        """The cleaned documents of the files."""
        total = sum(file.size for file in files)
        if stage in self.staged:
            texts = self.staged[stage].texts(report, self.cleaned if stage == "rows" else None)
        else:
            records = read_documents(files, self.reading.documents, report, fields=self.reading.fields)
            texts = cleaning.clean_documents(records, report, self.reading.cleaning.min_chars)
        for text in texts:
            self.progress(stage, report.bytes_read, total)
            yield text
        self.progress(stage, total, total)

    def seen(self, files: list[SourceFile]) -> Iterator[str]:
        """What the tokenizer is trained on: the documents that are not held out."""
        return (text for text in self.texts("tokenizer", files, Report()) if not self.held_out(text))

    def held_out(self, text: str) -> bool:
        return is_held_out(text, self.validation_share)

    def rows(self, out: Path, prefix: str, texts: Iterable[str], report: Report) -> dict:
        """Write shards of the texts' rows; their part of the manifest."""
        counts = _Counts(self.tokenizer)
        ids = counts.count(encode_documents(texts, self.tokenizer, counts.look), report)
        fitted = self.packing == "best_fit"
        lay = partial(best_fit_rows, ends=sentence_ends(self.tokenizer)) if fitted else lay_rows
        shards = [
            write_shard(out, f"{prefix}{index:05d}", shard)
            for index, shard in enumerate(pack(ids, self.tokenizer, self.layout, self.shard_rows, lay))
        ]
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


def _reading(documents: str, fields: Iterable[str], cleaning: Cleaning, threshold: float) -> Reading:
    """The settings of reading, checked. ValueError for a wrong one, or where a rule's package is missing."""
    if threshold:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0.5 <= threshold <= 1:
            raise ValueError(f"near_duplicates: expected 0, or a similarity from 0.5 to 1, got {threshold!r}")
        require("rensa"), require("xxhash")
    Cleaner(cleaning)
    fields = (fields,) if isinstance(fields, str) else tuple(fields)
    return Reading(documents, fields, cleaning, float(threshold))


def _scaled(written: int, total: int, report: Report) -> int:
    return int(written * total / max(1, report.bytes_read))


def is_held_out(text: str, share: float) -> bool:
    """Whether a document, cleaned, is among the `share` that is held out: a function of its text."""
    if not share:
        return False
    word = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(word, "little") < share * 2**64


def _fill(shards: list[dict], layout: Layout) -> list[float]:
    """Share of each of the rows' capacities that is used; 0 of no rows."""
    rows = max(1, sum(shard["rows"] for shard in shards))
    return [sum(s["used"][i] for s in shards) / (rows * each) for i, each in enumerate(layout.capacity())]


def _nothing_left(files: list[SourceFile], report: Report, held: int) -> ValueError:
    given = ", ".join(file.name for file in files[:5])
    if held:
        return ValueError(
            f"validation_share: all {held} documents in {given} are held out; give a smaller share, or set documents "
            'to "blank" or "line"'
        )
    return ValueError(f"data: no text is left of {report.read} records in {given}: {report.reasons()}")


def _nothing_held(share: float, held_files: list[SourceFile], report: Report, documents: int) -> ValueError:
    if held_files:
        return _nothing_left(held_files, report, 0)
    return ValueError(
        f"validation_share: none of the {documents} documents falls into a share of {share:g}; give a larger share, "
        'set documents to "blank" or "line", or name a file with validation'
    )


class _Spool:
    """Documents put aside in a temporary file while the others pass, so that the text is read and cleaned once."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0

    def __enter__(self) -> _Spool:
        self._file = open(self.path, "w+", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self.path.unlink()

    def take(self, texts: Iterable[str], chosen: Callable[[str], bool]) -> Iterator[str]:
        """The texts that are not chosen."""
        for text in texts:
            if chosen(text):
                self.count += 1
                self._file.write(json.dumps(text) + "\n")
            else:
                yield text

    def texts(self) -> Iterator[str]:
        self._file.seek(0)
        return (json.loads(line) for line in self._file)


class OtherPreparation(ValueError):
    """A directory holds the preparation of other text, or by other settings; `differences` says which."""

    def __init__(self, out: Path, differences: list[str]):
        self.differences = differences
        super().__init__(
            f"out: {out} exists and holds another preparation: {'; '.join(differences)}. Name another directory, or "
            "delete it"
        )


def setting_differences(settings: dict, before: dict) -> list[str]:
    """A phrase for each entry of a manifest's settings that differs."""
    names = [name for name in {**before, **settings} if settings.get(name) != before.get(name)]
    return [f"data.{name} is {settings.get(name)!r}, was {before.get(name)!r}" for name in names]


def _already(out: Path, identity: str, settings: dict) -> Dataset:
    """What lies in `out`, where it is the preparation `identity` by `settings`."""
    if not is_prepared(out):
        raise ValueError(f"out: {out} exists and holds something else; name another directory, or delete it")
    manifest = read_manifest(out)
    if manifest["preparation"] != identity:
        differences = setting_differences(settings, manifest["settings"])
        raise OtherPreparation(out, differences or ["files of the text were changed, added or removed"])
    return open_dataset(out)


@contextmanager
def _target(out: Path, need: Callable[[int], int]) -> Iterator[Path]:
    """`atomic_directory`, with a ValueError where it cannot begin."""
    kept = "nothing of it is kept, and the text is unchanged; make room, or name a directory on another disk"
    with ExitStack() as stack:
        try:
            partial = stack.enter_context(atomic_directory(out, what="the prepared data", need=need, kept=kept))
        except NoSpace:
            raise
        except OSError as error:
            raise ValueError(f"out: expected a directory that can be written, got {out} ({error})") from error
        yield partial


def _contents(files: Iterable[SourceFile], progress: Progress) -> list[list[str]]:
    """[name, checksum] of every file: what makes two preparations the same, wherever the files lie."""
    total, done, contents = sum(file.size for file in files), 0, []
    for file in files:
        try:
            contents.append([file.name, file_checksum(file.path)])
        except OSError as error:
            contents.append([file.name, f"unreadable: {error.strerror}"])
        done += file.size
        progress("checksums", done, total)
    return contents


class _Counts:
    """What passes to the rows: documents, bytes of UTF-8, how often each token occurs (vocab_size,) int64, and how many
    characters, white space aside, there are and are lost to [UNK]."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.documents, self.bytes, self.tokens = 0, 0, np.zeros(tokenizer.vocab_size, np.int64)
        self.characters = self.lost = 0
        self._lengths = np.zeros(tokenizer.vocab_size, np.int64)  # characters that a token stands for
        for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
            self._lengths[id] = len(token.removeprefix("##").lstrip("▁"))

    def look(self, chunk: str, ids: np.ndarray) -> None:
        """Count the bytes of `chunk`, and the characters that its tokens do not spell."""
        self.bytes += len(chunk.encode())
        characters = len(chunk) - chunk.count(" ") - chunk.count("\n")
        self.characters += characters
        known = ids[ids != self.tokenizer.unk_id] if self.tokenizer.unk_id is not None else ids
        if len(known) < len(ids):  # elsewhere a difference is the normalizer's
            self.lost += max(len(ids) - len(known), characters - int(self._lengths[known].sum()))

    def unknown(self) -> dict[str, float]:
        """The shares of the tokens that are [UNK], and of the characters that it stands for: the manifest's entry."""
        tokens = 0 if self.tokenizer.unk_id is None else int(self.tokens[self.tokenizer.unk_id])
        shares = tokens / max(1, self.tokens.sum()), self.lost / max(1, self.characters)
        return dict(zip(("tokens", "characters"), (round(float(share), 6) for share in shares)))

    def check_unknown(self) -> None:
        """ValueError where nearly all of the text is [UNK], and a warning where much of it is."""
        found = self.unknown()
        worst = max(found.values())
        says = (
            f"{found['tokens']:.1%} of the tokens are [UNK], which stands for {found['characters']:.1%} of the "
            f"characters: words of more than {LONGEST} characters, or with characters that the vocabulary lacks; give "
            "text with spaces between words, or a tokenizer that was trained on such text"
        )
        if worst >= _REFUSED:
            raise ValueError(f"data: expected text that the tokenizer can spell, but {says}")
        if worst >= _WARNED:
            warnings.warn(f"data: {says}", stacklevel=3)

    def count(self, documents: Iterable[np.ndarray], report: Report) -> Iterator[np.ndarray]:
        for ids in documents:
            if ids.size:
                self.documents += 1
                np.add.at(self.tokens, ids, 1)
                yield ids
            else:
                report.kept -= 1
                report.reject("no tokens", f"kept document {self.documents}")
