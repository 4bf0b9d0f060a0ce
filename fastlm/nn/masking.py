"""Masked-language-model targets as a module."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastlm import ops


class MLMMasking(torch.nn.Module):
    """`fastlm.ops.mlm_mask` with the vocabulary, the probabilities and the seed fixed. No parameters.

    It masks in evaluation too: the mask of a token depends only on (seed, epoch, sample, position).
    """

    def __init__(
        self,
        *,
        mask_token_id: int,
        vocab_size: int,
        special_ids: Iterable[int],
        seed: int,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "mask_token_id": mask_token_id,
            "vocab_size": vocab_size,
            "special_ids": tuple(special_ids),
            "seed": seed,
            "mlm_probability": mlm_probability,
            "mask_replace_prob": mask_replace_prob,
            "random_replace_prob": random_replace_prob,
            "capacity": capacity,
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        epoch: int | torch.Tensor = 0,
        sample_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        special_tokens_mask: torch.Tensor | None = None,
        word_starts: torch.Tensor | None = None,
    ) -> ops.MaskedTokens:
        """input_ids (B, S), or (T,) packed. Arguments and result as of `fastlm.ops.mlm_mask`."""
        return ops.mlm_mask(
            input_ids,
            epoch=epoch,
            sample_ids=sample_ids,
            positions=positions,
            special_tokens_mask=special_tokens_mask,
            word_starts=word_starts,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
