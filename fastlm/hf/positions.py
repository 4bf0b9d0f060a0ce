"""Positions of rows that are packed into one, for models with a table of positions.

Transformers numbers the tokens of the whole row if it is not given position_ids. RoBERTa's positions begin at
padding_idx + 1, the ones of Transformers' DataCollatorWithFlattening at 0. Rotary embeddings need none of this: only
differences of positions within a sequence count.
"""

from __future__ import annotations

import torch

from fastlm.hf._swap import SameSignature


class Positions(SameSignature):
    """A base model. With cu_seq_lens_q and no position_ids, each sequence of the row is numbered anew."""

    def first_position(self) -> int:
        return 0

    def forward(self, **inputs):
        offsets = inputs.get("cu_seq_lens_q")
        if offsets is not None:
            inputs["position_ids"] = self._positions(inputs, offsets)
        return super().forward(**inputs)

    def _positions(self, inputs, offsets):
        """(1, T). No value is read on the host."""
        given, first = inputs.get("position_ids"), self.first_position()
        if given is not None:
            return given + first * (given[:, :1] == 0) if first else given
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        place = torch.arange(tokens.shape[1], device=tokens.device)
        offsets = offsets.to(place)
        sequence = torch.searchsorted(offsets, place, right=True) - 1
        return (place - offsets[sequence] + first)[None]


class OffsetPositions(Positions):
    """RoBERTa: position_ids that begin at 0, which no token of a packed row has, are moved to padding_idx + 1."""

    def first_position(self) -> int:
        padding = self.embeddings.padding_idx
        return 0 if padding is None else padding + 1
