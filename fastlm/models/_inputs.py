"""The inputs of a model: token ids, packed (T,) with cu_seqlens or padded (B, S) with a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlm.ops import IGNORE_INDEX, _checks


class Sequences(NamedTuple):
    """Token ids, and how they divide into sequences.

    ids: (T,) with cu_seqlens (sequences + 1,) and max_seqlen; or (B, S) with `real`, bool, None where all tokens are.
    """

    ids: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int | None
    real: torch.Tensor | None

    def attend(self, keys: Sequences | None = None) -> dict:
        """Arguments of ops.attention: queries of these sequences, keys of the same or of `keys`."""
        keys = self if keys is None else keys
        if self.cu_seqlens is None:
            return {"key_mask": keys.real}
        return {
            "cu_seqlens_q": self.cu_seqlens,
            "max_seqlen_q": self.max_seqlen,
            "cu_seqlens_k": keys.cu_seqlens,
            "max_seqlen_k": keys.max_seqlen,
        }

    def positions(self) -> torch.Tensor | None:
        """Positions like ids, counted from 0 over the real tokens of each sequence; None if that is the column."""
        if self.cu_seqlens is not None:
            token = torch.arange(self.ids.shape[0], dtype=torch.int32, device=self.ids.device)
            start = self.cu_seqlens[torch.searchsorted(self.cu_seqlens, token, right=True) - 1]
            return (token - start).clamp(min=0)  # attention reports a wrong cu_seqlens
        return None if self.real is None else (self.real.cumsum(-1) - 1).clamp(min=0)

    def starts(self) -> torch.Tensor:
        """bool, like ids: True for the first token of each sequence and for padding."""
        if self.cu_seqlens is not None:
            tokens = self.ids.shape[0]
            starts = torch.zeros(tokens + 1, dtype=torch.bool, device=self.ids.device)
            return starts.index_fill(0, self.cu_seqlens.clamp(0, tokens).long(), True)[:tokens]
        if self.real is not None:
            return ~self.real | (self.real.cumsum(-1) == 1)
        return (torch.arange(self.ids.shape[1], device=self.ids.device) == 0).expand(self.ids.shape)

    def next_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """Like labels: the label of the next token, which each token predicts; -100 at the end of a sequence."""
        return torch.where(self.starts(), IGNORE_INDEX, labels).roll(-1, -1)

    def shift_right(self, labels: torch.Tensor, start_id: int, ignored_id: int) -> torch.Tensor:
        """Like labels: the previous label of each token. `start_id` replaces a missing one, `ignored_id` a -100."""
        before = torch.where(self.starts(), start_id, labels.roll(1, -1))
        return torch.where(before == IGNORE_INDEX, ignored_id, before)

    def lengths(self) -> torch.Tensor:
        """(sequences,): the number of tokens of each."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff()
        if self.real is not None:
            return self.real.sum(-1)
        return torch.full(self.ids.shape[:1], self.ids.shape[1], device=self.ids.device)

    def first(self) -> torch.Tensor:
        """(sequences,) int64: the index of each one's first token in the flattened ids; any index if it is empty."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[:-1].long().clamp(0, max(self.ids.shape[0] - 1, 0))
        rows = torch.arange(self.ids.shape[0], device=self.ids.device) * self.ids.shape[1]
        return rows if self.real is None else rows + self.real.int().argmax(-1)

    def padded(self, x: torch.Tensor, fill: float) -> torch.Tensor:
        """x, like ids, as (sequences, longest): each sequence from column 0 on, then `fill`."""
        longest = self.ids.shape[1] if self.cu_seqlens is None else self.max_seqlen
        column = torch.arange(longest, device=x.device)
        rows = (self.first()[:, None] + column).clamp(max=max(x.numel() - 1, 0))
        return torch.where(column < self.lengths()[:, None], x.flatten()[rows], fill)


def sequences(
    ids: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    attention_mask: torch.Tensor | None,
    *,
    device: torch.device,
    longest: tuple[str, int] | None = None,
    name: str = "input_ids",
    prefix: str = "",
) -> Sequences:
    """Checks a model's arguments. ValueError if they do not fit together.

    longest: the name and value of the configuration's bound on a sequence's length.
    name: the name of the argument `ids`. prefix: of the names of the other arguments.
    """
    _checks.is_tensor(name, ids, device=device, dtypes=(torch.int64, torch.int32))
    if cu_seqlens is not None:
        _checks.is_tensor(name, ids, shape=(None,))
        _checks.is_tensor(f"{prefix}cu_seqlens", cu_seqlens, device=device, dtypes=(torch.int32,), shape=(None,))
        if cu_seqlens.shape[0] == 0:
            raise ValueError(f"{prefix}cu_seqlens: expected one more entry than there are sequences, got none")
        if attention_mask is not None:
            raise ValueError(
                f"{prefix}attention_mask: expected None with {prefix}cu_seqlens, which leave no padding; pass one of "
                "them"
            )
        if max_seqlen is None:  # reading cu_seqlens would stall a device; this bound costs no more than the exact one
            max_seqlen = ids.shape[0] if longest is None else min(ids.shape[0], longest[1])
        if longest is not None and max_seqlen > longest[1]:
            raise ValueError(f"{prefix}max_seqlen: expected at most {longest[0]}={longest[1]}, got {max_seqlen}")
        return Sequences(ids, cu_seqlens, max_seqlen, None)
    if ids.dim() != 2 or (longest is not None and ids.shape[1] > longest[1]):
        bound = "" if longest is None else f" with S at most {longest[0]}={longest[1]}"
        raise ValueError(f"{name}: expected (T,) with {prefix}cu_seqlens, or (B, S){bound}, got {tuple(ids.shape)}")
    if attention_mask is None:
        return Sequences(ids, None, None, None)
    _checks.is_tensor(f"{prefix}attention_mask", attention_mask, device=device, shape=ids.shape)
    return Sequences(ids, None, None, attention_mask.bool())


def check_labels(name: str, labels: torch.Tensor, given: Sequences) -> None:
    """ValueError unless labels are int64 and have the shape of the ids."""
    _checks.is_tensor(name, labels, device=given.ids.device, dtypes=(torch.int64,), shape=given.ids.shape)
