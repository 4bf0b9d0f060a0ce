"""Packed forwards, and the sums of what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from fastlm.models import Model

Item = TypeVar("Item")


class Sums:
    """Losses of a model on `device`, summed in float64.

    nats        sum of the losses of the predicted tokens
    predicted   how many they are
    computed    tokens that the forwards ran on, the decoder's too
    """

    def __init__(self, model: Model, dtype: torch.dtype, batch_tokens: int):
        self.model, self.dtype, self.batch_tokens = model, dtype, batch_tokens
        self.device = next(model.parameters()).device
        self.nats, self.predicted, self.computed = 0.0, 0, 0

    def batches(self, items: Iterable[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
        """Items of at most `batch_tokens` tokens together, in order; a longer one stands alone."""
        batch, taken = [], 0
        for item in items:
            size = length(item)
            if batch and taken + size > self.batch_tokens:
                yield batch
                batch, taken = [], 0
            batch.append(item)
            taken += size
        if batch:
            yield batch

    @torch.inference_mode()
    def add(self, losses: Callable[[], torch.Tensor], computed: int) -> None:
        """Add the losses of the predicted tokens, (predicted,), of a forward on so many tokens."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = losses()
        self.nats += float(found.double().sum())
        self.predicted += found.numel()
        self.computed += computed

    def tensor(self, array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.as_tensor(array.astype(np.int64), dtype=dtype, device=self.device)

    def packed(self, sequences: Sequence[np.ndarray]) -> dict[str, object]:
        """Arguments of a model for sequences of token ids (n,)."""
        lengths = np.array([len(ids) for ids in sequences])
        return {
            "input_ids": self.tensor(np.concatenate(sequences)),
            "cu_seqlens": self.tensor(np.concatenate([[0], np.cumsum(lengths)]), torch.int32),
            "max_seqlen": int(lengths.max()),
        }


def parts(ids: np.ndarray, longest: int) -> list[np.ndarray]:
    """`ids` (n,) in as few parts of at most `longest` tokens as can be, whose lengths differ by one at most."""
    return np.array_split(ids, max(1, -(-len(ids) // longest)))
