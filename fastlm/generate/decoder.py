"""A model as generation sees it: logits of the next token, for a batch of rows whose keys and values are kept."""

from __future__ import annotations

from typing import Protocol

import torch

from fastlm.models import T5, Cache, Generative


class Decoder(Protocol):
    """What generation asks of a model. Logits are (rows, vocab_size), of the token after each row.

    cache: of the rows. Its `lengths` say how many tokens each has, its `rows` how many rows there are.
    """

    cache: Cache

    def prefill(self, ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        """The logits after each prompt. ids: all prompts, packed (T,); cu_seqlens (prompts + 1,), int32."""

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits after one more token of each row. ids: (rows,), int64. It never waits for the device."""

    def reorder(self, index: torch.Tensor) -> None:
        """Row i becomes what row index[i] was. index: int64, (rows from now on,).

        More rows than before are copies, as of beams; fewer, rows that have ended leave. A row of a decoder with an
        encoder keeps reading the same text, and rows of one text stay together, in the order of the texts.
        """


class PlainDecoder:
    """`Decoder` of any device and dtype: the model itself, in torch and fastlm.ops."""

    def __init__(self, model: Generative, cache: Cache) -> None:
        self.model, self.cache = model, cache

    def prefill(self, ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        if not isinstance(self.model, T5):
            return self.model.append(ids, self.cache, cu_seqlens, max_seqlen)
        self.model.read(self.cache, ids, cu_seqlens, max_seqlen)
        return self.step(ids.new_full((self.cache.rows,), self.model.config.decoder_start_token_id))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.append(ids, self.cache)

    def reorder(self, index: torch.Tensor) -> None:
        self.cache.reorder(index)
