"""The most probable continuations of several prompts at once, for figures of generated text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F

from fastlm.models import T5, Model


@torch.no_grad()
def greedy(
    model: Model, prompts: Sequence[Sequence[int]], tokens: int, ends: Collection[int], vocab_size: int
) -> list[list[int]]:
    """For each prompt at most `tokens` ids, each the most probable one, up to and without the first in `ends`.

    A GPT-2 continues the prompts, to its last position at most; a T5 reads them with its encoder. Rows are packed, and
    computed anew for each token. `model` is in evaluation. vocab_size: later logits are no tokens.
    """
    encoder = isinstance(model, T5)
    written = [[model.config.decoder_start_token_id] if encoder else list(prompt) for prompt in prompts]
    begin = [len(row) for row in written]
    longest = [begin[i] + tokens for i in range(len(prompts))]
    if model.config.longest is not None:
        longest = [min(most, model.config.longest[1]) for most in longest]
    alive = [i for i in range(len(prompts)) if len(written[i]) < longest[i]]
    while alive:
        ids, last = _packed(model, [written[i] for i in alive])
        if encoder:
            source, _ = _packed(model, [prompts[i] for i in alive])
            target = {"decoder_input_ids": ids.pop("input_ids"), **{f"decoder_{name}": x for name, x in ids.items()}}
            logits = model(**source, **target)[last]
        else:
            logits = F.linear(model.decode(**ids)[last], model.word)
        for i, token in zip(alive, logits[:, :vocab_size].argmax(-1).tolist()):
            written[i].append(token)
        alive = [i for i in alive if written[i][-1] not in ends and len(written[i]) < longest[i]]
    found = [row[start:] for row, start in zip(written, begin)]
    return [row[:-1] if row and row[-1] in ends else row for row in found]


def _packed(model: Model, rows: Sequence[Sequence[int]]) -> tuple[dict[str, object], torch.Tensor]:
    """(arguments of the model, index of each row's last token)."""
    device = model.word.device
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
    ids = torch.tensor([id for row in rows for id in row], device=device)
    inputs = {"input_ids": ids, "cu_seqlens": ends.int().to(device), "max_seqlen": max(map(len, rows))}
    return inputs, (ends[1:] - 1).to(device)
