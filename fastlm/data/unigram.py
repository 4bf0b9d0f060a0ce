"""Unigram vocabularies (Kudo 2018, arXiv:1804.10959), learned by SentencePiece from the counts of words.

`tokenizers` has a trainer too, whose scores differ from run to run in the fourth decimal, with one thread as well: its
counts come from a randomly seeded hash map (LOG.md). SentencePiece with one thread gives the same bits; given words and
their counts, it takes 3 s for a megabyte.

A word is a run without white space, with the one space before it, written ▁ (U+2581). Other white space stands alone.
A word is learned from in cuts of 100 characters: in scripts without spaces it is as long as a paragraph.
Every character is spelled: by a piece, or by the pieces of its bytes. So a text comes back as it was; only a ▁ in it
becomes a space.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from fastlm.data._extras import require
from fastlm.data.vocabulary import SENTINELS, SPECIAL, finish

_WORD = re.compile(r" \S{1,99}|\S{1,100}")
_UNKNOWN = "▅"  # stands for unknown characters in SentencePiece's trainer, which refuses it as a piece: bytes spell it
_ASCII = [chr(code) for code in range(33, 127)]
_ALONE = ["▁", "\n", "\t"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_NEVER = -1e9  # the score of a piece that is for its role alone: no path through a text takes it


def smallest_unigram(purpose: str) -> int:
    """The least `vocab_size`: 256 bytes, the special tokens, and ASCII twice."""
    special = len(set(_roles(purpose).values())) + (SENTINELS if purpose == "span" else 0)
    return special + len(_BYTES) + len(_ALONE) + 2 * len(_ASCII)


def _roles(purpose: str) -> dict[str, str]:
    return {"unk_token": "<|unknown|>", **SPECIAL[purpose]}


def train_unigram(texts: Iterable[str], vocab_size: int, purpose: str) -> tuple[tokenizers.Tokenizer, dict]:
    """(backend, tokenizer_config.json) of at most `vocab_size` tokens. The special tokens have the last ids.

    vocab_size: at least `smallest_unigram`
    """
    roles = _roles(purpose)
    unknown = roles["unk_token"]
    learned = _learn(texts, vocab_size - smallest_unigram(purpose) + 2 * len(_ASCII))
    least = min(learned.values(), default=0.0) - 1.0
    pieces = {unknown: _NEVER, **dict.fromkeys(_BYTES, _NEVER), **dict.fromkeys([*_ALONE, *_ASCII], least), **learned}
    backend = tokenizers.Tokenizer(models.Unigram(list(pieces.items()), unk_id=0, byte_fallback=True))
    spaces = {"replacement": "▁", "prepend_scheme": "never"}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(**spaces), pre_tokenizers.Split(Regex(r"\s"), "isolated")]
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**spaces), decoders.Fuse()])
    return finish(backend, roles, purpose)


def _learn(texts: Iterable[str], room: int) -> dict[str, float]:
    """Log probabilities of at most `room` pieces, ASCII and the most frequent characters among them. {}: no text"""
    counts, letters = Counter(), Counter()
    for text in texts:
        counts.update(_WORD.findall(text))
    for word, count in counts.items():
        for letter in word.replace("▁", " "):
            letters[letter] += count
    others = sorted(letters.keys() - {*_ASCII, " ", _UNKNOWN}, key=lambda letter: (-letters[letter], letter))
    alphabet = [*_ASCII, *others[: room // 2 - len(_ASCII)]]
    other = re.compile(f"[^ {re.escape(''.join(alphabet))}]+")
    parts = Counter()
    for word, count in counts.items():
        for part in other.split(word):
            if part.strip():
                parts[part] += count
    if not parts:
        return {}
    lines = (f"{word}\t{count}" for word, count in sorted(parts.items(), key=lambda entry: (-entry[1], entry[0])))
    spm, model = require("sentencepiece"), io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        input_format="tsv",
        model_writer=model,
        model_type="unigram",
        vocab_size=room,
        hard_vocab_limit=False,  # a small corpus yields fewer
        num_threads=1,  # of more, the order of sums is not the same each time
        character_coverage=1.0,
        required_chars="".join(alphabet),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    found = spm.SentencePieceProcessor(model_proto=model.getvalue())
    # Six decimals: `tokenizers` does not read 17 digits back to the same bits.
    scores = ((found.id_to_piece(id), found.get_score(id)) for id in range(len(found)) if not found.is_unknown(id))
    return {piece: round(score, 6) for piece, score in scores}
