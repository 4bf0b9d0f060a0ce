"""Tasks on labelled examples: fine-tuning. A row of such a recipe is one example, however long.

A batch is `train.batch_size` examples in the order of fastlm.data.order. They are packed back to back, with cu_seqlens,
so that no padding is computed; or padded to the longest of the batch, where that is faster (`layout`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from fastlm.data import Tokenizer
from fastlm.data.labelled import Examples, Ragged, Record, Records, hold_out, read_records
from fastlm.data.order import rows_at
from fastlm.data.sources import Report
from fastlm.models import Counts
from fastlm.settings import Table, key
from fastlm.tasks._tables import Optimization
from fastlm.tasks._task import EVALUATION_SEED, Micro, Task

# From this share of real tokens on, batches are padded, not packed. With as many tokens the two take the same time on a
# CPU, within the noise of a busy machine (LOG.md); on GPUs packing full rows costs 17% (urchade/GLiNER#292).
FULL = 0.98


@dataclass(frozen=True)
class LabelledData(Table):
    text: str = key("", "column of the text; of two texts, by commas; default: text, or sentence1 and sentence2, ...")
    label: str = key("", "column of the label; default: label, or labels, class, ...")
    header: bool = key(True, "whether the first line of a CSV file names its columns; else they are 1, 2, ...")
    max_length: int = key(0, "tokens of an example; longer ones are cut; 0: as many as the model takes", least=0)
    validation: str = key("", "examples to evaluate on, a path; they are not trained on")
    validation_share: float = key(
        0.1, "share of the examples that is held out for it, where data.validation is not given", least=0.0, below=1.0
    )
    test: str = key("", "examples that the best checkpoint is evaluated on at the end, a path")
    split_seed: int = key(0, "of the choice of the held-out examples", least=0, most=2**63 - 1)
    longest: int = key(0, "tokens of the longest example; a run sets it to what the data has", least=0)
    layout: str = key(
        "auto", "how examples lie in a batch: packed, or padded to the longest", one_of=("auto", "packed", "padded")
    )

    table: ClassVar[str] = "data"
    length_key: ClassVar[str] = "data.max_length"

    @property
    def row_tokens(self) -> int:
        """The longest example; its limit while that is not known; 1 without a limit."""
        return self.longest or self.max_length or 1


@dataclass(frozen=True)
class ExampleBatches(Table):
    """How examples make batches, and for how long they are trained on: counted in examples and epochs."""

    batch_size: int = key(32, "examples in the global batch of a step", least=1)
    micro_batch_size: int = key(0, "examples in one forward; it divides batch_size; 0: all of them", least=0)
    epochs: float = key(3.0, "how often each example is trained on", above=0.0)
    max_steps: int = key(0, "steps; 0: as many as the epochs take", least=0)
    warmup_share: float = key(0.1, "share of the steps with linear warm-up", least=0.0, below=1.0)

    table: ClassVar[str] = "train"
    batch_key: ClassVar[str] = "train.batch_size"
    micro_key: ClassVar[str] = "train.micro_batch_size"

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup_share * self.max_steps)

    def batch_rows(self, row_tokens: int) -> int:
        return self.batch_size

    def micro_rows(self, row_tokens: int) -> int:
        return self.micro_batch_size or self.batch_size

    @classmethod
    def sizes(cls, rows: int, row_tokens: int) -> dict[str, int]:
        return {cls.batch_key: rows, cls.micro_key: 0}

    @classmethod
    def micro_setting(cls, rows: int, row_tokens: int) -> str:
        return f"{cls.micro_key}={rows}"

    def check_rows(self, row_tokens: int) -> None:
        if self.batch_size % (self.micro_batch_size or 1):
            raise ValueError(
                f"train.micro_batch_size: expected a divisor of train.batch_size={self.batch_size}, or 0 for all, got "
                f"{self.micro_batch_size}"
            )


@dataclass(frozen=True)
class LabelledTrain(Optimization, ExampleBatches):
    lr: float = key(5e-5, "peak learning rate", above=0.0)
    beta2: float = key(0.999, "AdamW's and LAMB's", least=0.0, below=1.0)
    eps: float = key(1e-8, "AdamW's and LAMB's", above=0.0)
    seed: int = key(0, "of a new head's weights, order and dropout", least=0, most=2**63 - 1)
    eval_every: int = key(0, "steps between evaluations on the held-out examples; 0: after each epoch", least=0)
    checkpoint_every: int = key(0, "steps between checkpoints, beside the best and the last; 0: none", least=0)
    keep_checkpoints: int = key(1, "how many are kept beside the best, the newest", least=1)
    metric: str = key("", "figure on the held-out examples by which the best checkpoint is chosen; default: the task's")
    patience: int = key(0, "evaluations without a better one after which training stops; 0: it does not", least=0)


class Capacity(NamedTuple):
    """Of a packed micro-batch: tokens in all, sequences of padding at its end, and how long a sequence may be."""

    tokens: int
    pieces: int
    longest: int


class LabelledTask(Task):
    """A task on `Examples`. A subclass defines `encode`, `make_rows`, `score`, `scores` and these:

    measures   names of figures that `scores` returns, by which the best checkpoint may be chosen; by default the first
    plain      what plain-text files hold; see `read_records`
    longest    data.max_length where neither it nor the model bounds an example: T5 was pretrained on 512 tokens
    """

    tables: ClassVar[dict[str, type[Table]]] = {"data": LabelledData, "train": LabelledTrain}
    scored = True
    measures: ClassVar[tuple[str, ...]]
    plain: ClassVar[str] = "class"
    longest: ClassVar[int] = 512

    dataset: Examples
    validation: Examples | None

    @classmethod
    def encode(
        cls,
        records: Sequence[Record],
        recipe,
        tokenizer: Tokenizer,
        report: Report,
        *,
        labels: tuple[str, ...] | None = None,
        known: tuple[str, ...] = (),
        names: dict[str, list[str]] | None = None,
    ) -> Examples:
        """The examples of the rows. A row that is none is entered in the report.

        labels   those of the training examples, for held-out ones: another label is an error; None: those found
        known    the model's own, whose order is kept where they are the same
        names    of classes, by column, as a file gives them
        """
        raise NotImplementedError

    @classmethod
    def as_trained(cls, examples: Examples) -> dict[str, object]:
        """Arguments of `encode` for held-out examples: what the training examples decide."""
        return {"labels": examples.labels}

    @classmethod
    def tokenizer(cls, directory) -> Tokenizer:
        """The model's. ValueError where it lacks a special token that the task needs."""
        tokenizer = Tokenizer.load(directory)
        if tokenizer.cls_id is None or tokenizer.sep_id is None:
            raise ValueError(
                f"model: expected a tokenizer with [CLS] and [SEP], as BERT's, found another in {directory}"
            )
        return tokenizer

    @classmethod
    def learnable(cls, examples: Examples) -> Examples:
        """Those of `examples`, none of them held out, that can be trained on. ValueError where there are none."""
        return examples

    @classmethod
    def read(cls, paths: Sequence, recipe, report: Report) -> Records:
        """The rows of files."""
        return read_records(paths, report, plain=cls.plain, header=recipe.data.header)

    @classmethod
    def split(cls, examples: Examples, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the examples to train on, of those held out), as `hold_out`."""
        return hold_out(examples.rows, share, seed)

    def figure(self) -> str:
        """The figure that the best checkpoint is chosen by, as "accuracy". ValueError for an unknown one."""
        name = self.recipe.train.metric or self.measures[0]
        if name not in (*self.measures, "loss"):
            raise ValueError(
                f"train.metric: expected one of {', '.join((*self.measures, 'loss'))} for task {self.recipe.task}, got "
                f"{name!r}"
            )
        return name

    def describe(self) -> str:
        data, lengths = self.dataset, self.dataset.lengths
        held = "none" if self.validation is None else f"{self.validation.rows:,}"
        padding = "" if self.layout == "padded" else "padded to the longest they would be "
        return (
            f"{data.rows:,} examples, {held} held out, of {lengths.min()} to {lengths.max()} tokens, mean "
            f"{lengths.mean():.1f}; batches are {self.layout}, {padding}{self._fill:.0%} full"
        )

    def notes(self) -> list[str]:
        lines = reading_notes("training" if self.apart else "data", self.dataset)
        if self.validation is None:
            return lines
        lines += reading_notes("held out", self.validation) if self.apart else []
        trained = set(self.dataset.texts())
        if same := sum(text in trained for text in self.validation.texts()):
            lines.append(f"held out: {same:,} of {self.validation.rows:,} examples have a text that is trained on")
        return lines

    @property
    def apart(self) -> bool:
        """Whether the held-out examples were read from other files."""
        return self.validation is not None and self.validation.report is not self.dataset.report

    @cached_property
    def layout(self) -> str:
        """ "packed", or "padded" where next to no padding is computed: full rows need no cu_seqlens (`FULL`)."""
        if self.recipe.data.layout != "auto":
            return self.recipe.data.layout
        return "padded" if self._fill >= FULL else "packed"

    @cached_property
    def _fill(self) -> float:
        """The share of padded batches that is no padding, of those of the first epoch."""
        lengths, rows = self.dataset.lengths, min(self.recipe.micro_rows, self.dataset.rows)
        order = rows_at(np.arange(len(lengths) // rows * rows), len(lengths), self.recipe.train.seed)[1]
        batches = lengths[order].reshape(-1, rows)
        return float(batches.sum() / (batches.max(1) * rows).sum())

    def micro(self, step: int, m: int) -> Micro:
        recipe = self.recipe
        _, rows = self.batches.rows_at(step, m, recipe.micro_count)
        rng = torch.tensor([recipe.train.seed, step * recipe.micro_count + m])
        return self.make_rows(self.dataset, rows, rng, self.capacity)

    @cached_property
    def capacity(self) -> Capacity | None:
        """What every micro-batch of the run is filled up to: on a device all have one shape, for a CUDA graph."""
        return self.capacity_of(self.dataset.lengths)

    def capacity_of(self, lengths: np.ndarray) -> Capacity | None:
        """The capacity of micro-batches whose rows have so many tokens, (examples,)."""
        recipe = self.recipe
        if self.device.type == "cpu" or self.layout == "padded":
            return None
        total = recipe.train.max_steps * recipe.batch_rows
        rows = rows_at(np.arange(total), self.dataset.rows, recipe.train.seed)[1]
        totals = lengths[rows].reshape(-1, recipe.micro_rows).sum(1)
        longest = int(lengths.max())
        return Capacity(int(totals.max()), -(-int(totals.max() - totals.min()) // longest), longest)

    def largest(self) -> Micro:
        longest = np.argsort(-self.dataset.lengths, kind="stable")
        rows = np.resize(longest[: self.recipe.micro_rows], self.recipe.micro_rows)
        return self.make_rows(self.dataset, rows, torch.tensor([0, 0]))

    def evaluation(self) -> Iterator[Micro]:
        data, at_once = self.validation, self.recipe.micro_rows
        for start in range(0, data.rows, at_once):
            rows = np.arange(start, min(start + at_once, data.rows))
            yield self.make_rows(data, rows, torch.tensor([EVALUATION_SEED, 0]))

    def evaluation_batches(self):
        raise NotImplementedError("examples are no rows of packed text")

    def make_rows(self, data: Examples, rows: np.ndarray, rng: torch.Tensor, capacity: Capacity | None = None) -> Micro:
        """One forward on the examples numbered `rows` (k,).

        rng        int64 (2,), of the dropouts
        capacity   what packed examples are filled up to, by sequences of padding behind them; None: nothing
        """
        raise NotImplementedError

    def inputs(self, data: Examples, rows: np.ndarray, capacity: Capacity | None, **more: tuple[Ragged, int]) -> dict:
        """The model's arguments for token ids and what else has a value for each token, packed or padded.

        more: by argument, (values, what padding has)
        """
        ids, pad = data.ids, data.tokenizer.pad_id or 0
        columns = {"input_ids": (ids, pad), **more}
        if self.layout == "padded":
            return padded(columns, rows)
        return packed(columns, rows, capacity)

    def evaluated(self, loss: float) -> dict[str, float]:
        return {"val_loss": loss}

    def metrics(self) -> dict[str, float]:
        return {}

    def counts(self, data: Examples, rows: np.ndarray, predicted: int) -> Counts:
        lengths = data.lengths[rows]
        return Counts(int(lengths.sum()), int((lengths**2).sum()), predicted)

    def details(self, outputs: np.ndarray) -> dict[str, object]:
        """What there is to say of the outputs beside the figures: "classes", "confusion", "scatter"."""
        return {}


def packed(columns: dict[str, tuple[Ragged, int]], rows: np.ndarray, capacity: Capacity | None = None) -> dict:
    """{"input_ids": (T,), ..., "cu_seqlens": (k + 1,), "positions": (T,), "max_seqlen": int}.

    columns: by argument, (values, what padding has). With a capacity T is capacity.tokens, and capacity.pieces
    sequences of padding follow, which may be empty.
    """
    lengths = next(iter(columns.values()))[0].lengths[rows]
    total = int(lengths.sum())
    starts, fill = np.concatenate([[0], np.cumsum(lengths)]), 0
    if capacity is not None:
        fill = capacity.tokens - total
        ends = total + capacity.longest * np.arange(1, capacity.pieces + 1)
        starts = np.concatenate([starts, np.minimum(ends, capacity.tokens)])
    out = {
        name: torch.from_numpy(np.concatenate([ragged.take(rows), np.full(fill, pad)]).astype(np.int64))
        for name, (ragged, pad) in columns.items()
    }
    positions = np.arange(total + fill) - np.repeat(starts[:-1], np.diff(starts))
    return {
        **out,
        "cu_seqlens": torch.from_numpy(starts.astype(np.int32)),
        "positions": torch.from_numpy(positions),
        "max_seqlen": int(lengths.max()) if capacity is None else capacity.longest,
    }


def padded(columns: dict[str, tuple[Ragged, int]], rows: np.ndarray) -> dict:
    """{"input_ids": (k, S), ..., "attention_mask": (k, S) bool}, S the longest; no mask where all are as long."""
    lengths = next(iter(columns.values()))[0].lengths[rows]
    real = np.arange(lengths.max()) < lengths[:, None]
    out = {}
    for name, (ragged, pad) in columns.items():
        cells = np.full(real.shape, pad, np.int64)
        cells[real] = ragged.take(rows)
        out[name] = torch.from_numpy(cells)
    return out if real.all() else {**out, "attention_mask": torch.from_numpy(real)}


def named_labels(
    found: Sequence[Sequence[str]],
    places: Sequence[str],
    column: str,
    labels: tuple[str, ...] | None,
    known: Sequence[str],
    given: Sequence[str] | None,
) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers.

    found    those of each example
    labels   of the training examples, where these are held out; a label that is none of them is a ValueError
    known    the model's, whose order is kept where they are the same names
    given    by the file, in its order
    Else they are in the order of numbers, where all are, or of letters.
    """
    names = {name for row in found for name in row}
    if labels is not None:
        for row, place in zip(found, places):
            for name in row:
                if name not in labels:
                    raise ValueError(
                        f'data.label: expected one of {_list(labels)} in column "{column}", as in the training '
                        f"examples, got {name!r} in {place}; mend the row, or add examples of it to those"
                    )
        return labels
    if not found:
        return ()  # the reader says why no row can be used
    if given is not None and names <= set(given):
        names = set(given)
    if len(names) < 2:
        raise ValueError(
            f'data.label: expected at least two classes in column "{column}", found only {_list(names)} in '
            f"{len(found)} rows; name the column of the label with --set data.label=NAME"
        )
    if names == set(known):
        return tuple(known)
    if given is not None and names == set(given):
        return tuple(given)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _list(names) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "") or "none"


BARE = "words without a token"  # an entry of Examples.cut


def reading_notes(name: str, examples: Examples) -> list[str]:
    """What was set aside and cut of the rows that were read, in lines; none where nothing was."""
    notes, report = [], examples.report
    if report.set_aside:
        notes.append(f"{name}: {report.kept:,} examples of {report.read:,} rows; set aside: {report.reasons()}")
    told = {what: f"{count:,} {what}" for what, count in examples.cut.items() if count}
    if bare := told.pop(BARE, None):
        notes.append(f"{name}: the tokenizer makes nothing of {bare.removesuffix(' without a token')}")
    if told:
        longest = examples.manifest["settings"]["max_length"]
        notes.append(f"{name}: cut off at {longest} tokens: {', '.join(told.values())}")
    if told := [f"{count:,} {what}" for what, count in examples.told.items() if count]:
        notes.append(f"{name}: {', '.join(told)}")
    return notes


def rows_of(inputs: dict) -> list[slice]:
    """Where each example of `packed` or `padded` inputs is in the flattened token ids, padding aside."""
    if "cu_seqlens" in inputs:
        starts = inputs["cu_seqlens"].tolist()
        return [slice(*pair) for pair in pairwise(starts)]
    rows, width = inputs["input_ids"].shape
    mask = inputs.get("attention_mask")
    lengths = [width] * rows if mask is None else mask.sum(1).tolist()
    return [slice(row * width, row * width + length) for row, length in enumerate(lengths)]


def without(micro: Micro, *names: str) -> dict:
    """The inputs but for these and `reduction`: a model then returns logits."""
    return {name: value for name, value in micro.inputs.items() if name not in (*names, "reduction")}


LESS_IS_BETTER = ("loss", "perplexity", "rmse", "mae")


def best_sign(figure: str) -> int:
    """1 where more of the figure is better, -1 where less is."""
    return -1 if figure in LESS_IS_BETTER else 1
