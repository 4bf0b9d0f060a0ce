"""The tokenizer: trained here (WordPiece, byte-level BPE, Unigram, characters), or any Hugging Face directory of one.

It is saved in Transformers' layout, so `transformers.AutoTokenizer.from_pretrained(dir)` gives the same ids.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastlm.data._checks import integer
from fastlm.data._extras import require
from fastlm.data.sample import Sample
from fastlm.data.unigram import smallest_unigram, train_unigram
from fastlm.data.vocabulary import SPECIAL, smallest_bpe, train_bpe, train_characters
from fastlm.storage import json_checksum, write_json

_BERT = SPECIAL["masked"]
_ROLES = (*_BERT, "bos_token", "eos_token")
_USUAL = {"masked": "wordpiece", "causal": "bpe", "span": "bpe"}  # the kind that "train:N" means
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_ALPHABET = 1000  # the most characters a trained vocabulary spells words with, as in BERT; the rest become [UNK]
_SMALLEST = 16  # below it there is no room for letters
_LARGEST = 1 << 24  # the trainer reserves memory for this many at once
_CHUNK_CHARS = 1 << 15  # a long text is normalised in cuts of about this length: it takes 75 bytes a character
LONGEST = 100  # characters of a word; a longer one is [UNK] whole, as in BERT
# What the trainer's memory grows with: characters of distinct words, at 120 bytes each. English has 1 M in 100 MB.
_DISTINCT = 4_000_000
# Bytes of the text that a tokenizer is trained on. A word takes a byte at least, so that its count fits 31 bits.
SAMPLE, LARGEST_SAMPLE = 1 << 28, (1 << 31) - 1
VERSION = 1  # of BPE and Unigram as they are trained here: another one may give other tokens of the same text
TRAINED_ON = "trained_on"  # in tokenizer_config.json: {"bytes": of the sample, "of": all of the text}
_WORD = re.compile(r"\s*(\S+)")
# What may be a word that is too long: a run without white space, ASCII or general punctuation, or Chinese characters.
_CHINESE = r"\u3400-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_LONG = re.compile(rf"[^\s!-/:-@\[-`{{-~\u2000-\u206f\u3000-\u303f{_CHINESE}]{{{LONGEST + 1},}}")
# Transformers' tokenizers that are BERT's around a vocab.txt; others (BertJapanese, Bertweet) split words otherwise.
_VOCAB_TXT = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer", "LayoutLMTokenizer")
_RESAVE = "load it with Transformers' AutoTokenizer and save_pretrained it there"
# What a tokenizer needs, by the purpose of the rows, and whose has it.
_NEEDED = {
    "masked": (("pad_token", "cls_token", "sep_token", "mask_token"), "a masked language model's (BERT, RoBERTa)"),
    "causal": (("eos_token",), "a causal language model's (GPT-2)"),
    "span": (("pad_token", "eos_token"), "T5's"),
}


class Tokenizer:
    """A `tokenizers.Tokenizer` with the roles of its special tokens.

    vocab_size      one more than the largest id
    pad_id, cls_id, sep_id, mask_id, bos_id, eos_id     None for a role that it has no token for
    sentinel_ids    T5's <extra_id_0>, <extra_id_1> ... in this order; () without
    unk_id          None where there is no unknown token
    special_ids     sorted tuple of every special token's id, [UNK] among them, as Transformers' all_special_ids
    hash            SHA-256 of the vocabulary, rules and roles: equal hashes give equal ids
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict):
        """`config` is the content of a tokenizer_config.json; it names the special tokens."""
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.config = backend, config
        vocab = backend.get_vocab(with_added_tokens=True)
        roles = {role: _token(config.get(role)) for role in _ROLES if role in _BERT or config.get(role)}
        self.vocab_size = max(vocab.values()) + 1
        self._roles = {role: vocab.get(token) for role, token in roles.items()}
        self.pad_id, self.cls_id, self.sep_id, self.mask_id, self.bos_id, self.eos_id = (
            self._roles.get(f"{role}_token") for role in ("pad", "cls", "sep", "mask", "bos", "eos")
        )
        sentinels = {int(match[1]): id for token, id in vocab.items() if (match := _SENTINEL.fullmatch(token))}
        self.sentinel_ids = tuple(sentinels[i] for i in sorted(sentinels))
        added = (id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        self.special_ids = tuple(sorted({*added, *(vocab[token] for token in roles.values() if token in vocab)}))
        self.unk_id = self._roles.get("unk_token")
        self._reserved = set(self.special_ids) - {self.unk_id}
        self.hash = json_checksum([json.loads(backend.to_str()), roles])

    @classmethod
    def load(cls, directory) -> Tokenizer:
        """Read a directory as Transformers writes it: tokenizer.json, or the vocab.txt of a BERT."""
        directory = Path(directory)
        if not directory.is_dir():
            raise ValueError(f"tokenizer: expected `train:8192` or a tokenizer's directory, got {str(directory)!r}")
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (directory / name).is_file():
                config.update(_read_json(directory / name))
        if (directory / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            except Exception as error:  # the library raises bare Exceptions
                raise ValueError(f"tokenizer: {directory / 'tokenizer.json'} cannot be read: {error}") from error
        elif (directory / "vocab.txt").is_file():
            config = {**_BERT, "tokenizer_class": "BertTokenizer", **config}
            if str(config["tokenizer_class"]).removesuffix("Fast") not in _VOCAB_TXT:
                raise ValueError(
                    f"tokenizer: expected a tokenizer.json for the {config['tokenizer_class']} in {directory}, since a "
                    f"vocab.txt alone is read as BERT's; {_RESAVE}"
                )
            try:
                words = (directory / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"tokenizer: {directory / 'vocab.txt'} is not UTF-8: {error}") from error
            backend = _wordpiece({word: id for id, word in enumerate(words)}, config)
        else:
            raise ValueError(
                f"tokenizer: expected a tokenizer.json or a vocab.txt in {directory}, found neither; {_RESAVE}"
            )
        vocab = backend.get_vocab(with_added_tokens=True)
        for role, token in _BERT.items():  # a lone tokenizer.json names no roles; BERT's names speak for themselves
            if not config.get(role) and token in vocab:
                config[role] = token
        return cls(backend, config)

    def check(self, purpose: str) -> None:
        """ValueError for a missing special token that rows of this purpose ("masked", "causal", "span") need."""
        roles, whose = _NEEDED[purpose]
        remedy = f"train one with `train:8192`, or name the directory of {whose}"
        for role in roles:
            if self._roles.get(role) is None:
                raise ValueError(f"tokenizer: expected one with a {role} for {purpose} rows, found none; {remedy}")
        if purpose == "span" and not self.sentinel_ids:
            raise ValueError(f"tokenizer: expected one with sentinels (<extra_id_0> ...), found none; {remedy}")

    def check_size(self, vocab_size: int, directory) -> None:
        """ValueError for ids that the model in `directory` does not have. Its vocabulary may be rounded up."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"model: expected a tokenizer of at most the model's {vocab_size} tokens in {directory}, got one of "
                f"{self.vocab_size}; put the model's own there"
            )

    @classmethod
    def train(
        cls,
        texts: Callable[[], Iterable[str]],
        vocab_size: int | None = None,
        kind: str | None = None,
        purpose: str = "masked",
    ) -> Tokenizer:
        """A tokenizer of at most `vocab_size` tokens, learned from the texts.

        texts    is called once or twice, and must give the same texts each time. A small corpus yields fewer tokens
        kind     "wordpiece": lower-casing, BERT's; "bpe": byte-level, GPT-2's; "unigram": T5's, by SentencePiece (the
                 extra `unigram`); "chars": every character of the texts, whatever `vocab_size`; None: WordPiece for
                 masked rows, BPE for others
        purpose  "masked", "causal" or "span": the special tokens are BERT's, GPT-2's or T5's

        The result depends on the texts alone. WordPiece: [PAD] [UNK] [CLS] [SEP] [MASK] have the ids 0 to 4.
        WordPiece learns nothing from words of more than 100 characters, which it could not encode either. Both learn
        nothing, with a warning, from words that are first seen after four million characters of distinct ones: 600 MB
        at most. Unigram is as BPE in this.
        """
        kind = check_trainable(kind, vocab_size, purpose)
        if kind == "chars":
            return cls(*train_characters(texts, purpose))
        vocab_size = int(vocab_size)
        if kind in ("bpe", "unigram"):
            train = train_bpe if kind == "bpe" else train_unigram
            cuts = (chunk for text in texts() for chunk in chunks(text))
            return cls(*train(_bounded(cuts), vocab_size, purpose))
        return cls._train_wordpiece(texts, vocab_size)

    @classmethod
    def _train_wordpiece(cls, texts: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
        draft = _wordpiece({token: id for id, token in enumerate(_BERT.values())}, _BERT)
        counts = Counter()
        for text in texts():
            for chunk in chunks(text):
                counts.update(draft.normalizer.normalize_str(chunk))
        letters = [letter for letter in counts if not letter.isspace()]
        limit = min(_ALPHABET, (vocab_size - len(_BERT)) // 2)  # a letter may take two ids: "a" and "##a"
        letters = sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:limit])
        inner = ["##" + letter for letter in letters if len(draft.pre_tokenizer.pre_tokenize_str("a" + letter)) == 1]
        # The trainer numbers inner letters in the order of a randomly seeded hash map, and breaks ties between merges
        # by number, so two runs differ. Letters given as "special" tokens keep the order given.
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            special_tokens=[*_BERT.values(), *letters, *inner],
            show_progress=False,
        )
        draft.train_from_iterator(_bounded(_words_to_learn(texts())), trainer)
        vocab = json.loads(draft.to_str())["model"]["vocab"]
        config = {**_BERT, "tokenizer_class": "BertTokenizer", "do_lower_case": True}
        return cls(_wordpiece(vocab, config), config)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as a model reads it: between [CLS] and [SEP], with special tokens in it recognised."""
        return self.backend.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as a corpus holds it: none added, and a "[MASK]" in it is seven ordinary characters.

        A Unigram model may hold "<mask>" among its pieces and has no other way to spell it: that becomes the unknown
        token, or nothing where there is none. No other special token is ever in the result.
        """
        self.backend.encode_special_tokens = True
        try:
            rows = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            self.backend.encode_special_tokens = False
        return [ids if self._reserved.isdisjoint(ids) else self._without_reserved(ids) for ids in rows]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids (n,), offsets (n, 2)), int64, of each text: the ids of `encode_batch`, and the characters of each token.

        A token is text[offset[0] : offset[1]], whatever the tokenizer made of case and accents.
        """
        self.backend.encode_special_tokens = True
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = False
        found = []
        for encoding in encodings:
            ids, offsets = np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2)
            if not self._reserved.isdisjoint(encoding.ids):
                reserved = np.isin(ids, list(self._reserved))
                if self.unk_id is None:
                    ids, offsets = ids[~reserved], offsets[~reserved]
                else:
                    ids[reserved] = self.unk_id
            found.append((ids, offsets))
        return found

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int]]]:
        """(ids, places) of each sentence of words, none added: `places` has where each word's first token is, or -1.

        A word has no token where the tokenizer makes nothing of it, as of a control character.
        """
        self.backend.encode_special_tokens = True
        try:
            encodings = self.backend.encode_batch(sentences, is_pretokenized=True, add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = False
        out = []
        for sentence, encoding in zip(sentences, encodings, strict=True):
            places = [-1] * len(sentence)
            for place, word in reversed(list(enumerate(encoding.word_ids))):
                places[word] = place
            out.append((encoding.ids, places))
        return out

    def _without_reserved(self, ids: list[int]) -> list[int]:
        if self.unk_id is None:
            return [id for id in ids if id not in self._reserved]
        return [self.unk_id if id in self._reserved else id for id in ids]

    def word_starts(self) -> np.ndarray:
        """(vocab_size,) bool: the tokens that begin a word, special ones among them.

        WordPiece continues a word with "##"; byte-level BPE and SentencePiece begin one with a space.
        """
        wordpiece = isinstance(self.backend.model, models.WordPiece)
        starts = np.ones(self.vocab_size, bool)
        for token, id in self.backend.get_vocab(with_added_tokens=True).items():
            starts[id] = not token.startswith("##") if wordpiece else token.startswith(("Ġ", "▁", "Ċ"))
        starts[list(self.special_ids)] = True
        return starts

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    def save(self, directory) -> None:
        """Write tokenizer.json and tokenizer_config.json, and vocab.txt for a WordPiece, into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        write_json(directory / "tokenizer_config.json", self.config)
        vocab = self.backend.get_vocab(with_added_tokens=True)
        if isinstance(self.backend.model, models.WordPiece) and len(vocab) == self.vocab_size:
            words = sorted(vocab, key=vocab.get)
            (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def check_trainable(kind: str | None, vocab_size: int | None, purpose: str) -> str:
    """The kind that `Tokenizer.train` trains. ValueError for one of these that does not fit the others."""
    kind = kind or _USUAL[purpose]
    if kind == "chars":
        return kind
    integer("vocab_size", vocab_size, _SMALLEST, _LARGEST)
    if kind == "wordpiece" and purpose != "masked":
        raise ValueError(
            f"tokenizer: expected bpe, unigram or chars for {purpose} rows, got wordpiece, which loses spaces"
        )
    least, what = {
        "wordpiece": (_SMALLEST, ""),
        "bpe": (smallest_bpe(purpose), f"byte-level BPE (256 bytes and the special tokens of {purpose} rows)"),
        "unigram": (
            smallest_unigram(purpose),
            f"Unigram of {purpose} rows (256 bytes, the special tokens, and pieces)",
        ),
    }[kind]
    if vocab_size < least:
        raise ValueError(f"tokenizer: expected at least {least} tokens for a {what}, got {vocab_size}")
    return kind


def chunks(text: str) -> Iterator[str]:
    """`text` in cuts of about `_CHUNK_CHARS` characters; tokens are the same but where so many have no space."""
    start = 0
    while start < len(text):
        end = start + _CHUNK_CHARS
        if end < len(text):
            # A byte-level tokenizer keeps a space with the word after it, so the cut comes before the white space.
            space = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end))
            end = space if space > 0 else end
        yield text[start:end]
        start = end


def _words_to_learn(texts: Iterable[str]) -> Iterator[str]:
    """The texts in chunks, without words that are too long for WordPiece."""
    # Not the rules of the tokenizer that is trained: it is locked meanwhile.
    rules = _wordpiece({token: id for id, token in enumerate(_BERT.values())}, _BERT)

    def short(run: re.Match) -> str:
        words = rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(run[0]))
        return " ".join(word for word, _ in words if len(word) <= LONGEST)

    return (_LONG.sub(short, chunk) for text in texts for chunk in chunks(text))


def _bounded(chunks: Iterable[str]) -> Iterator[str]:
    """The chunks without words, and the white space before them, that are new after _DISTINCT characters."""
    known, room, left_out = set(), _DISTINCT, 0
    for chunk in chunks:
        new = set(chunk.split()) - known
        room -= sum(map(len, new))
        if room >= 0:
            known |= new
            yield chunk
        else:
            room = -1  # a later chunk with fewer new words would be learned otherwise
            left_out += len(new)
            yield "".join(word[0] for word in _WORD.finditer(chunk) if word[1] not in new)
    if left_out:
        warnings.warn(
            f"tokenizer: it learns from the first {len(known):,} distinct words of the text, "
            f"{_DISTINCT / 1e6:g} MB of them, wherever they occur; words that were first seen later are left out",
            stacklevel=2,
        )


def _token(entry) -> str | None:
    """A special token as tokenizer_config.json gives it: a string, or an object with its "content"."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer: {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer: expected a JSON object in {path}, got a {type(content).__name__}")
    return content


def _wordpiece(vocab: dict[str, int], config: dict) -> tokenizers.Tokenizer:
    """BERT's tokenizer around `vocab`, as Transformers builds it from a vocab.txt."""
    tokens = {role: _token(config[role]) for role in _BERT}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=tokens["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens([token for token in tokens.values() if token in vocab])
    cls, sep = tokens["cls_token"], tokens["sep_token"]
    if cls in vocab and sep in vocab:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
        )
    return backend


@dataclass(frozen=True)
class ToTrain:
    """A tokenizer that is to be trained: a kind, or None for the purpose's usual one, and a size, None for "chars".

    sample: the most bytes of text that it is trained on (`fastlm.data.sample.Sample`)
    """

    kind: str | None
    size: int | None
    sample: int = SAMPLE

    def train(self, texts: Callable[[], Iterable[str]], purpose: str, directory=None) -> Tokenizer:
        """`Tokenizer.train` on a sample of the texts, whose size is in the tokenizer's configuration, TRAINED_ON.

        A text of more than 32,768 characters is chosen in parts. directory: of the temporary file
        """
        with Sample(self.sample, directory) as sample:
            sample.add(chunk for text in texts() for chunk in chunks(text))
            if sample.total and not sample.size:
                raise ValueError(
                    f"tokenizer_sample: expected more than {self.sample:,} bytes for {sample.total:,} bytes of text, "
                    "none of which is chosen by so few"
                )
            tokenizer = Tokenizer.train(sample.texts, self.size, self.kind, purpose)
        tokenizer.config[TRAINED_ON] = {"bytes": sample.size, "of": sample.total}
        return tokenizer

    def versions(self, purpose: str) -> list[int]:
        """Of the code that the tokens depend on; WordPiece and characters are those of version 0.1."""
        return [VERSION] if (self.kind or _USUAL[purpose]) in ("bpe", "unigram") else []

    def __str__(self) -> str:
        return "chars" if self.kind == "chars" else f"{self.kind or 'train'}:{self.size}"


def parse(tokenizer, sample: int = SAMPLE) -> Tokenizer | ToTrain:
    """What a `tokenizer` argument says: a `Tokenizer`, given or loaded from a directory, or one to train.

    "train:8192" (the purpose's usual kind), "wordpiece:8192", "bpe:8192", "unigram:8192", "chars".

    sample: of `ToTrain`, from 2^16 to 2^31 - 1
    """
    if isinstance(tokenizer, (Tokenizer, ToTrain)):
        return tokenizer
    sample = integer("tokenizer_sample", sample, 1 << 16, LARGEST_SAMPLE)
    if not isinstance(tokenizer, (str, os.PathLike)) or not os.fspath(tokenizer):
        raise ValueError(f"tokenizer: expected `train:8192`, a tokenizer's directory or a Tokenizer, got {tokenizer!r}")
    if str(tokenizer) == "chars":
        return ToTrain("chars", None, sample)
    kind, colon, size = str(tokenizer).partition(":")
    if kind not in ("train", "wordpiece", "bpe", "unigram") or not colon:
        return Tokenizer.load(tokenizer)
    if not size.isdecimal() or not _SMALLEST <= int(size) <= _LARGEST:
        raise ValueError(
            f"tokenizer: expected {kind}:N, as {kind}:8192, with N from {_SMALLEST} to {_LARGEST}; got {tokenizer!r}"
        )
    if kind == "unigram":
        require("sentencepiece")
    return ToTrain(None if kind == "train" else kind, int(size), sample)
