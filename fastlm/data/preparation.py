"""`prepare`: text -> cleaning -> tokenizer -> packed rows -> shards and a manifest, written whole or not at all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from fastlm.data import cleaning
from fastlm.data._checks import integer
from fastlm.data.packing import MIN_PIECE, encode_documents, pack
from fastlm.data.shards import FORMAT, VERSION, Dataset, open_dataset, read_manifest, tokenizer_checksum, write_shard
from fastlm.data.sources import (
    DOCUMENTS,
    MANIFEST,
    TOKENIZER,
    Report,
    SourceFile,
    find_files,
    is_prepared,
    read_documents,
)
from fastlm.data.tokenizer import LONGEST, Tokenizer, parse
from fastlm.storage import NoSpace, atomic_directory, file_checksum, json_checksum, write_json

_SHARD_TOKENS = 1 << 24  # 32 MiB of two-byte tokens in a shard: one is held in memory while preparing

_WARNED, _REFUSED = 0.05, 0.9  # shares of [UNK]

Progress = Callable[[str, int, int], None]


def prepare(
    paths,
    tokenizer,
    out,
    *,
    row_tokens: int = 128,
    documents: str = "file",
    min_chars: int = 8,
    shard_rows: int | None = None,
    outputs: Iterable = (),
    progress: Progress | None = None,
) -> Dataset:
    """Prepare the text in `paths` for training, into the directory `out`, and open it.

    paths       files and directories; see `fastlm.data.sources`
    tokenizer   "train:8192" to train a WordPiece of that size on this text, a directory to load, or a `Tokenizer`
    row_tokens  length of a row, at least 8: the longest piece of a document that the model sees
    documents   what of a plain-text file is a document: "file", "line", or "blank" (between blank lines)
    min_chars   a document of fewer characters is dropped
    shard_rows  rows in a shard file; the default makes 32 MiB
    outputs     directories that the caller writes: not read where they lie inside one of `paths`
    progress    called as progress(stage, bytes done, bytes in all) now and then; the stages are "checksums",
                "tokenizer" (two passes over the text, only where one is trained) and "rows"

    Where `out` already holds the same preparation (same text, settings and tokenizer), it is opened as it is;
    so it is where another process prepared the same meanwhile. ValueError where it holds anything else or cannot be
    written, for a missing path, a bad setting, a corpus of which nothing is left, or one that the tokenizer cannot
    spell: [UNK] is nine tenths of its tokens, or stands for nine tenths of its characters. A twentieth warns.
    """
    out = Path(out)
    row_tokens = integer("row_tokens", row_tokens, MIN_PIECE)
    min_chars = integer("min_chars", min_chars, 0)
    if documents not in DOCUMENTS:
        raise ValueError(f"documents: expected one of {', '.join(DOCUMENTS)}, got {documents!r}")
    if shard_rows is None:
        shard_rows = max(1, _SHARD_TOKENS // row_tokens)
    shard_rows = integer("shard_rows", shard_rows, 1)
    tokenizer = parse(tokenizer)
    progress = progress or (lambda stage, done, total: None)

    report = Report()
    files = find_files(paths, report, outputs=outputs)
    settings = {
        "row_tokens": row_tokens,
        "documents": documents,
        "min_chars": min_chars,
        "shard_rows": shard_rows,
        "tokenizer": f"train:{tokenizer}" if isinstance(tokenizer, int) else tokenizer.hash,
    }
    identity = json_checksum([VERSION, cleaning.VERSION, settings, _contents(files, progress)])
    if os.path.exists(out) and not (out.is_dir() and not any(out.iterdir())):
        return _already(out, identity)

    total = sum(file.size for file in files)

    def texts(stage: str, report: Report) -> Iterator[str]:
        for text in cleaning.clean_documents(read_documents(files, documents, report), report, min_chars):
            progress(stage, report.bytes_read, total)
            yield text
        progress(stage, total, total)

    try:
        # The rows written so far, scaled to all of the text; the tokenizer is small.
        with _target(out, lambda written: int(written * total / max(1, report.bytes_read))) as partial:
            if isinstance(tokenizer, int):
                tokenizer = Tokenizer.train(lambda: texts("tokenizer", Report()), tokenizer)
            counts = _Counts(tokenizer)
            ids = counts.count(encode_documents(texts("rows", report), tokenizer, counts.look), report)
            shards = [
                write_shard(partial, f"{index:05d}", shard)
                for index, shard in enumerate(pack(ids, tokenizer, row_tokens, shard_rows))
            ]
            if not shards:
                given = ", ".join(file.name for file in files[:5])
                raise ValueError(f"data: no text is left of {report.read} records in {given}: {report.reasons()}")
            counts.check_unknown()
            tokenizer.save(partial / TOKENIZER)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "preparation": identity,
                "settings": settings,
                "row_tokens": row_tokens,
                "tokenizer": {
                    "hash": tokenizer.hash,
                    "vocab_size": tokenizer.vocab_size,
                    "checksum": tokenizer_checksum(partial),
                },
                "rows": sum(shard["rows"] for shard in shards),
                "documents": counts.documents,
                "text_tokens": int(counts.tokens.sum()),
                "unigram_entropy": counts.entropy(tokenizer.special_ids),
                "unknown": counts.unknown(),
                "report": report.as_dict(),
                "shards": shards,
            }
            write_json(partial / MANIFEST, {**manifest, "checksum": json_checksum(manifest)})
    except FileExistsError:  # another process finished meanwhile
        return _already(out, identity)
    return open_dataset(out)


def _already(out: Path, identity: str) -> Dataset:
    """What lies in `out`, where it is the preparation `identity`."""
    if is_prepared(out) and read_manifest(out)["preparation"] == identity:
        return open_dataset(out)
    raise ValueError(f"out: {out} exists and holds something else; name another directory, or delete it")


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
    """What passes from the tokenizer to the rows: documents, how often each token occurs (vocab_size,) int64, and how
    many characters, white space aside, there are and are lost to [UNK]."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.documents, self.tokens = 0, np.zeros(tokenizer.vocab_size, np.int64)
        self.characters = self.lost = 0
        self._lengths = np.zeros(tokenizer.vocab_size, np.int64)  # characters that a token stands for
        for token, id in tokenizer.backend.get_vocab(with_added_tokens=True).items():
            self._lengths[id] = len(token.removeprefix("##").lstrip("▁"))

    def look(self, chunk: str, ids: np.ndarray) -> None:
        """Count the characters of `chunk` that its tokens do not spell."""
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

    def entropy(self, special_ids: Iterable[int]) -> float:
        """-sum p ln p over the tokens that are not special, in nats: 0 where there are none."""
        counts = np.delete(self.tokens, list(special_ids))
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())
