"""What a fine-tuned model says of texts: classes with their probabilities, numbers, or a tag for each word.

Texts are read in windows. Those of a window are sorted by length, packed to batches of about `tokens` tokens, and
written in the order in which they came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from fastlm.data import Tokenizer
from fastlm.data.labelled import Ragged, Record, choose_columns, text_of
from fastlm.data.labelled.columns import TEXTS, TOKENS
from fastlm.data.labelled.records import is_text
from fastlm.data.sources import Report
from fastlm.models import BertForSequenceClassification, BertForTokenClassification, Model
from fastlm.models._checkpoint import read_json
from fastlm.tasks._labelled import packed
from fastlm.tasks._scores import entities
from fastlm.tasks._texts import encode_texts
from fastlm.tasks.tag import OUTSIDE, encode_words

WINDOW = 4096  # rows that are read before the first is predicted
TOKENS_AT_ONCE = 4096
_MODELS = {cls.architecture: cls for cls in (BertForSequenceClassification, BertForTokenClassification)}


def model_directory(directory) -> Path:
    """Of the model of a run's directory, OUT/hf of OUT; another directory as it is."""
    run = Path(directory)
    return run / "hf" if (run / "hf" / "config.json").is_file() else run


def architecture_of(directory: Path) -> str:
    """The first of the `architectures` in config.json; "none" where there is none."""
    path = directory / "config.json"
    return ((read_json(path) if path.is_file() else {}).get("architectures") or ["none"])[0]


def batches(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Numbers of rows of these lengths, sorted by length, in groups of about `tokens` tokens."""
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    return [chosen for chosen in np.split(order, np.flatnonzero(np.diff(ends // tokens)) + 1) if len(chosen)]


class Predictor:
    """A fine-tuned model: `predictor.predict(records, report)` gives a dictionary for each.

    directory   as OUT/hf, or OUT, of a fine-tuning; or a BertForSequenceClassification or BertForTokenClassification
                in Transformers' layout
    text        columns of the text, by commas; "": those that the model was trained on, where the directory is that of
                a run, or the defaults of fastlm.data.labelled.columns
    longest     tokens of a row, at most: the model's, or data.max_length of the run; cut: how many rows were longer
    bare        of how many texts the tokenizer makes nothing: they are predicted from the special tokens alone
    """

    def __init__(self, directory, *, text: str = "", device: torch.device | str = "cpu", dtype=torch.float32):
        self.directory = model_directory(directory)
        trained = _trained_on(self.directory)
        self.text, self.device, self.dtype = text or trained.get("text", ""), device, dtype
        self.cut = self.bare = 0
        architecture = architecture_of(self.directory)
        if architecture not in _MODELS:
            raise ValueError(
                f"model: expected a fine-tuned {' or '.join(_MODELS)} in {directory}, found {architecture}; name the "
                "directory of a run of `fastlm finetune`"
            )
        self.model: Model = _MODELS[architecture].from_pretrained(self.directory).eval().to(device)
        self.longest = self.model.config.max_position_embeddings
        self.longest = min(trained.get("max_length") or self.longest, self.longest)
        self.tokenizer, self.labels = Tokenizer.load(self.directory), self.model.config.labels
        self.tags = isinstance(self.model, BertForTokenClassification)

    def predict(
        self, records: Iterable[Record], report: Report, *, window: int = WINDOW, tokens: int = TOKENS_AT_ONCE
    ) -> Iterator[dict]:
        """A dictionary for each record that has a text, in order; others are entered in the report.

        {"place", "text", "label", "probability", "probabilities"}, with several labels "labels" in place of the first
        two, with numbers "value"; with tags {"place", "tokens", "tags", "probabilities", "entities"}.
        """
        records, columns = iter(records), None
        while rows := list(islice(records, window)):
            if columns is None:
                defaults = (*TOKENS, *TEXTS) if self.tags else TEXTS
                columns = choose_columns("data.text", self.text, defaults, rows)
            yield from (self._tagged if self.tags else self._classified)(rows, columns, report, tokens)

    def _classified(
        self, rows: Sequence[Record], columns: tuple[str, ...], report: Report, tokens: int
    ) -> Iterator[dict]:
        kept = _kept(((row, text_of(row, columns)) for row in rows), report)
        encoded = encode_texts([text for _, text in kept], self.tokenizer, self.longest)
        self.cut += encoded.cut
        self.bare += encoded.bare
        more = {} if encoded.types is None else {"token_type_ids": (encoded.types, 0)}
        logits = np.empty((len(kept), len(self.labels)), np.float32)
        for chosen, out in self._forward(encoded.ids, more, tokens):
            logits[chosen] = out
        problem = self.model.config.problem_type
        several = problem == "multi_label_classification"
        shares = _sigmoid(logits) if several else _softmax(logits)
        for (row, text), values, found in zip(kept, shares, logits):
            said = {"place": row.place, "text": text[0] if len(text) == 1 else list(text)}
            probabilities = {name: round(float(value), 6) for name, value in zip(self.labels, values)}
            if problem == "regression" or len(self.labels) == 1:
                said["value"] = float(found[0])
            elif several:
                said |= {"labels": [name for name, value in zip(self.labels, found) if value >= 0]}
                said |= {"probabilities": probabilities}
            else:
                best = self.labels[int(values.argmax())]
                said |= {"label": best, "probability": probabilities[best], "probabilities": probabilities}
            yield said

    def _tagged(self, rows: Sequence[Record], columns: tuple[str, ...], report: Report, tokens: int) -> Iterator[dict]:
        kept = _kept(((row, self._words(row, columns[0])) for row in rows), report)
        sentences = [words for _, words in kept]
        ids, firsts, cut, _ = encode_words(sentences, self.tokenizer, self.longest)
        self.cut += sum(count > 0 for count in cut)
        shares: list[np.ndarray] = [np.empty(0)] * len(kept)
        ragged, borne = Ragged.of(ids), [np.array(first) for first in firsts]
        for chosen, out in self._forward(ragged, {}, tokens):
            starts = np.cumsum([0, *ragged.lengths[chosen]])
            for row, start in zip(chosen, starts):
                at = borne[row]
                shares[row] = _softmax(out[start + at[at >= 0]])
        for number, (row, words) in enumerate(kept):
            tags, probabilities = [OUTSIDE] * len(words), [0.0] * len(words)
            for place, values in zip(np.flatnonzero(borne[number] >= 0), shares[number]):
                best = int(values.argmax())
                tags[place], probabilities[place] = self.labels[best], round(float(values[best]), 6)
            yield {
                "place": row.place,
                "tokens": words,
                "tags": tags,
                "probabilities": probabilities,
                "entities": [
                    {"type": kind, "first": first, "stop": stop, "text": " ".join(words[first:stop])}
                    for kind, first, stop in entities(tags)
                ],
            }

    def _words(self, row: Record, column: str) -> list[str] | str:
        """The words of a list, or of a text as the tokenizer divides it; a string in place of a list is the reason."""
        value = row.values.get(column)
        if isinstance(value, list) and value and all(isinstance(word, str) and is_text(word) for word in value):
            return value
        text = text_of(row, (column,))
        if isinstance(text, str):
            return f'neither words nor a text in column "{column}"'
        pre = self.tokenizer.backend.pre_tokenizer
        spans = [span for _, span in pre.pre_tokenize_str(text[0])] if pre is not None else []
        return [text[0][start:stop] for start, stop in spans] or text[0].split()

    @torch.inference_mode()
    def _forward(self, ids: Ragged, more: dict, tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of the rows, logits) of batches of about `tokens` tokens, of rows of similar length."""
        kind = torch.device(self.device).type
        for chosen in batches(ids.lengths, tokens):
            inputs = packed({"input_ids": (ids, 0), **more}, chosen)
            inputs = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            with torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(**inputs)
            yield chosen, logits.float().cpu().numpy()


def _trained_on(directory: Path) -> dict:
    """The table "data" in the recipe of the run that left `directory`; {} where there is none."""
    path = directory.absolute().parent / "recipe.json"
    return (read_json(path).get("data") or {}) if path.is_file() else {}


def _kept(rows: Iterable[tuple[Record, Sequence[str] | str]], report: Report) -> list[tuple[Record, Sequence[str]]]:
    kept = []
    for row, text in rows:
        if isinstance(text, str):
            report.reject(text, row.place)
        else:
            kept.append((row, text))
    report.kept += len(kept)
    return kept


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * logits))  # without overflow


def describe(predictor: Predictor, report: Report, seconds: float, say: Callable[[str], None]) -> None:
    """The end of a prediction: rows, the rate, and what was set aside or cut."""
    say(f"{report.kept:,} rows in {seconds:.1f} s, {report.kept / max(seconds, 1e-9):,.0f} a second")
    if report.set_aside:
        say(f"set aside: {report.reasons()}")
    if predictor.cut:
        say(f"cut to {predictor.longest} tokens: {predictor.cut:,} rows")
    if predictor.bare:
        say(f"the tokenizer makes no token of a text: {predictor.bare:,} rows, predicted from the special tokens alone")
