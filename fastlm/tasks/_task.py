"""What the training loop knows of a task: a model, micro-batches, and losses to read the run's loss against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from fastlm.data import Batch, Batches, Dataset, Mixture, Tokenizer
from fastlm.data.batches import make_batch
from fastlm.data.contents import counted
from fastlm.data.layouts import Layout, MaskedRows
from fastlm.data.mixture import Joined
from fastlm.data.order import rows_at
from fastlm.data.packing import PADDING_SAMPLE
from fastlm.models import Counts, Model
from fastlm.settings import Table
from fastlm.tasks._tables import DataTable, TrainTable

EVALUATION_SEED = 0x65766C  # of the masks and the order of held-out text: losses of all recipes are of the same task


@dataclass(frozen=True)
class Micro:
    """One forward.

    inputs    keyword arguments of the model, `reduction="sum"` and its dropout's rng among them
    counts    what the forward runs on; `counts.predicted` tokens are in the sum that it returns
    dropped   how many more tokens should have been predicted than the fixed capacity holds; the loss leaves them out
    outputs   rows of what `Task.score` returns for it; 0 where the task has a loss alone
    """

    inputs: dict[str, object]
    counts: Counts
    dropped: int = 0
    outputs: int = 0

    def pin(self) -> Micro:
        """With tensors in pinned memory, from where a copy to the device does not wait."""
        return self.map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Micro:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Micro:
        """With each tensor of the inputs replaced by the function of it."""
        inputs = {k: function(v) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        return replace(self, inputs=inputs)


class Task:
    """What a model is trained to do. `recipe` is a fastlm.run.recipe.Recipe whose `task` is this one.

    models   the models that it trains, the default first; the recipe's model.architecture chooses one of them by its
             configuration's model_type
    tables   the recipe's tables beside [model]; a task with keys of its own puts a derived table here
    scored   whether an evaluation has outputs beside the loss: predictions, which `scores` measures
    """

    models: ClassVar[tuple[type[Model], ...]]
    tables: ClassVar[dict[str, type[Table]]] = {"data": DataTable, "train": TrainTable}
    scored: ClassVar[bool] = False
    output_shape: tuple[int, ...] = ()  # of a row of the outputs

    def __init__(
        self,
        recipe,
        dataset: Dataset | Mixture,
        device: torch.device,
        validation: Dataset | Joined | None = None,
    ):
        self.recipe, self.dataset, self.device, self.validation = recipe, dataset, device, validation
        self.batches = Batches(dataset, batch_rows=recipe.batch_rows, seed=recipe.train.seed)

    @classmethod
    def model_class(cls, architecture: str) -> type[Model]:
        """The model with this model_type. ValueError where the task does not train it."""
        known = {model.config_class.model_type: model for model in cls.models}
        if not isinstance(architecture, str) or architecture not in known:
            raise ValueError(f"model.architecture: expected {' or '.join(map(repr, known))}, got {architecture!r}")
        return known[architecture]

    @classmethod
    def layout(cls, data: DataTable) -> Layout:
        """How documents lie in the rows that this task trains on; by default as masked language modelling has them."""
        return MaskedRows(data.row_tokens)

    @classmethod
    def token_ids(cls, tokenizer: Tokenizer) -> dict[str, int | None]:
        """Entries of the model's configuration that the tokenizer decides, beside vocab_size and pad_token_id."""
        return {}

    @classmethod
    def model(cls, recipe, vocab_size: int, pad_id: int | None, **token_ids: int | None) -> Model:
        """A new model on the CPU, its weights drawn from the recipe's seed: the same for every device."""
        config = replace(recipe.model, vocab_size=vocab_size, pad_token_id=pad_id, **token_ids)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            return cls.model_class(config.model_type)(config)

    def head(self) -> dict[str, object]:
        """Entries of the model's configuration that the data decides: names of classes, say. By default none."""
        return {}

    def describe(self) -> str:
        """The data in a phrase, for the headline of a run."""
        data = self.dataset
        return (
            f"{counted(data.rows, 'row')} of {data.row_tokens} tokens, "
            f"{' and '.join(f'{x:.0%}' for x in data.fill)} full, vocabulary {data.tokenizer.vocab_size:,}"
        )

    def notes(self) -> list[str]:
        """What else there is to say of the data at the start of a run, in lines."""
        return []

    def initialize(self, model: Model) -> None:
        """Set what of a new model's weights starts from the data; by default nothing does."""

    def micro(self, step: int, m: int) -> Micro:
        """Micro-batch m, 0 to M-1, of step `step`, on the host: a pure function of (recipe, dataset, step, m).

        With the same shapes at every step where the device is not a CPU.
        """
        seed, count = self.recipe.train.seed, self.recipe.micro_count
        return self.make_micro(self.batches.at(step, m, count), seed, torch.tensor([seed, step * count + m]))

    def largest(self) -> Micro:
        """A micro-batch as large as any of a run."""
        return self.micro(0, 0)

    def evaluation(self) -> Iterator[Micro]:
        """Micro-batches of the held-out rows, the same at every call: what is random has a seed of its own."""
        for batch in self.evaluation_batches():
            yield self.make_micro(batch, EVALUATION_SEED, torch.tensor([EVALUATION_SEED, 0]), evaluation=True)

    def evaluation_batches(self) -> Iterator[Batch]:
        """At most train.eval_tokens of the held-out rows, in an order that does not depend on the recipe."""
        rows, data = self.validation.rows, self.recipe.data
        if self.recipe.train.eval_tokens:
            rows = min(rows, max(1, self.recipe.train.eval_tokens // data.row_tokens))
        order = rows_at(np.arange(rows), self.validation.rows, EVALUATION_SEED)[1]
        at_once = self.recipe.micro_rows
        for start in range(0, rows, at_once):
            row = order[start : start + at_once]
            yield make_batch(self.validation, np.zeros_like(row), row)

    def make_micro(self, batch: Batch, seed: int, rng: torch.Tensor, evaluation: bool = False) -> Micro:
        """One forward on the rows of `batch`: what is masked or corrupted is a function of `seed` and its samples.

        rng          int64 (2,), of the dropouts
        evaluation   whether it is of held-out text, whose task is the same for every recipe
        """
        raise NotImplementedError

    def score(self, model: Model, micro: Micro) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(sum of the losses, outputs) of a micro-batch of `evaluation` on the model's device, without gradients.

        outputs: floating point (micro.outputs, ...), of the same trailing shape for each; None where there are none.
        """
        return model(**micro.inputs), None

    def scores(self, outputs: np.ndarray) -> dict[str, float]:
        """Figures of the outputs of all of `evaluation`, one behind the other: {"accuracy": 0.9, ...}."""
        raise NotImplementedError

    def evaluated(self, loss: float) -> dict[str, float]:
        """What a mean loss (nats a predicted token) on the held-out text amounts to, for the metrics."""
        return {"val_loss": loss, "val_perplexity": perplexity(loss)}

    def metrics(self) -> dict[str, float]:
        """Losses to read the run's loss against, in nats: they go into summary.json and, as lines, into loss.png."""
        return {}


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; at most e^700, the largest that a float holds being e^709."""
    return math.exp(min(loss, 700.0))


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Of the summed loss of a text of so many UTF-8 bytes: it does not depend on the tokenizer."""
    return nats / (text_bytes * math.log(2))


def real_pairs(batch: Batch) -> int:
    """Sum of length² over the pieces, padding aside."""
    starts = batch.cu_seqlens[: batch.pieces + 1].long()
    real = batch.sample_ids[starts[:-1]] != PADDING_SAMPLE
    return int((starts.diff().square() * real).sum())
