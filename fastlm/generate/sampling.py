"""Sampling from a language model, a token at a time. The whole window is computed anew for each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from fastlm.models import GPT2


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. ValueError for a value out of range.

    temperature   the logits are divided by it; 0: always the most probable token
    top_k         only so many of the most probable tokens are drawn; 0: all
    seed          of the draws: the same model, ids and seed give the same tokens
    """

    temperature: float = 0.8
    top_k: int = 40
    seed: int = 0

    def __post_init__(self):
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or a positive number, got {self.temperature!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k: expected 0, for all tokens, or a positive integer, got {self.top_k!r}")

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id, drawn from `logits` (vocab_size,) as `sampling` says. The draw runs on the CPU in float64."""
    logits = logits.detach().double().cpu()
    if not sampling.temperature:
        return int(logits.argmax())
    kept = min(sampling.top_k or len(logits), len(logits))
    best, ids = logits.topk(kept)
    chances = ((best - best[0]) / sampling.temperature).softmax(-1)
    return int(ids[torch.multinomial(chances, 1, generator=generator)])


@torch.inference_mode()
def continue_tokens(
    model: GPT2,
    ids: Sequence[int],
    tokens: int,
    *,
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    longest: int | None = None,
) -> list[int]:
    """At most `tokens` token ids that continue `ids`; it ends before the first one in `stop`.

    longest: how many of the latest tokens the model reads, at most and by default its n_positions. Training on rows of
        fewer tokens leaves the later positions untrained: pass data.row_tokens then.

    ValueError where `ids` is empty, or where an argument is out of range.
    """
    limit = model.config.n_positions
    longest = limit if longest is None else longest
    if not 1 <= longest <= limit:
        raise ValueError(f"longest: expected from 1 to the model's n_positions={limit}, got {longest!r}")
    if not len(ids):
        raise ValueError("ids: expected at least one token to continue, got none; begin with the tokenizer's bos_id")
    if tokens < 0:
        raise ValueError(f"tokens: expected 0 or more, got {tokens!r}")
    generator, device, training = sampling.generator(), model.word.device, model.training
    text = list(map(int, ids))
    start = len(text)
    model.eval()
    try:
        while len(text) < start + tokens:
            window = torch.tensor([text[-longest:]], device=device)
            token = sample(model(window)[0, -1], sampling, generator)
            if token in stop:
                break
            text.append(token)
    finally:
        model.train(training)
    return text[start:]
