"""The rows of a batch: what was written, and what chooses the next token. Nothing here waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastlm.generate.sampling import chances, draw, penalise, uniforms
from fastlm.generate.settings import Settings
from fastlm.generate.text import Decodes, Text


@dataclass(frozen=True)
class Request:
    """What is asked of a model, checked.

    prompts     token ids of each row
    limits      how many tokens each row may get
    numbers     of the rows, on which their draws depend
    ends        ids that end a row
    vocab       how many logits belong to tokens; a model may have more
    tokenizer   spells the tokens; None where no text is asked for
    start       the first token of a decoder whose prompts an encoder reads (T5); None where it reads them (GPT-2)
    """

    settings: Settings
    prompts: list[list[int]]
    limits: list[int]
    numbers: list[int]
    ends: tuple[int, ...]
    vocab: int
    tokenizer: Decodes | None
    start: int | None

    def before(self, row: int) -> list[int]:
        """The decoder's tokens before the first new one of a row."""
        return self.prompts[row] if self.start is None else [self.start]

    def text(self, row: int) -> Text | None:
        """For the new tokens of a row; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return Text(self.tokenizer, self.prompts[row] if self.start is None else (), self.settings.stop)


class Scores:
    """Logits with the repetition penalty, and without an end that comes too soon.

    seen   (rows, vocab) bool: the tokens that each row has; None without a penalty
    """

    def __init__(self, request: Request, copies: int, device: torch.device) -> None:
        self.vocab, settings = request.vocab, request.settings
        self.penalty, self.least = settings.repetition_penalty, settings.min_new_tokens
        self.ends = torch.tensor(request.ends, dtype=torch.int64, device=device)
        self._is_end = torch.zeros(self.vocab, dtype=torch.bool, device=device).index_fill(0, self.ends, True)
        self.seen = None
        if self.penalty != 1.0:
            seen = torch.zeros(len(request.prompts), self.vocab, dtype=torch.bool)
            for row in range(len(request.prompts)):
                seen[row, [id for id in request.before(row) if id < self.vocab]] = True
            self.seen = seen.repeat_interleave(copies, 0).to(device)

    def __call__(self, scores: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """scores (rows, vocab), after `count` () new tokens."""
        if self.seen is not None:
            scores = penalise(scores, self.seen, self.penalty)
        if self.least > 0:
            scores = torch.where(self._is_end & (count < self.least), -torch.inf, scores)
        return scores

    def has_ended(self, ids: torch.Tensor) -> torch.Tensor:
        """bool, like ids: those that are one of `ends`."""
        return (ids[..., None] == self.ends).any(-1)

    def note(self, ids: torch.Tensor) -> None:
        """The rows have these tokens now. ids: (rows,)."""
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)

    def keep(self, index: torch.Tensor) -> None:
        """Row i becomes what row index[i] was."""
        if self.seen is None:
            return
        seen = self.seen[index]
        if len(index) == len(self.seen):
            self.seen.copy_(seen)  # in place, for a graph
        else:
            self.seen = seen


class Rows:
    """Rows that are drawn or take the most probable token. All tensors are written in place: a CUDA graph may be.

    ids       (B,) int64, the newest token of each
    written   (B, most) int64, the new tokens; count () int64: how many
    done      (B,) bool: the row has ended, and what is written to it counts no more
    broken    () bool: logits were no numbers
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        rows, settings = len(request.prompts), request.settings
        self.settings, self.scores = settings, Scores(request, 1, device)
        self.limits = torch.tensor(request.limits, device=device)
        most = max(request.limits)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.written = torch.zeros(rows, most, dtype=torch.int64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)
        self.u = None
        if settings.temperature:
            numbers = torch.tensor(request.numbers, device=device)
            first = torch.tensor([len(request.before(row)) for row in range(rows)], device=device)
            self.u = uniforms(settings.seed, numbers, first, most)

    def state(self) -> list[torch.Tensor]:
        """What `take` changes."""
        seen = self.scores.seen
        return [self.ids, self.written, self.count, self.done, self.broken, *([] if seen is None else [seen])]

    def take(self, logits: torch.Tensor) -> None:
        """A token for each row from logits (B, vocab or more)."""
        scores = self.scores(logits[:, : self.scores.vocab].float(), self.count)
        column = self.count.expand(len(self.ids), 1)
        if self.u is None:
            best = scores.max(-1)  # argmax takes 20 times as long on a CPU
            ids, sums = best.indices, best.values
        else:
            p = chances(scores, self.settings)
            ids, sums = draw(p, self.u.gather(1, column).squeeze(1)), p.sum(-1)
        self.broken |= (sums.isnan() & ~self.done).any()
        self.written.scatter_(1, column, ids[:, None])
        self.scores.note(ids)
        self.count += 1
        self.done |= self.scores.has_ended(ids) | (self.count >= self.limits)
        self.ids.copy_(ids)

    def keep(self, index: torch.Tensor) -> None:
        """Only the rows `index` go on."""
        self.scores.keep(index)
        self.ids, self.written, self.done, self.limits = (
            x[index] for x in (self.ids, self.written, self.done, self.limits)
        )
        self.u = None if self.u is None else self.u[index]
