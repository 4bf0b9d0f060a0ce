"""What a model is trained to predict: batches of rows in, arguments of the model's forward out.

A micro-batch is a pure function of (recipe, dataset, step, m). It is made on the host, where the number of predicted
tokens is known without asking the device; the mask is the same on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fastlm import ops
from fastlm.data import Batches, Dataset
from fastlm.data.order import rows_at
from fastlm.data.packing import PADDING_SAMPLE
from fastlm.train.recipe import Recipe

_COUNTED_ROWS = 1 << 14  # two million tokens at 128 a row


@dataclass(frozen=True)
class Micro:
    """One forward.

    inputs      keyword arguments of the model, `reduction="sum"` and its dropout's rng among them
    tokens      how many of the input tokens are real
    pairs       sum over pieces of length²: what attention scores
    predicted   how many tokens the loss is summed over
    dropped     how many more were selected than the fixed capacity holds; they are left out of the loss
    """

    inputs: dict[str, object]
    tokens: int
    pairs: int
    predicted: int
    dropped: int

    def pin(self) -> Micro:
        """With tensors in pinned memory, from where a copy to the device does not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Micro:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function) -> Micro:
        inputs = {k: function(v) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        return replace(self, inputs=inputs)


class MaskedLM:
    """BERT's objective: 15% of the tokens are selected, and predicted from a text in which most of them are masked."""

    def __init__(self, recipe: Recipe, dataset: Dataset, device: torch.device):
        self.recipe, self.dataset, self.tokenizer, self.device = recipe, dataset, dataset.tokenizer, device
        self.batches = Batches(dataset, batch_rows=recipe.batch_rows, seed=recipe.train.seed)

    def micro(self, step: int, m: int) -> Micro:
        """Micro-batch m, 0 to M-1, of step `step`, on the host."""
        recipe = self.recipe
        batch = self.batches.at(step, m, recipe.micro_count)
        masked = ops.mlm_mask(
            batch.input_ids,
            mask_token_id=self.tokenizer.mask_id,
            vocab_size=self.tokenizer.vocab_size,
            special_ids=self.tokenizer.special_ids,
            seed=recipe.train.seed,
            epoch=batch.epochs,
            sample_ids=batch.sample_ids,
            positions=batch.positions,
            mlm_probability=recipe.data.mlm_probability,
            mask_replace_prob=recipe.data.mask_replace_prob,
            random_replace_prob=recipe.data.random_replace_prob,
        )
        selected, capacity = int(masked.count), masked.index.numel()
        predicted = min(selected, capacity)
        # A device wants the same shapes every step; the CPU need not run the head on the empty places.
        places = predicted if self.device.type == "cpu" else capacity
        starts = batch.cu_seqlens.long()
        real = batch.sample_ids[starts[:-1].clamp(max=batch.input_ids.numel() - 1)] != PADDING_SAMPLE
        return Micro(
            inputs={
                "input_ids": masked.input_ids,
                "cu_seqlens": batch.cu_seqlens,
                "max_seqlen": batch.max_seqlen,
                "positions": batch.positions,
                "rng": torch.tensor([recipe.train.seed, step * recipe.micro_count + m]),
                "index": masked.index[:places],
                "targets": masked.targets[:places],
                "reduction": "sum",
            },
            tokens=batch.tokens,
            pairs=int((starts.diff().square() * real).sum()),
            predicted=predicted,
            dropped=selected - predicted,
        )


def log_frequencies(dataset: Dataset, seed: int) -> torch.Tensor:
    """(vocab_size,) float32: log of each token's share of the text, special ones aside, half a token added to each.

    Counted on the rows that training sees first, which are a random sample.
    """
    rows = rows_at(np.arange(min(_COUNTED_ROWS, dataset.rows)), dataset.rows, seed)[1]
    tokens, _, _ = dataset.gather(rows)
    counts = np.bincount(tokens.ravel(), minlength=dataset.tokenizer.vocab_size)
    counts[list(dataset.tokenizer.special_ids)] = 0
    shares = (counts + 0.5) / (counts + 0.5).sum()
    return torch.from_numpy(np.log(shares)).float()


OBJECTIVES = {"bert": MaskedLM}
