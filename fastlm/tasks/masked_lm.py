"""Masked language modelling (Devlin et al. 2018, section 3.1): about 15% of the tokens are predicted from the others.

`ops.mlm_mask` selects them: most become the mask token, some a random one, the rest stay. The mask is made on the host,
where the number of predicted tokens is known without asking the device; it is the same on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from fastlm import ops
from fastlm.data import Dataset, Mixture, Tokenizer
from fastlm.data.batches import Batch
from fastlm.data.mixture import token_counts
from fastlm.models import Bert, Counts, Model
from fastlm.ops.mlm_mask import MaskedTokens
from fastlm.settings import Table, key
from fastlm.tasks._tables import DataTable, TrainTable
from fastlm.tasks._task import Micro, Task, real_pairs


@dataclass(frozen=True)
class MaskedLMData(DataTable):
    mlm_probability: float = key(0.15, "share of the tokens that are predicted", above=0.0, most=1.0)
    mask_replace_prob: float = key(0.8, "share of those that become the mask token", least=0.0, most=1.0)
    random_replace_prob: float = key(0.1, "share of those that become a random token", least=0.0, most=1.0)
    whole_words: bool = key(False, "the tokens of a word are predicted together, or none of them")

    def __post_init__(self):
        super().__post_init__()
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(
                "data.random_replace_prob: expected at most 1 together with data.mask_replace_prob="
                f"{self.mask_replace_prob}, got {self.random_replace_prob}"
            )


@dataclass(frozen=True)
class MaskedLMTrain(TrainTable):
    unigram_bias: bool = key(False, "the head's bias starts at the tokens' log frequencies, not at 0")


def mask(batch: Batch, tokenizer: Tokenizer, seed: int, **rates) -> MaskedTokens:
    """`ops.mlm_mask` of a batch. rates: of the op, where they are not its defaults."""
    return ops.mlm_mask(
        batch.input_ids,
        mask_token_id=tokenizer.mask_id,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        seed=seed,
        epoch=batch.epochs,
        sample_ids=batch.sample_ids,
        positions=batch.positions,
        **rates,
    )


class MaskedLM(Task):
    models = (Bert,)
    tables: ClassVar[dict[str, type[Table]]] = {"data": MaskedLMData, "train": MaskedLMTrain}

    def initialize(self, model: Model) -> None:
        if self.recipe.train.unigram_bias:
            with torch.no_grad():
                model.head.bias.copy_(log_frequencies(self.dataset, self.recipe.train.seed))

    def make_micro(self, batch, seed, rng, evaluation=False):
        data, tokenizer = MaskedLMData() if evaluation else self.recipe.data, self.dataset.tokenizer
        masked = mask(
            batch,
            tokenizer,
            seed,
            mlm_probability=data.mlm_probability,
            mask_replace_prob=data.mask_replace_prob,
            random_replace_prob=data.random_replace_prob,
            word_starts=self._begins_word[batch.input_ids] if data.whole_words else None,
        )
        selected, capacity = int(masked.count), masked.index.numel()
        predicted = min(selected, capacity)
        # A device wants the same shapes every step; the CPU need not run the head on the empty places.
        places = predicted if self.device.type == "cpu" else capacity
        return Micro(
            inputs={
                "input_ids": masked.input_ids,
                "cu_seqlens": batch.cu_seqlens,
                "max_seqlen": batch.max_seqlen,
                "positions": batch.positions,
                "rng": rng,
                "index": masked.index[:places],
                "targets": masked.targets[:places],
                "reduction": "sum",
            },
            counts=Counts(batch.tokens, real_pairs(batch), predicted),
            dropped=selected - predicted,
        )

    def metrics(self) -> dict[str, float]:
        return {"unigram_entropy": self.dataset.unigram_entropy}

    @cached_property
    def _begins_word(self) -> torch.Tensor:
        """(vocab_size,) bool."""
        return torch.from_numpy(self.dataset.tokenizer.word_starts())


def log_frequencies(dataset: Dataset | Mixture, seed: int) -> torch.Tensor:
    """(vocab_size,) float32: log of each token's share of the text, special ones aside, half a token added to each.

    Counted on a random sample of rows: `fastlm.data.mixture.token_counts`.
    """
    counts = token_counts(dataset, seed)
    counts[list(dataset.tokenizer.special_ids)] = 0
    shares = (counts + 0.5) / (counts + 0.5).sum()
    return torch.from_numpy(np.log(shares)).float()
