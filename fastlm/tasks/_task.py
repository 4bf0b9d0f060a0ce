"""What the training loop knows of a task: a model, micro-batches, and losses to read the run's loss against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fastlm.data import Dataset
from fastlm.models import Counts, Model
from fastlm.settings import Table
from fastlm.tasks._tables import DataTable, TrainTable


@dataclass(frozen=True)
class Micro:
    """One forward.

    inputs    keyword arguments of the model, `reduction="sum"` and its dropout's rng among them
    counts    what the forward runs on; `counts.predicted` tokens are in the sum that it returns
    dropped   how many more tokens should have been predicted than the fixed capacity holds; the loss leaves them out
    """

    inputs: dict[str, object]
    counts: Counts
    dropped: int = 0

    def pin(self) -> Micro:
        """With tensors in pinned memory, from where a copy to the device does not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Micro:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function) -> Micro:
        inputs = {k: function(v) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        return replace(self, inputs=inputs)


class Task:
    """What a model is trained to do. `recipe` is a fastlm.run.recipe.Recipe whose `task` is this one.

    models   the models that it trains, the default first; the recipe's model.architecture chooses one of them by its
             configuration's model_type
    tables   the recipe's tables beside [model]; a task with keys of its own puts a derived table here
    """

    models: ClassVar[tuple[type[Model], ...]]
    tables: ClassVar[dict[str, type[Table]]] = {"data": DataTable, "train": TrainTable}

    def __init__(self, recipe, dataset: Dataset, device: torch.device):
        self.recipe, self.dataset, self.device = recipe, dataset, device

    @classmethod
    def model_class(cls, architecture: str) -> type[Model]:
        """The model with this model_type. ValueError where the task does not train it."""
        known = {model.config_class.model_type: model for model in cls.models}
        if not isinstance(architecture, str) or architecture not in known:
            raise ValueError(f"model.architecture: expected {' or '.join(map(repr, known))}, got {architecture!r}")
        return known[architecture]

    @classmethod
    def model(cls, recipe, vocab_size: int, pad_id: int) -> Model:
        """A new model on the CPU, its weights drawn from the recipe's seed: the same for every device."""
        config = replace(recipe.model, vocab_size=vocab_size, pad_token_id=pad_id)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            return cls.model_class(config.model_type)(config)

    def initialize(self, model: Model) -> None:
        """Set what of a new model's weights starts from the data; by default nothing does."""

    def micro(self, step: int, m: int) -> Micro:
        """Micro-batch m, 0 to M-1, of step `step`, on the host: a pure function of (recipe, dataset, step, m).

        With the same shapes at every step where the device is not a CPU.
        """
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Losses to read the run's loss against, in nats: they go into summary.json and, as lines, into loss.png."""
        return {}
