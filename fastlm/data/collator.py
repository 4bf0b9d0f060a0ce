"""Transformers' collator for language models on `fastlm.ops.mlm_mask`: rows of different lengths in, a batch out."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence

import torch
from torch.utils.data import get_worker_info

from fastlm import ops
from fastlm.data._checks import integer

_WORKERS = 1024  # of a DataLoader, each with a count of its own
_FORMATS = ("pt", "np")


class DataCollatorForLanguageModeling:
    """transformers.DataCollatorForLanguageModeling (arguments, defaults, keys of the batch), masking by one op.

    Args:
        tokenizer: a Transformers tokenizer.
        mlm: masked tokens to predict; False: `labels` are the input, -100 where it is the padding token. Where that is
            the end-of-text token too, as often in GPT-2, an end of text is a label only where the rows have an
            attention_mask that says that it is real; Transformers' collator never makes it one.
        whole_word_mask: select whole words, replaced as any other token. Words come from a column `word_ids` (what
            encoding.word_ids() gives) or `offset_mapping`, else from the "##" of a WordPiece vocabulary.
        mlm_probability, mask_replace_prob, random_replace_prob: as of fastlm.ops.mlm_mask; without mlm, the first is
            not read and may be None.
        pad_to_multiple_of: of the length of a row.
        return_tensors: "pt", or "np" for NumPy arrays.
        seed: of the masks. None: 0, and masks of rows without a `sample_id` come from torch's generator.

    A column `sample_id` (one integer a row) makes a mask a function of (seed, epoch, sample_id, position): the same in
    any batch, worker or order. `set_epoch` then says which masks are next; without it every epoch has the same ones.
    Trainer keeps the column with remove_unused_columns=False. Rows without one draw their sample ids, so that every
    pass has other masks: with a `seed`, from the seed, the number of the call, and in a DataLoader the worker and how
    many workers of its number there were before; two collators of one seed then make the same masks. Without a seed,
    from torch's generator, in a worker that worker's.

    A column `special_tokens_mask` says which tokens are never selected, else tokenizer.all_special_ids do. Unlike
    Transformers' collator, rows given as bare lists get an attention_mask where they were padded.
    """

    def __init__(
        self,
        tokenizer,
        mlm: bool = True,
        whole_word_mask: bool = False,
        mlm_probability: float | None = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
        seed: int | None = None,
    ) -> None:
        self.return_tensors = _format(return_tensors)
        if mlm and tokenizer.mask_token_id is None:
            raise ValueError(
                f"tokenizer: expected one with a mask token, got a {type(tokenizer).__name__} without; pass mlm=False "
                "to train a causal language model"
            )
        if whole_word_mask and not mlm:
            raise ValueError("whole_word_mask: expected False with mlm=False")
        for name, p in (
            *((("mlm_probability", mlm_probability),) if mlm else ()),
            ("mask_replace_prob", mask_replace_prob),
            ("random_replace_prob", random_replace_prob),
        ):
            if not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
                raise ValueError(f"{name}: expected a probability in [0, 1], got {p!r}")
        if mask_replace_prob + random_replace_prob > 1.0:
            raise ValueError(
                "mask_replace_prob, random_replace_prob: expected a sum of at most 1, "
                f"got {mask_replace_prob} + {random_replace_prob}"
            )
        self.tokenizer, self.mlm, self.whole_word_mask = tokenizer, mlm, whole_word_mask
        self.mlm_probability, self.pad_to_multiple_of = mlm_probability, pad_to_multiple_of
        self.mask_replace_prob, self.random_replace_prob = mask_replace_prob, random_replace_prob
        self.seed = 0 if seed is None else integer("seed", seed, -(2**63), 2**64 - 1)
        self._draws = None if seed is None else _Draws(self.seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change
        self._inner: torch.Tensor | None = None  # by id: whether a token continues a word

    def set_epoch(self, epoch: int) -> None:
        """Which masks come next for rows with a `sample_id`. Batches that workers have made already keep theirs."""
        self._epoch.fill_(integer("epoch", epoch, 0, 2**32 - 1))

    def __call__(self, examples: Sequence, return_tensors: str | None = None) -> dict:
        """examples: mappings with `input_ids` and what else the tokenizer pads, or bare sequences of ids.

        return_tensors: of this batch; None: the collator's.
        """
        form = self.return_tensors if return_tensors is None else _format(return_tensors)
        batch = self._batch(examples)
        return {key: value.numpy() for key, value in batch.items()} if form == "np" else batch

    def _batch(self, examples: Sequence) -> dict[str, torch.Tensor]:
        rows = [dict(e) if isinstance(e, Mapping) else {"input_ids": e} for e in examples]
        for row in rows:
            if "input_ids" not in row:
                raise ValueError(f"examples: expected a column input_ids in every row, got {', '.join(row) or 'none'}")
        masks_given = all("attention_mask" in row for row in rows)
        words = self._words(examples, rows)
        sample_ids = _sample_ids(rows)
        batch = self._pad(rows)
        special = batch.pop("special_tokens_mask", None)
        ids = batch["input_ids"]
        if not self.mlm:
            batch["labels"] = self._causal_labels(ids, batch["attention_mask"] if masks_given else None)
            return batch
        if sample_ids is None and self._draws is not None:
            sample_ids = self._draws(len(rows))
        elif sample_ids is None:
            sample_ids = torch.randint(-(2**63), 2**63 - 1, (len(rows),))
        special = None if special is None else special.bool()
        special_ids = self.tokenizer.all_special_ids
        left_padded = self.tokenizer.padding_side == "left"
        masked = ops.mlm_mask(
            ids,
            mask_token_id=self.tokenizer.mask_token_id,
            vocab_size=len(self.tokenizer),
            special_ids=special_ids,
            seed=self.seed,
            epoch=int(self._epoch),
            sample_ids=sample_ids,
            positions=_positions(batch.get("attention_mask")) if left_padded else None,
            special_tokens_mask=special,
            mlm_probability=self.mlm_probability,
            mask_replace_prob=self.mask_replace_prob,
            random_replace_prob=self.random_replace_prob,
            word_starts=self._word_starts(ids, words) if self.whole_word_mask else None,
            capacity=0,  # index and targets are not used
        )
        batch["input_ids"], batch["labels"] = masked.input_ids, masked.labels
        return batch

    def _causal_labels(self, ids, attention_mask) -> torch.Tensor:
        pad = self.tokenizer.pad_token_id
        if pad is None:
            return ids.clone()
        padding = ids == pad
        if attention_mask is not None and pad == self.tokenizer.eos_token_id:
            padding &= attention_mask == 0
        return ids.masked_fill(padding, ops.IGNORE_INDEX)

    def _pad(self, rows) -> dict[str, torch.Tensor]:
        """tokenizer.pad, without its advice to tokenize and pad in one call."""
        lengths = {len(row["input_ids"]) for row in rows}
        multiple = self.pad_to_multiple_of or 1
        if all(row.keys() == {"input_ids"} for row in rows) and len(lengths) == 1 and not lengths.pop() % multiple:
            return {"input_ids": torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows])}
        advice = getattr(self.tokenizer, "deprecation_warnings", {})
        before = advice.get("Asking-to-pad-a-fast-tokenizer", False)
        advice["Asking-to-pad-a-fast-tokenizer"] = True
        try:
            return dict(self.tokenizer.pad(rows, return_tensors="pt", pad_to_multiple_of=self.pad_to_multiple_of))
        finally:
            advice["Asking-to-pad-a-fast-tokenizer"] = before

    # ---- whole words

    def _words(self, examples, rows) -> list[list[bool]] | None:
        """For each row whether its tokens start a word, from a column or the encoding; None: from the vocabulary.

        Takes the columns out, which the tokenizer does not pad.
        """
        word_ids, offsets = _column(rows, "word_ids"), _column(rows, "offset_mapping")
        if not self.whole_word_mask:
            return None
        if word_ids is None and all(getattr(example, "encodings", None) for example in examples):
            word_ids = [example.word_ids() for example in examples]
        for name, column in (("word_ids", word_ids), ("offset_mapping", offsets)):
            for row, values in zip(rows, column or ()):
                if len(values) != len(row["input_ids"]):
                    raise ValueError(
                        f"{name}: expected one for each of {len(row['input_ids'])} tokens, got {len(values)}"
                    )
        if word_ids is not None:
            return [[i == 0 or row[i] != row[i - 1] for i in range(len(row))] for row in word_ids]
        if offsets is not None:
            return [[i == 0 or row[i][0] != row[i - 1][1] for i in range(len(row))] for row in offsets]
        return None

    def _word_starts(self, ids, words) -> torch.Tensor:
        """(B, S) bool. A special token ends a word by itself: the op sees to that."""
        if words is None:
            continues = self._continues()
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(continues):
                raise ValueError(
                    f"input_ids: expected ids in [0, {len(continues)}), the tokenizer's vocabulary, got from "
                    f"{int(ids.min())} to {int(ids.max())}"
                )
            return ~continues[ids]
        starts = torch.ones(ids.shape, dtype=torch.bool)
        for row, flags in zip(starts, words):
            where = slice(-len(flags), None) if self.tokenizer.padding_side == "left" else slice(len(flags))
            row[where] = torch.tensor(flags, dtype=torch.bool)
        return starts

    def _continues(self) -> torch.Tensor:
        if self._inner is None:
            inner = torch.zeros(len(self.tokenizer), dtype=torch.bool)
            for token, i in self.tokenizer.get_vocab().items():
                inner[i] = token.startswith("##")
            if not inner.any():
                raise ValueError(
                    'whole_word_mask: expected a column word_ids or offset_mapping, for this vocabulary has no "##"; '
                    "tokenize with return_offsets_mapping=True, and keep the column"
                )
            self._inner = inner
        return self._inner


class _Draws:
    """Sample ids from (seed, worker, how many workers of this number there were before, call).

    A DataLoader without persistent_workers starts new workers for every pass; the shared counts make its masks others.
    """

    def __init__(self, seed: int):
        self.seed, self.calls = seed, 0
        self.process, self.place = os.getpid(), ("main", 0)
        self.started = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()

    def __call__(self, count: int) -> torch.Tensor:
        if (worker := get_worker_info()) is not None and self.process != os.getpid():  # the first call in this worker
            number = worker.id % _WORKERS
            self.process, self.place, self.calls = os.getpid(), (worker.id, int(self.started[number])), 0
            self.started[number] += 1
        draw = random.Random(repr((self.seed, self.place, self.calls)))
        self.calls += 1
        return torch.tensor([draw.getrandbits(64) - 2**63 for _ in range(count)], dtype=torch.int64)


def _format(return_tensors: str) -> str:
    if return_tensors not in _FORMATS:
        raise ValueError(f'return_tensors: expected "pt" or "np", got {return_tensors!r}')
    return return_tensors


def _column(rows, name) -> list | None:
    """Takes a column out of the rows; None where there is none."""
    values = [row.pop(name, None) for row in rows]
    there = sum(value is not None for value in values)
    if 0 < there < len(rows):
        raise ValueError(f"{name}: expected in every row or in none, got it in {there} of {len(rows)}")
    return values if there else None


def _sample_ids(rows) -> torch.Tensor | None:
    """The column `sample_id`, int64; a float would lose what tells two samples apart."""
    column = _column(rows, "sample_id")
    if column is None:
        return None
    values = [value.item() if hasattr(value, "item") else value for value in column]
    return torch.tensor([integer("sample_id", value, -(2**63), 2**63 - 1) for value in values], dtype=torch.int64)


def _positions(attention_mask) -> torch.Tensor | None:
    """Positions in the row without its padding on the left."""
    return None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
