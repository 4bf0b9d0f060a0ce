"""The model and the text that are evaluated, and the figures that come out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastlm.chip import parse_device
from fastlm.data import Tokenizer
from fastlm.data._checks import integer
from fastlm.data.packing import encode_documents
from fastlm.data.sources import FIELDS, Report, find_files, read_documents
from fastlm.evaluate import causal, masked, spans
from fastlm.evaluate._sums import Sums
from fastlm.models import Model
from fastlm.pretrained import FAMILIES, load_pretrained
from fastlm.run.directory import read_recipe
from fastlm.run.initial import find_initial
from fastlm.run.recipe import Recipe
from fastlm.tasks import bits_per_byte, find_task, perplexity

BATCH_TOKENS = 4096
_SPAN_WINDOW = 512  # tokens of T5's encoder where no recipe says how many it was trained on: those of its pretraining
_EVALUATIONS = {"bert": masked, "gpt2": causal, "t5": spans}


@dataclass
class _Texts:
    """The documents of `paths`, and what was counted while they were read."""

    paths: list
    documents: str
    fields: tuple[str, ...]
    report: Report
    count: int = 0
    bytes: int = 0

    def __iter__(self) -> Iterator[str]:
        for place, text in read_documents(
            find_files(self.paths, self.report), self.documents, self.report, fields=self.fields
        ):
            text = text.strip()
            if not text:
                self.report.reject("empty document", place)
                continue
            self.count += 1
            self.bytes += len(text.encode())
            yield text

    def check(self) -> None:
        if not self.count:
            raise ValueError(
                f"data: expected at least one document in {', '.join(map(str, self.paths))}, found none "
                f"({self.report.reasons()})"
            )


def evaluate(
    model,
    data,
    *,
    documents: str = "file",
    fields: tuple[str, ...] = FIELDS,
    window: int | None = None,
    stride: int | None = None,
    share: float | None = None,
    ends: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, object]:
    """Figures of a GPT-2, a BERT or a T5 on text, as `fastlm evaluate --json` prints them.

    model         a directory in Transformers' layout, of a run or of one of its checkpoints
    data          a path or several, as of `fastlm.data.prepare`
    documents     what of a plain-text file is a document: "file", "line" or "blank" (between blank lines)
    window        tokens of a window, special tokens included; None: data.row_tokens of a run, else the model's length
    stride        GPT-2: tokens from one window to the next; None: half of the window
    share         BERT: the share of the tokens that is masked, by hash; None: about 4096 tokens, or all of fewer
    ends          GPT-2: whether the token that ends a document is predicted too
    batch_tokens  tokens of a forward, at most, where a single window is not longer
    dtype         of the matrix products: torch.float32 or torch.bfloat16

    ValueError for what is no such model or has no token to predict, and for an argument of another family or out of
    range.
    """
    paths, device = [data] if isinstance(data, (str, Path)) else list(data), parse_device(device)
    integer("batch_tokens", batch_tokens, 1)
    texts = _Texts(paths, documents, (fields,) if isinstance(fields, str) else tuple(fields), Report())
    trained, tokenizer, recipe = _find(model)
    family = trained.config.model_type
    given = {"window": window, "stride": stride, "share": share, "ends": None if ends else False}
    module = _EVALUATIONS[family]
    for name in [name for name, value in given.items() if value is not None and name not in module.SETTINGS]:
        raise ValueError(f"{name}: expected none for a {family} model, got {given[name]!r}")
    if window is None:
        given["window"] = _usual_window(trained, recipe)
    settings = module.settings(trained, tokenizer, **{name: given[name] for name in module.SETTINGS})
    unknown = 0

    def count_unknown(chunks: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        nonlocal unknown
        unknown += int((ids == tokenizer.unk_id).sum()) if tokenizer.unk_id is not None else 0

    start = time.perf_counter()
    sums = Sums(trained.to(device), dtype, batch_tokens)
    found = module.run(sums, encode_documents(texts, tokenizer, count_unknown), tokenizer, settings)
    texts.check()
    if not sums.predicted:
        of = f"{found['tokens']:,} tokens of {texts.count:,} documents"
        if given["share"] is not None and found["tokens"]:
            raise ValueError(f"share: expected one that chooses a token, got {share:g}, which chooses none of {of}")
        raise ValueError(f"data: expected a token to predict, found none in {of}; name other files")
    seconds = time.perf_counter() - start
    loss = sums.nats / sums.predicted
    result = {
        "model": str(model),
        "family": family,
        "documents": texts.count,
        "bytes": texts.bytes,
        **found,
        "unknown": unknown,
        "predicted": sums.predicted,
        "loss": loss,
    }
    if family != "t5":
        result["perplexity" if family == "gpt2" else "pseudo_perplexity"] = perplexity(loss)
    if family == "gpt2":
        result["bits_per_byte"] = bits_per_byte(sums.nats, texts.bytes)
    return {
        **result,
        "seconds": seconds,
        "computed_tokens": sums.computed,
        "tokens_per_s": sums.computed / seconds,
        "set_aside": texts.report.set_aside,
    }


def _find(model) -> tuple[Model, Tokenizer, dict | None]:
    """(model in evaluation, on the CPU; its tokenizer; the recipe of its run as it is stored, None without)."""
    initial = find_initial(model, "model")
    if initial.checkpoint is not None:
        stored, tokenizer = initial.checkpoint.state["recipe"], Tokenizer.load(initial.tokenizer)
        recipe = Recipe.from_dict(stored)
        found, wanted = find_task(recipe.task).model_class(recipe.model.model_type), FAMILIES[recipe.model.model_type]
        if found is not wanted:
            raise ValueError(
                f"model: expected {wanted.architecture} with its trained head in {model}, found {found.architecture}, "
                f"fine-tuned by task {recipe.task}; its figures are in metrics.json of the run"
            )
        trained = initial.model(recipe, tokenizer).eval()
        tokenizer.check_size(trained.config.vocab_size, model)
        return trained, tokenizer, stored
    trained, tokenizer = load_pretrained(initial.directory)
    return trained, tokenizer, read_recipe(initial.directory.absolute().parent)


def _usual_window(model: Model, recipe: dict | None) -> int:
    longest = _SPAN_WINDOW if model.config.longest is None else model.config.longest[1]
    rows = (recipe or {}).get("data", {}).get("row_tokens", longest)
    return rows if model.config.longest is None else min(rows, longest)


def describe(result: dict[str, object]) -> list[str]:
    """The lines that `fastlm evaluate` prints of a result."""
    family = result["family"]
    first = f"{result['documents']:,} documents, {result['tokens']:,} tokens, {result['bytes']:,} bytes"
    if result["unknown"]:
        first += f"; {result['unknown']:,} of the tokens are unknown ones, which hide text"
    lines = [f"{result['model']} ({family}) on {first}", _EVALUATIONS[family].describe(result)]
    figures = [f"loss {result['loss']:.4f} nats a token"]
    if "perplexity" in result:
        figures += [f"perplexity {result['perplexity']:.4g}", f"{result['bits_per_byte']:.4f} bits a byte"]
    if "pseudo_perplexity" in result:
        figures.append(f"pseudo-perplexity {result['pseudo_perplexity']:.4g}")
    lines.append(", ".join(figures))
    lines.append(f"{result['seconds']:.1f} s, {result['tokens_per_s']:,.0f} computed tokens/s")
    for reason, entry in result["set_aside"].items():
        lines.append(f"set aside: {entry['count']:,} {reason} (first: {entry['first'][0]})")
    return lines
