"""Continued pretraining and fine-tuning: where the weights of a new run come from, `--init DIR` and `--model DIR`.

DIR is the directory of a run, one of its checkpoints, or a model in Transformers' layout. The run takes its weights,
its architecture and its tokenizer. Learning rate, schedule, row length, data and dropout are the recipe's, and the
optimizer starts anew.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from fastlm.data import Tokenizer
from fastlm.data.sources import TOKENIZER
from fastlm.models import Model
from fastlm.models._checkpoint import read_config, read_json
from fastlm.run.checkpoint import STATE, Checkpoint, load_newest, read_checkpoint, read_tensors
from fastlm.run.directory import CHECKPOINTS, DATA, MODEL
from fastlm.run.recipe import Recipe
from fastlm.tasks import find_task


@dataclass(frozen=True)
class Initial:
    """A model that a run starts from.

    path        what was named, absolute
    directory   a model in Transformers' layout; or None with `checkpoint`
    tokenizer   the directory of its tokenizer
    """

    path: str
    directory: Path | None
    checkpoint: Checkpoint | None
    tokenizer: Path

    def recipe(self, recipe: Recipe) -> Recipe:
        """`recipe` with this architecture and tokenizer; its dropout stays. ValueError where its task has another."""
        cls = self._model_class(recipe)
        if self.checkpoint is None:
            found = cls.config_class.from_dict(read_config(self.directory, cls.config_class.model_type))
        else:
            found = Recipe.from_dict(self.checkpoint.state["recipe"]).model
            if type(found) is not cls.config_class:
                raise ValueError(
                    f"init: expected a {cls.config_class.model_type} model for task {recipe.task}, found "
                    f"{found.model_type} in {self.path}"
                )
        kept = {of.name for of in cls.config_class.settings() if "drop" in of.name}
        model = replace(found, **{name: getattr(recipe.model, name) for name in kept})
        data = recipe.data
        if "tokenizer" in {of.name for of in fields(data)}:
            data = replace(data, tokenizer=str(self.tokenizer))
        return replace(recipe, model=model, data=data)

    def labels(self) -> tuple[str, ...]:
        """Names of the classes of a fine-tuned model; () of another one."""
        if self.checkpoint is not None:
            return tuple(self.checkpoint.state["data"]["settings"].get("labels", ()))
        names = read_json(self.directory / "config.json").get("id2label") or {}
        return tuple(names[number] for number in sorted(names, key=int))

    def model(self, recipe: Recipe, tokenizer: Tokenizer, head: Mapping[str, object] | None = None) -> Model:
        """The model with its weights, on the CPU. ValueError where the data's tokenizer is another one.

        head: as of `Task.head`. Where its labels are not the model's, the classifier starts anew, drawn from the
            recipe's seed, as does all of a head that the model does not have.
        """
        own = Tokenizer.load(self.tokenizer)
        if own.hash != tokenizer.hash:
            raise ValueError(
                f"init: the data was prepared with another tokenizer than that of {self.path}; prepare it with "
                f"--tokenizer {self.tokenizer}"
            )
        cls, head = self._model_class(recipe), dict(head or {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            if self.checkpoint is None:
                changes = {of.name: getattr(recipe.model, of.name) for of in fields(recipe.model) if "drop" in of.name}
                return cls.from_pretrained(self.directory, **changes, **head, new_head=self._is_new(head))
            ids = find_task(recipe.task).token_ids(tokenizer)
            entries = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id, **ids, **head}
            model = cls(replace(recipe.model, **entries))
            model.load_backbone(read_tensors(self.checkpoint, "model"), self.path, new_head=self._is_new(head))
        return model

    def _is_new(self, head: Mapping[str, object]) -> bool:
        return "labels" in head and tuple(head["labels"]) != self.labels()

    @staticmethod
    def _model_class(recipe: Recipe) -> type[Model]:
        return find_task(recipe.task).model_class(recipe.model.model_type)


def find_initial(init, name: str = "init") -> Initial:
    """The model at `init`, an argument of this name. ValueError where there is none, or no tokenizer beside it."""
    path = Path(init)
    named = os.path.realpath(path)
    if (path / "config.json").is_file():
        return Initial(named, path, None, path)
    if (path / MODEL / "config.json").is_file():
        return Initial(named, path / MODEL, None, path / MODEL)
    if (path / "manifest.json").is_file() and (path / STATE).is_file():
        checkpoint = read_checkpoint(path)
    else:
        checkpoint, skipped = load_newest(path / CHECKPOINTS)
        if checkpoint is None:
            reason = f" ({'; '.join(skipped)})" if skipped else ""
            raise ValueError(
                f"{name}: expected the directory of a model in Transformers' layout, of a run, or of a checkpoint, got "
                f"{init}{reason}"
            )
    tokenizer = checkpoint.path.parent.parent / DATA / TOKENIZER
    if not tokenizer.is_dir():
        raise ValueError(
            f"{name}: expected the tokenizer of {checkpoint.path} in {tokenizer}, found none; the run was trained on "
            "prepared data. Finish the run and name its directory, or copy the data's tokenizer there"
        )
    return Initial(named, None, checkpoint, tokenizer)
