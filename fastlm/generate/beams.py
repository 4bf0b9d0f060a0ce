"""Beam search, with the choices of Transformers.

A prompt has num_beams running rows, each with the sum of its tokens' log-probabilities. In a step
    candidates   the max(2, 1 + eos ids) · num_beams rows with one more token that have the greatest sums
    finished     those of the first num_beams candidates that end (an eos token, a stop string, the last step), and the
                 finished rows before; the num_beams with the greatest sum / length^length_penalty are kept
    running      the num_beams greatest sums of candidates that do not end
until the prompt is closed, as `early_stopping` says. Its best finished row is the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlm.generate import graph
from fastlm.generate.decoder import Decoder
from fastlm.generate.loop import BROKEN, CHECK, pack
from fastlm.generate.rows import Request, Scores
from fastlm.generate.text import Text


class Found(NamedTuple):
    """The best row of a prompt: its new tokens, and its score."""

    ids: list[int]
    score: float


class _Beams:
    """The rows of the prompts (P) that are still open, num_beams (n) each. All tensors are written in place.

    index     (P·n,) int64: which row each one continues
    ids       (P·n,) int64: its newest token
    sums      (P, n) float32, of the log-probabilities
    written   (P, n, most) int64: the new tokens
    ended     (P, n, most) int64, ended_sizes (P, n), scores (P, n): of finished rows; score -inf: none yet
    is_open   (P,) bool
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self.settings, self.request = request.settings, request
        n, prompts, most = self.settings.num_beams, len(request.prompts), max(request.limits)
        self.n, self.kept = n, max(2, 1 + len(request.ends)) * n
        self.choose = Scores(request, n, device)
        self.limits = torch.tensor(request.limits, device=device)
        self.index = torch.arange(prompts, device=device).repeat_interleave(n)
        self.ids = torch.zeros(prompts * n, dtype=torch.int64, device=device)
        self.sums = torch.full((prompts, n), -torch.inf, device=device)
        self.sums[:, 0] = 0.0  # at first all rows are the same, and one of them is continued
        self.written = torch.zeros(prompts, n, most, dtype=torch.int64, device=device)
        self.ended = torch.zeros_like(self.written)
        self.ended_sizes = torch.zeros(prompts, n, dtype=torch.int64, device=device)
        self.scores = torch.full((prompts, n), -torch.inf, device=device)
        self.is_open = torch.ones(prompts, dtype=torch.bool, device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def state(self) -> list[torch.Tensor]:
        """What `take` changes."""
        seen = [] if self.choose.seen is None else [self.choose.seen]
        rows = [self.index, self.ids, self.sums, self.written, self.ended, self.ended_sizes, self.scores, self.is_open]
        return [*rows, self.broken, self.count, *seen]

    def take(self, logits: torch.Tensor, stops=None) -> None:
        """A step. logits: (P·n, vocab or more). stops: see `_stops`."""
        prompts, vocab = len(self.is_open), self.choose.vocab
        scores = logits[:, : self.choose.vocab].float().log_softmax(-1)
        self.broken |= (scores[:, 0].isnan().view(prompts, self.n).any(-1) & self.is_open).any()
        scores = self.choose(scores, self.count).view(prompts, self.n, vocab) + self.sums[..., None]
        sums, flat = scores.flatten(1).topk(min(self.kept, self.n * vocab))
        beam, ids = flat // vocab, flat % vocab
        tokens = self.written.gather(1, beam[..., None].expand(-1, -1, self.written.shape[-1]))
        tokens.scatter_(2, self.count.expand(*ids.shape, 1), ids[..., None])
        self.count += 1
        last = (self.count >= self.limits)[:, None]
        ends = self.choose.has_ended(ids) | last
        if stops is not None:
            ends |= stops(tokens, int(self.count))
        self._finish(sums, tokens, ends)
        self._go_on(sums, tokens, beam, ids, ends)
        self._close(last)

    def _finish(self, sums, tokens, ends) -> None:
        """The best of the finished rows and of the first candidates that end."""
        rank = torch.arange(sums.shape[1], device=sums.device)
        ends = ends & (rank < self.n) & self.is_open[:, None]
        scores = torch.where(ends, sums / self.count**self.settings.length_penalty, -torch.inf)
        scores, index = torch.cat([self.scores, scores], 1).topk(self.n)
        self.scores.copy_(scores)
        sizes = torch.cat([self.ended_sizes, self.count.expand(ends.shape)], 1)
        self.ended_sizes.copy_(sizes.gather(1, index))
        ended = torch.cat([self.ended, tokens], 1)
        self.ended.copy_(ended.gather(1, index[..., None].expand(-1, -1, ended.shape[-1])))

    def _go_on(self, sums, tokens, beam, ids, ends) -> None:
        """The running rows of the next step."""
        sums, index = torch.where(ends, -torch.inf, sums).topk(self.n)
        self.sums.copy_(sums)
        self.written.copy_(tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1])))
        self.ids.copy_(ids.gather(1, index).flatten())
        first = torch.arange(len(sums), device=sums.device)[:, None] * self.n
        self.index.copy_((beam.gather(1, index) + first).flatten())
        self.choose.keep(self.index)
        self.choose.note(self.ids)

    def _close(self, last) -> None:
        settings = self.settings
        full = self.scores.isfinite().all(-1)
        length = self.count
        if settings.early_stopping == "never" and settings.length_penalty > 0.0:
            length = self.limits
        hope = self.sums[:, 0] / length**settings.length_penalty
        closed = full & (hope <= self.scores.min(-1).values)
        if settings.early_stopping is True:
            closed |= full
        self.is_open &= ~(closed | last[:, 0])

    def best(self) -> list[Found]:
        """Of each prompt."""
        ids, sizes = self.ended[:, 0].tolist(), self.ended_sizes[:, 0].tolist()
        return [Found(row[:size], score) for row, size, score in zip(ids, sizes, self.scores[:, 0].tolist())]

    def keep(self, index: torch.Tensor) -> torch.Tensor:
        """Only the prompts `index` go on; returns which rows these were."""
        rows = (index[:, None] * self.n + torch.arange(self.n, device=index.device)).flatten()
        self.choose.keep(rows)
        self.ids = self.ids[rows]
        for name in ("sums", "written", "ended", "ended_sizes", "scores", "is_open", "limits"):
            setattr(self, name, getattr(self, name)[index])
        from_rows, self.index = self.index[rows], torch.arange(len(rows), device=index.device)
        return from_rows


def _stops(request: Request, prompts: list[int]):
    """A function of candidates (P, K, most) and their length: bool (P, K), which contain a stop string.

    It is called once a step. prompts: those that are open, at each call.
    """

    before: dict[tuple[int, ...], Text] = {}  # of the prompt and tokens that the rows had a step ago

    def stops(tokens: torch.Tensor, count: int) -> torch.Tensor:
        nonlocal before
        found, texts = [], {}
        for prompt, candidates in zip(prompts, tokens[..., :count].tolist()):
            keys = [(prompt, *ids) for ids in candidates]
            for key in keys:
                texts[key] = before[key[:-1]].copy() if count > 1 else request.text(prompt)
                texts[key].add(key[-1])
            found.append([texts[key].stopped for key in keys])
        before = texts
        return torch.tensor(found, device=tokens.device)

    return stops


@torch.inference_mode()
def search(decoder: Decoder, request: Request, device: torch.device) -> list[Found]:
    """The best row of each prompt. decoder: with room for num_beams copies of each."""
    beams, settings, n = _Beams(request, device), request.settings, request.settings.num_beams
    found: list[Found | None] = [None] * len(request.prompts)
    prompts, most, static = list(range(len(found))), max(request.limits), graph.possible(device)
    stops = _stops(request, prompts) if settings.stop else None

    def take(logits: torch.Tensor) -> None:
        beams.take(logits, stops)
        # Rows of a closed prompt overwrite their last token: they leave neither the cache nor the model's positions.
        decoder.cache.lengths[: decoder.cache.rows] -= (
            (~beams.is_open).int().repeat_interleave(decoder.cache.rows // len(beams.is_open))
        )

    def step() -> None:
        decoder.reorder(beams.index)
        take(decoder.step(beams.ids))

    ids, cu_seqlens, longest = pack(request.prompts, device)
    take(decoder.prefill(ids, cu_seqlens, longest).repeat_interleave(n, 0))
    decoder.reorder(beams.index // n)  # one row a prompt, so far
    beams.index.copy_(torch.arange(len(beams.index), device=device))
    advance = None
    for count in range(1, most + 1):
        if not static or count % CHECK == 1 or count == most:
            if bool(beams.broken):
                raise FloatingPointError(BROKEN)
            best, still = beams.best(), []
            for place, is_open in enumerate(beams.is_open.tolist()):
                if is_open:
                    still.append(place)
                else:
                    found[prompts[place]] = best[place]
            if not still:
                break
            if not static and len(still) < len(prompts):
                decoder.reorder(beams.keep(torch.tensor(still)))
                prompts[:] = [prompts[place] for place in still]
        if advance is None:
            if static and settings.cuda_graph is not False:
                # A capture keeps the `longest` of its own step, while the rows that `reorder` copies grow.
                decoder.cache.longest = decoder.cache.k.shape[2]
            advance = graph.choose(
                step,
                [decoder.cache.lengths, *beams.state()],
                settings.cuda_graph,
                device,
                most - 1,
                "stop strings are looked for on the host" if settings.stop else "",
            )
        advance()
    return found
