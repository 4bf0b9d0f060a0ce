"""`generate` and `stream`: what a caller asks, checked, and the loop that answers it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from fastlm.data import Tokenizer
from fastlm.generate import beams, loop
from fastlm.generate.decoder import Decoder
from fastlm.generate.decoders import make_decoder
from fastlm.generate.loop import Token
from fastlm.generate.rows import Request
from fastlm.generate.settings import Settings
from fastlm.generate.text import Decodes
from fastlm.models import GPT2, T5

FAMILIES = (GPT2, T5)
_ARRAYS = (torch.Tensor, np.ndarray, np.generic)


@dataclass(frozen=True)
class Generated:
    """What a model wrote for a prompt.

    ids      the new tokens, without an eos token that ended them; a stop string's tokens are among them
    text     what they spell, before the stop string; None without a tokenizer
    finish   why it ended: "eos", "stop" (a stop string), or "length"
    score    of beam search: sum of log-probabilities / length^length_penalty, the eos token counted; else None
    """

    ids: list[int]
    text: str | None
    finish: str
    score: float | None = None


def generate(model: GPT2 | T5, input_ids, **options) -> list[Generated]:
    """What the model writes after each prompt (GPT-2), or for each text that its encoder reads (T5).

    Args:
        model: on any device; it computes in the dtype of its weights, without dropout.
        input_ids: token ids of the prompts, of any lengths: sequences of integers, 1-D tensors or
            arrays; one of them; or a padded tensor (B, S) with attention_mask. T5's end with </s>, as its tokenizer
            writes it.
        attention_mask: (B, S), nonzero for real tokens, padding on either side; None: all are real.
        tokenizer: spells the tokens, for `text` and `stop`: an object with `decode(ids, skip_special_tokens=)`. A model
            whose vocabulary is rounded up writes none of the ids beyond a fastlm.data.Tokenizer's `vocab_size`, or
            beyond `len(tokenizer)` of one of Transformers.
        rows: the number of each row, on which its draws depend, from 0 on; default 0, 1, ... The text of a row does not
            depend on the rows beside it, but for the rounding of its logits.
        **options: the others are those of `Settings`.

    Returns one Generated for each prompt. A row with fewer positions left than max_new_tokens ends by "length" there.
    ValueError for an argument that is out of range, an empty prompt, or one that is longer than the model's positions;
    FloatingPointError for logits that are NaN.
    """
    request = _request(model, input_ids, **options)
    count = len(request.prompts)
    if request.settings.num_beams > 1:
        with _inference(model):
            return _search(model, request)
    ids, texts, finish = [[] for _ in range(count)], [""] * count, [""] * count
    with _inference(model):
        for token in loop.run(_decoder(model, request), request, model.word.device):
            if token.finish != "eos":
                ids[token.row].append(token.id)
            texts[token.row] += token.text
            finish[token.row] = token.finish
    spelled = [None] * count if request.tokenizer is None else texts
    return [Generated(*row) for row in zip(ids, spelled, finish)]


def stream(model: GPT2 | T5, input_ids, **options) -> Iterator[Token]:
    """The tokens of `generate`, as they come. Arguments and errors as there, but no beams.

    On a device they come a few at a time. Between tokens the model is in the mode in which the caller left it, and
    autocast is the caller's.
    """
    request = _request(model, input_ids, **options)
    if request.settings.num_beams > 1:
        raise ValueError(
            f"num_beams: expected 1 where tokens are streamed, got {request.settings.num_beams}, which change until "
            "the end; call generate"
        )
    return _stream(model, loop.run(_decoder(model, request), request, model.word.device))


def _stream(model, tokens: Iterator[Token]) -> Iterator[Token]:
    while True:
        with _inference(model):
            token = next(tokens, None)
        if token is None:
            return
        yield token


def _search(model, request: Request) -> list[Generated]:
    settings = request.settings
    decoder = _decoder(model, request, copies=settings.num_beams)
    results = []
    for row, (ids, score) in enumerate(beams.search(decoder, request, model.word.device)):
        text, finish = request.text(row), "length"
        if ids and ids[-1] in request.ends:
            ids, finish = ids[:-1], "eos"
        if text is not None:
            text.add(*ids)
            finish = "stop" if text.stopped else finish
        results.append(Generated(ids, None if text is None else text.text, finish, score))
    return results


def _decoder(model, request: Request, copies: int = 1) -> Decoder:
    prompts = [len(prompt) for prompt in request.prompts]
    return make_decoder(model, prompts, max(request.limits), copies=copies, weights=request.settings.weights)


@contextmanager
def _inference(model):
    """The model in evaluation mode, without autocast: keys and values are kept in the dtype of its weights."""
    training = [module for module in model.modules() if module.training]  # some may be in evaluation mode already
    for module in training:
        module.training = False
    try:
        with torch.autocast(model.word.device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


def check_prompt(config, ids: list[int], place: str) -> None:
    """ValueError for a prompt that a model of this configuration does not continue."""
    if not ids:
        raise ValueError(f"input_ids: expected at least one token in every prompt, got none in {place}")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise ValueError(
            f"input_ids: expected ids from 0 to {config.vocab_size - 1}, the model's, got {min(ids)} to {max(ids)} in "
            f"{place}"
        )
    if config.length is not None and len(ids) > config.longest[1]:
        name, longest = config.longest
        raise ValueError(
            f"input_ids: expected at most {longest} tokens, the model's {name}, got {len(ids)} in {place}; leave out "
            "its beginning"
        )


def _request(
    model, input_ids, *, attention_mask=None, tokenizer: Decodes | None = None, rows=None, **options
) -> Request:
    if not isinstance(model, FAMILIES):
        raise ValueError(f"model: expected a fastlm.models.GPT2 or T5, got a {type(model).__name__}")
    if sharded := next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None):
        raise ValueError(
            f"model: expected whole weights, {sharded} is divided among processes (a DTensor); gather them first, as "
            "FSDPModule.unshard with set_reshard_after_forward(False)"
        )
    unknown = sorted(options.keys() - Settings.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{unknown[0]}: expected one of {', '.join(Settings.__dataclass_fields__)}")
    settings, config = Settings(**options), model.config
    if settings.stop and tokenizer is None:
        raise ValueError("tokenizer: expected one with stop strings, which are looked for in the text, got None")
    if settings.stop:
        _check_stops(settings.stop, tokenizer)
    prompts = _prompts(input_ids, attention_mask)
    vocab = min(config.vocab_size, _spelled(tokenizer) or config.vocab_size)
    limits = []
    for row, ids in enumerate(prompts):
        check_prompt(config, ids, f"prompt {row}")
        limit = settings.max_new_tokens
        if config.length is not None:
            limit = min(limit, config.longest[1] - len(ids) + 1)  # the last new token is never read
        limits.append(limit)
    ends = settings.ends(config.eos_token_id)
    if not all(0 <= id < config.vocab_size for id in ends):
        raise ValueError(f"eos_token_id: expected ids from 0 to {config.vocab_size - 1}, got {ends}")
    if settings.min_new_tokens and len({id for id in ends if id < vocab}) == vocab:
        raise ValueError(
            f"min_new_tokens: expected 0 where each of the {vocab} ids ends a row, got {settings.min_new_tokens}"
        )
    return Request(
        settings=settings,
        prompts=prompts,
        limits=limits,
        numbers=_numbers(rows, len(prompts)),
        ends=tuple(id for id in ends if id < vocab),
        vocab=vocab,
        tokenizer=tokenizer,
        start=config.decoder_start_token_id if isinstance(model, T5) else None,
    )


def _spelled(tokenizer: Decodes | None) -> int | None:
    """How many ids the tokenizer has; None where it does not say. Transformers' `vocab_size` leaves out added ones."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.vocab_size
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None


def _check_stops(stops: Sequence[str], tokenizer: Decodes) -> None:
    """ValueError for a special token, which is in no text."""
    for id in getattr(tokenizer, "special_ids", None) or getattr(tokenizer, "all_special_ids", ()):
        token = tokenizer.decode([id], skip_special_tokens=False).strip()
        found = next((stop for stop in stops if token and token in stop), None)
        if found is not None and not tokenizer.decode([id], skip_special_tokens=True):
            raise ValueError(
                f"stop: expected strings without special tokens, which are left out of the text, got {found!r}; "
                f"eos_token_id={id} ends a row at {token}"
            )


def _numbers(rows, count: int) -> list[int]:
    try:
        numbers = list(range(count)) if rows is None else list(map(operator.index, rows))
    except TypeError:
        numbers = None
    if numbers is None or len(numbers) != count or not all(0 <= number < 2**63 for number in numbers):
        raise ValueError(f"rows: expected a number from 0 on for each of {count} prompts, got {rows!r}")
    return numbers


def _prompts(input_ids, attention_mask) -> list[list[int]]:
    """The token ids of each prompt."""
    if isinstance(input_ids, torch.Tensor) and (input_ids.is_floating_point() or input_ids.dtype == torch.bool):
        raise ValueError(f"input_ids: expected integers, got {input_ids.dtype}")
    if attention_mask is not None:
        return _unpadded(input_ids, attention_mask)
    if isinstance(input_ids, _ARRAYS):
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, Sequence) or isinstance(input_ids, (str, bytes)):
        raise ValueError(
            f"input_ids: expected token ids, or several sequences of them, got a {type(input_ids).__name__}; a "
            "tokenizer turns text into ids"
        )
    rows = [row.tolist() if isinstance(row, _ARRAYS) else row for row in input_ids]
    if rows and all(isinstance(id, int) for id in rows):
        rows = [rows]
    if not rows:
        raise ValueError("input_ids: expected at least one prompt, got none")
    try:
        return [list(map(operator.index, row)) for row in rows]
    except TypeError:
        raise ValueError(
            "input_ids: expected token ids, integers, or several sequences of them; a tokenizer makes them"
        ) from None


def _unpadded(input_ids, attention_mask) -> list[list[int]]:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise ValueError("attention_mask: expected with a padded tensor of input_ids (B, S); leave it out")
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask: expected a tensor, as input_ids, got a {type(attention_mask).__name__}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected shape {tuple(input_ids.shape)}, as input_ids, got {tuple(attention_mask.shape)}"
        )
    if not len(input_ids):
        raise ValueError("input_ids: expected at least one prompt, got none")
    return [row[real].tolist() for row, real in zip(input_ids, attention_mask.to(input_ids.device) != 0)]
