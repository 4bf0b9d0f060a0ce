"""Greedy and sampled generation: every row gets a token a step, until all have ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastlm.generate import graph
from fastlm.generate.decoder import Decoder
from fastlm.generate.rows import Request, Rows

BROKEN = "logits: expected numbers, got NaN; the model's weights, or their dtype, cause it"
CHECK = 8  # steps on a device between two looks at what was written: each waits for the device


class Token(NamedTuple):
    """A new token of a row.

    row      of the batch, from 0 on
    id       the token; where it ended the row as an eos token, it is no part of the row's text
    text     what it adds to the row's text, perhaps nothing yet; "" without a tokenizer
    finish   why the row ended with this token: "eos", "stop", or "length"; None: it goes on
    """

    row: int
    id: int
    text: str
    finish: str | None


class _Written:
    """One row on the host: what it spells, and whether it has ended."""

    def __init__(self, request: Request, row: int) -> None:
        self.row, self._ends, self._limit = row, request.ends, request.limits[row]
        self._text, self._count = request.text(row), 0

    def add(self, id: int) -> Token:
        self._count += 1
        finish = "length" if self._count == self._limit else None
        if id in self._ends:
            finish = "eos"
        elif self._text is not None:
            self._text.add(id)
            finish = "stop" if self._text.stopped else finish
        return Token(self.row, id, "" if self._text is None else self._text.fresh(finish is not None), finish)


@torch.inference_mode()
def run(decoder: Decoder, request: Request, device: torch.device) -> Iterator[Token]:
    """The tokens of all rows, those of a step in the order of the rows."""
    ids, cu_seqlens, longest = pack(request.prompts, device)
    rows = Rows(request, device)

    def take(logits: torch.Tensor) -> None:
        rows.take(logits)
        # An ended row overwrites its last token: it leaves neither the cache nor the model's positions.
        decoder.cache.lengths[: len(rows.done)] -= rows.done.int()

    take(decoder.prefill(ids, cu_seqlens, longest))
    advance, static, most = None, graph.possible(device), max(request.limits)
    written = [_Written(request, row) for row in range(len(request.prompts))]
    seen = count = 0
    while True:
        count += 1
        if not static or count % CHECK == 1 or count == most:
            alive = []
            for place, (line, new) in enumerate(zip(written, rows.written[:, seen:count].tolist())):
                for id in new if line is not None else ():
                    token = line.add(id)
                    yield token
                    if token.finish is not None:
                        line = written[place] = None
                        rows.done[place] = True  # a stop string is seen here alone
                        break
                if line is not None:
                    alive.append(place)
            seen = count
            if bool(rows.broken):
                raise FloatingPointError(BROKEN)
            if not alive:
                return
            if not static and len(alive) < len(written):  # ended rows leave: the others' step is cheaper
                index = torch.tensor(alive, device=device)
                decoder.reorder(index)
                rows.keep(index)
                written = [written[place] for place in alive]
        if advance is None:
            state = [decoder.cache.lengths, *rows.state()]
            advance = graph.choose(
                lambda: take(decoder.step(rows.ids)), state, request.settings.cuda_graph, device, most - 1
            )
        advance()


def pack(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The prompts one after another, where each starts, and the longest one's length."""
    lengths = [len(prompt) for prompt in prompts]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.tensor([id for prompt in prompts for id in prompt])
    return ids.to(device), cu_seqlens.to(device), max(lengths)
