"""How text is generated: what chooses a token, and what ends a row."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

from fastlm.generate.cpu_decoder import FORMS
from fastlm.ops import _checks

_LEAST = 2.0**-126  # a temperature below is 0 in float32, and may be flushed to it


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of `generate` and `stream`. ValueError for a value that is out of range.

    max_new_tokens      tokens that a row gets at most; fewer where the model's positions end before
    min_new_tokens      no row ends by an eos token before it has so many
    temperature         0: the most probable token, or beams; else the logits are divided by it, and a token is drawn
    top_k               only tokens at least as probable as the k-th are drawn; 0: all
    top_p               only the fewest most probable tokens whose probabilities sum to at least this are drawn; 1: all
    min_p               only tokens at least this many times as probable as the best are drawn; 0: all
    repetition_penalty  logits of tokens that a row has, GPT-2's prompt included, are divided by it where they are
                        positive, else multiplied (Keskar et al. 2019, arXiv:1909.05858); 1: none
    num_beams           rows that beam search follows for each prompt; 1: no beam search
    length_penalty      a finished beam's score is the sum of its tokens' log-probabilities over length**length_penalty
    early_stopping      when beam search ends, once num_beams have finished. True: at once. False: when the best beam
                        that goes on has a lower score now than the worst finished one. "never": when it could not get
                        a higher one at its greatest length
    eos_token_id        an id, or several, that end a row; None: the model's configuration says it; (): none does
    stop                strings that end a row, wherever they lie across the tokens; they need a tokenizer
    seed                of the draws. What is drawn for a row depends on seed, the row's number and the position alone
    weights             how a step on a CPU reads the weights of its products: "float32", "bfloat16" or "int8"
                        (fastlm/generate/cpu_decoder.py), of a float32 model; None: as the model has them
    cuda_graph          on a CUDA device the step is one graph: "auto" where it can be captured, True: or an error

    The filters apply in this order: repetition_penalty, min_new_tokens, temperature, top_k, top_p, min_p, as in
    Transformers. Tokens of equal probability are kept or dropped together. Beams apply the first two alone.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_token_id: int | tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    weights: str | None = None
    cuda_graph: bool | str = "auto"

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0), ("num_beams", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected an integer from {least} on, got {value!r}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: expected at most max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}"
            )
        if not _number(self.temperature) or self.temperature < 0.0:
            raise ValueError(f"temperature: expected 0 or a positive number, got {self.temperature!r}")
        if 0.0 < self.temperature < _LEAST:
            raise ValueError(
                f"temperature: expected 0, which takes the most probable token, or at least {_LEAST:.2g}, the least "
                f"number of float32, got {self.temperature!r}"
            )
        if not _number(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {self.top_p!r}")
        if not _number(self.min_p) or not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p: expected a number from 0 to 1, got {self.min_p!r}")
        if not _number(self.repetition_penalty) or self.repetition_penalty <= 0.0:
            raise ValueError(f"repetition_penalty: expected a positive number, got {self.repetition_penalty!r}")
        if not _number(self.length_penalty):
            raise ValueError(f"length_penalty: expected a finite number, got {self.length_penalty!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f'early_stopping: expected True, False or "never", got {self.early_stopping!r}')
        if not isinstance(self.cuda_graph, bool) and self.cuda_graph != "auto":
            raise ValueError(f'cuda_graph: expected True, False or "auto", got {self.cuda_graph!r}')
        if self.weights is not None:
            _checks.one_of("weights", self.weights, FORMS)
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed: expected an integer of 64 bits, got {self.seed!r}")
        if not isinstance(self.stop, Iterable):
            raise ValueError(f"stop: expected a string, or several, got {self.stop!r}; () for none")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop: expected strings that are not empty, got {self.stop!r}")
        self._check_together()

    def _check_together(self) -> None:
        filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        given = [name for name, off in filters.items() if getattr(self, name) != off]
        if given and not self.temperature:
            raise ValueError(
                f"temperature: expected a positive one with {given[0]}={getattr(self, given[0])!r}, which tokens are "
                f"drawn from, got 0, which draws none; set temperature=1, or leave {given[0]} out"
            )
        if self.num_beams > 1 and self.temperature:
            raise ValueError(
                f"temperature: expected 0 with num_beams={self.num_beams}, since beam search draws nothing, got "
                f"{self.temperature!r}; leave one of them out"
            )

    def ends(self, configured: int | tuple[int, ...] | None) -> tuple[int, ...]:
        """The ids that end a row. configured: the model's."""
        ids = configured if self.eos_token_id is None else self.eos_token_id
        if ids is None:
            return ()
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # a tensor's or an array's
        ids = tuple(ids) if isinstance(ids, Iterable) and not hasattr(ids, "__index__") else (ids,)
        if not all(hasattr(id, "__index__") and not isinstance(id, bool) for id in ids):
            raise ValueError(f"eos_token_id: expected a token's id, or several, got {self.eos_token_id!r}")
        return tuple(map(operator.index, ids))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
