"""Vocabularies that are learned here: byte-level BPE and characters. (`Tokenizer.train` itself learns WordPiece, and
`fastlm.data.unigram` Unigram.)

Which special tokens a vocabulary begins with depends on what it is for (`SPECIAL`):

masked   [PAD] [UNK] [CLS] [SEP] [MASK], BERT's
causal   <|endoftext|>, GPT-2's, which begins and ends every document; <|unknown|> with characters
span     <pad> </s> <unk>, T5's, and its sentinels <extra_id_99> ... <extra_id_0>, which come last

Byte-level BPE spells any text: it has no unknown token. A character that the corpus lacks is unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

SENTINELS = 100  # T5's; also the most spans that a piece of a document can lose
_END = "<|endoftext|>"
_SENTINEL_NAMES = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]

# role -> token, as tokenizer_config.json names the roles
SPECIAL: dict[str, dict[str, str]] = {
    "masked": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "causal": {"bos_token": _END, "eos_token": _END},
    "span": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}

Texts = Callable[[], Iterable[str]]


def smallest_bpe(purpose: str) -> int:
    """The least `vocab_size`: 256 bytes and the special tokens."""
    return 256 + len(set(SPECIAL[purpose].values())) + (SENTINELS if purpose == "span" else 0)


def train_bpe(texts: Iterable[str], vocab_size: int, purpose: str) -> tuple[tokenizers.Tokenizer, dict]:
    """(backend, tokenizer_config.json) of a byte-level BPE (Radford et al. 2019) of at most `vocab_size` tokens.

    The 256 bytes and the special tokens are always in it. vocab_size: at least `smallest_bpe`
    """
    roles = SPECIAL[purpose]
    special = list(dict.fromkeys(roles.values()))
    last = _SENTINEL_NAMES if purpose == "span" else []
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(last),
        min_frequency=2,
        initial_alphabet=alphabet,
        special_tokens=special,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.ByteLevel()
    return finish(backend, roles, purpose)


def train_characters(texts: Texts, purpose: str) -> tuple[tokenizers.Tokenizer, dict]:
    """(backend, tokenizer_config.json) of a vocabulary of every character in the texts, ordered by code point."""
    found = Counter()
    for text in texts():
        found.update(text)
    roles = {"unk_token": "<|unknown|>", **SPECIAL[purpose]}
    special = list(dict.fromkeys([*SPECIAL[purpose].values(), roles["unk_token"]]))
    vocab = {token: id for id, token in enumerate([*special, *sorted(found)])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=roles["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return finish(backend, roles, purpose)


def finish(backend: tokenizers.Tokenizer, roles: dict[str, str], purpose: str) -> tuple[tokenizers.Tokenizer, dict]:
    """Special tokens, sentinels, and what is put around a text that a model reads."""
    special = list(dict.fromkeys(roles.values()))
    config = {**roles, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if purpose == "span":
        special += _SENTINEL_NAMES
        config["additional_special_tokens"] = _SENTINEL_NAMES
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ids = {token: backend.token_to_id(token) for token in special}
    if purpose == "masked":
        cls, sep = roles["cls_token"], roles["sep_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
        )
    elif purpose == "span":
        end = roles["eos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, ids[end])]
        )
    return backend, config
