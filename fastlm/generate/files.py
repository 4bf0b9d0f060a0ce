"""Prompts and models from files, and what was written as JSON lines: for the command `fastlm generate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fastlm.data import Tokenizer
from fastlm.generate.api import FAMILIES, Generated, check_prompt, generate, stream
from fastlm.models import GPT2, T5
from fastlm.models._checkpoint import read_config

_FAMILIES = {cls.config_class.model_type: cls for cls in FAMILIES}
_FIELDS = ("prompt", "text")  # of a JSON line: the first that it has


class Speed:
    """Tokens that were written, and the time since it was made."""

    def __init__(self) -> None:
        self.tokens, self._began = 0, time.perf_counter()

    def __str__(self) -> str:
        seconds = time.perf_counter() - self._began
        return f"{self.tokens:,} tokens in {seconds:.2f} s: {self.tokens / seconds:,.1f} tokens/s"


class Prompt(NamedTuple):
    """place: where it was read, for errors."""

    text: str
    place: str


class Writer(NamedTuple):
    """A model and its tokenizer."""

    model: GPT2 | T5
    tokenizer: Tokenizer

    @classmethod
    def load(cls, directory: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Writer:
        """Of a directory in Transformers' layout, as OUT/hf after `fastlm pretrain`. ValueError for another family."""
        if not directory.is_dir():
            raise ValueError(f"model: expected a directory, as OUT/hf after `fastlm pretrain`, got {str(directory)!r}")
        family = read_config(directory).get("model_type")
        if family not in _FAMILIES:
            hint = "; `fastlm fill-mask` shows what a BERT puts in place of masks" if family == "bert" else ""
            raise ValueError(f'model: expected model_type "gpt2" or "t5" in {directory}, got {family!r}{hint}')
        model = _FAMILIES[family].from_pretrained(directory, dtype=dtype).eval()
        tokenizer = Tokenizer.load(directory)
        tokenizer.check_size(model.config.vocab_size, directory)
        return cls(model.to(device), tokenizer)

    @property
    def continues(self) -> bool:
        """Whether what it writes goes on where the prompt ends, as GPT-2's; T5's answers it."""
        return isinstance(self.model, GPT2)

    def encode(self, prompt: Prompt) -> list[int]:
        """As the tokenizer encodes a text that a model reads; T5's ends with </s>. ValueError for a wrong length."""
        if not prompt.text:
            begin = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
            token = "" if begin is None else self.tokenizer.decode([begin], skip_special_tokens=False)
            hint = f"; {token} is the beginning of a text" if token and self.continues else ""
            raise ValueError(f"prompt: expected a text, got an empty one in {prompt.place}{hint}")
        ids, end = self.tokenizer.encode(prompt.text), self.model.config.eos_token_id
        if not self.continues and end is not None and ids[-1:] != [end]:
            ids.append(end)
        check_prompt(self.model.config, ids, prompt.place)
        return ids

    def pieces(self, prompt: Prompt, speed: Speed, **options) -> Iterator[str]:
        """The text of one prompt as it comes, after GPT-2's prompt."""
        tokens = stream(self.model, [self.encode(prompt)], tokenizer=self.tokenizer, **options)
        if self.continues:
            yield prompt.text
        for token in tokens:
            speed.tokens += 1
            yield token.text

    def answers(self, prompts: list[Prompt], batch: int, speed: Speed, **options) -> Iterator[tuple[Prompt, Generated]]:
        """Of each prompt, in their order, `batch` at a time. All prompts are checked first, by this call."""
        return self._answers(prompts, [self.encode(prompt) for prompt in prompts], batch, speed, options)

    def _answers(self, prompts, encoded, batch, speed, options) -> Iterator[tuple[Prompt, Generated]]:
        for start in range(0, len(prompts), batch):
            ids = encoded[start : start + batch]
            rows = range(start, start + len(ids))
            found = generate(self.model, ids, tokenizer=self.tokenizer, rows=rows, **options)
            speed.tokens += sum(len(answer.ids) + (answer.finish == "eos") for answer in found)
            yield from zip(prompts[start:], found)


def read_prompts(paths: Iterable[str]) -> list[Prompt]:
    """One prompt a line of each file, blank ones left out; of .jsonl and .ndjson the field "prompt", else "text".

    "-" is standard input, "-.jsonl" JSON lines from there. ValueError, with the place, for what is no prompt, and where
    there is none.
    """
    prompts = []
    for path in paths:
        try:
            stdin = path == "-" or path.startswith("-.")
            text = sys.stdin.read() if stdin else Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data: expected UTF-8 in {path}: {error}") from error
        read = _of_json if Path(path).suffix in (".jsonl", ".ndjson") else lambda line, place: line
        # Not splitlines: a text may have other line breaks inside. Windows may begin a file with a byte order mark.
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            if line.strip():
                place = f"{path}, line {number}"
                prompts.append(Prompt(read(line.removesuffix("\r"), place), place))
    if not prompts:
        raise ValueError(f"data: expected at least one prompt, a line each, found none in {', '.join(paths)}")
    return prompts


def _of_json(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"data: {place} is not valid JSON: {error}") from error
    for name in _FIELDS if isinstance(record, dict) else ():
        if isinstance(record.get(name), str):
            return record[name]
    raise ValueError(f'data: expected an object with a string "prompt" or "text" in {place}, got {line[:80]!r}')


def as_json(prompt: Prompt, answer: Generated) -> str:
    """A line for the answer: prompt, text, ids and finish, and score where beams were searched."""
    record = {"prompt": prompt.text, "text": answer.text, "ids": answer.ids, "finish": answer.finish}
    if answer.score is not None:
        record["score"] = answer.score
    return json.dumps(record, ensure_ascii=False)
