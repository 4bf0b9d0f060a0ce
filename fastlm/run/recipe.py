"""A recipe: what a run is. Frozen, checked when it is made, and stored in every checkpoint.

    task        what the model is trained to do: a module of fastlm.tasks
    [model]     the architecture and the entries of its configuration, as BertConfig's
    [data]      rows, and what the task makes of them
    [train]     batches, optimizer, schedule, checkpoints

A recipe is a short TOML file; `fastlm/recipes/` holds some. A key that a file leaves out has the default of its class:
the model's configuration for [model], the task's tables for the rest. `fastlm recipe NAME` prints all of them.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path

from fastlm.models import Config
from fastlm.models._size import layer_parameters
from fastlm.settings import AUTO, Table, meaning, typed
from fastlm.tasks import DataTable, Task, TrainTable, find_task, task_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent.parent / "recipes"
TABLES = ("model", "data", "train")
TASK = "masked_lm"  # of a recipe that does not say, as none did before there were others

# Keys that say nothing about what is learned: a run may be resumed with others.
FREE_KEYS = {
    "train.checkpoint_every",
    "train.cuda_graph",
    "train.eval_every",
    "train.eval_tokens",
    "train.keep_checkpoints",
    "train.shard",
}
# Keys of preparation: a run on data that is prepared takes the data as it is.
PREPARATION_KEYS = {
    "data.tokenizer",
    "data.tokenizer_sample",
    "data.documents",
    "data.min_chars",
    "data.field",
    "data.repair",
    "data.filters",
    "data.languages",
    "data.scrub",
    "data.phone_regions",
    "data.near_duplicates",
    "data.packing",
    "data.validation",
    "data.validation_share",
}
# Keys that the machine may decide, and what a run had that is older than the choice.
SETTLED = {"train.dtype": "float32", "train.micro_batch_tokens": 0}
# Keys that decide which others there are, and their meaning.
_KINDS = {
    "task": "what the model is trained to do: a module of fastlm.tasks",
    "model.architecture": "which model; the other keys of this table are its own",
}


@dataclass(frozen=True)
class Recipe:
    """A whole run. `name` is where it came from, for messages.

    model: the configuration of one of the task's models; None: the default of the first. Its entries that the tokenizer
        decides have no meaning here.
    data, train: the task's tables; None: their defaults.
    """

    task: str = TASK
    model: Config | None = None
    data: DataTable | None = None
    train: TrainTable | None = None
    name: str = field(default="recipe", kw_only=True)

    def __post_init__(self):
        task = find_task(self.task)
        defaults = {"model": task.models[0].config_class, **task.tables}
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default())
        self._check_kinds(task)
        self._check_lengths()
        dropout, p = self.model.attention_dropout, getattr(self.model, self.model.attention_dropout)
        if 0.0 < p < 1 / 256:
            raise ValueError(
                f"model.{dropout}: expected 0 or at least 1/256, which is the step attention drops in; got {p}"
            )
        for of in self.model.settings():
            if "drop" in of.name and getattr(self.model, of.name) == 1:
                raise ValueError(f"model.{of.name}: expected less than 1, which drops everything, got 1.0")

    def _check_kinds(self, task: type[Task]) -> None:
        task.model_class(self.model.model_type)
        for name, kind in task.tables.items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(
                    f"{name}: expected {kind.__name__}, the table of task {self.task}, got "
                    f"{type(getattr(self, name)).__name__}"
                )

    def _check_lengths(self) -> None:
        data, train = self.data, self.train
        if self.model.longest is not None and data.row_tokens > self.model.longest[1]:
            name, longest = self.model.longest
            raise ValueError(
                f"{data.length_key}: expected at most model.{name}={longest}, got {data.row_tokens}; set either"
            )
        train.check_rows(data.row_tokens)

    def layer_flops(self) -> float:
        """FLOPs of a layer for one micro-batch, forward and backward, by its parameters: 6 a token and parameter."""
        cls = find_task(self.task).model_class(self.model.model_type)
        smallest = replace(self.model, vocab_size=8, pad_token_id=None)
        return 6.0 * self.micro_batch_tokens * layer_parameters(cls, smallest)

    @property
    def batch_rows(self) -> int:
        """B, the rows of a global batch."""
        return self.train.batch_rows(self.data.row_tokens)

    @property
    def micro_rows(self) -> int:
        """Rows of one forward."""
        return self.train.micro_rows(self.data.row_tokens)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a global batch, padding included; where rows are of different lengths, the most."""
        return self.batch_rows * self.data.row_tokens

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_rows * self.data.row_tokens

    @property
    def micro_count(self) -> int:
        """M, the micro-batches of a global batch."""
        return self.batch_rows // self.micro_rows

    def to_dict(self) -> dict[str, object]:
        """{"task": ..., "model": {"architecture": ..., ...}, "data": {...}, "train": {...}}, plain values."""
        model = {of.name: getattr(self.model, of.name) for of in self.model.settings()}
        return {
            "task": self.task,
            "model": {"architecture": self.model.model_type, **model},
            "data": asdict(self.data),
            "train": asdict(self.train),
        }

    @classmethod
    def from_dict(cls, content: dict[str, object], name: str = "recipe") -> Recipe:
        """The recipe whose `to_dict()` this is; what it leaves out has its default. ValueError for a wrong one."""
        values = _flat(content)
        task = find_task(values.get("task", TASK))
        default = task.models[0].config_class.model_type
        config = task.model_class(values.get("model.architecture", default)).config_class
        new = _entries(values, _keys(config, **task.tables))
        model = _config_of(lambda: config(**new["model"]))
        tables = {table: kind(**new[table]) for table, kind in task.tables.items()}
        return cls(values.get("task", TASK), model, **tables, name=name)

    def as_toml(self) -> str:
        """A file that `load_recipe` reads, every key in it with its meaning. A key that is None is left out."""
        lines, table = [], ""
        meanings = {name: _KINDS[name] if name in _KINDS else meaning(of) for name, of in self._keys().items()}
        for name, value in _flat(self.to_dict()).items():
            if (group := name.rpartition(".")[0]) != table:
                table = group
                lines += ["", f"[{table}]"]
            if value is not None:
                # JSON's strings, numbers and booleans are TOML's; a float that JSON writes as 1e-12 is one too.
                setting = f"{name.rpartition('.')[2]} = {json.dumps(value)}"
                lines.append(f"{setting:<40}# {meanings[name]}")
        return "\n".join(lines) + "\n"

    def differences(self, content: dict[str, object]) -> list[str]:
        """What of `content`, another recipe's, trains something else: ["train.lr is 0.001, was 0.002", ...].

        What `content` leaves out has its default, and what is "auto" here differs in nothing. ValueError where it is no
        recipe.
        """
        both = self, Recipe.from_dict(content)
        ours, theirs = (_settled(_flat(recipe.to_dict()), _flat(content)) for recipe in both)
        return [
            f"{name} is {ours.get(name)!r}, was {theirs.get(name)!r}"
            for name in sorted(ours.keys() | theirs.keys())
            if name not in FREE_KEYS | PREPARATION_KEYS and ours.get(name) != theirs.get(name)
        ]

    def open_keys(self) -> list[str]:
        """The keys of SETTLED that the machine is yet to decide."""
        values = _flat(self.to_dict())
        return [name for name in SETTLED if values.get(name) == AUTO]

    def settled_as(self, content: dict[str, object]) -> Recipe:
        """The recipe whose open keys have the values of `content`, the recipe of a run that began before.

        ValueError for values that this recipe cannot have.
        """
        settled = _settled(_flat(self.to_dict()), _flat(content))
        return self.with_values({name: settled[name] for name in self.open_keys()})

    def with_values(self, values: dict[str, object]) -> Recipe:
        """The recipe with other values, {"train.lr": 1e-3}; all are set before what depends on two is checked.

        ValueError for a key that does not exist, a value of another type, or one out of range, or another task or
        architecture, whose keys are others.
        """
        current = _flat(self.to_dict())
        new = _entries(values, self._keys())
        for name in _KINDS:
            if name in values and values[name] != current[name]:
                raise ValueError(
                    f"{name}: expected {current[name]!r}, the recipe's, on which its other keys depend, got "
                    f"{values[name]!r}; take a recipe file that has it, or write one"
                )
        model = _config_of(lambda: replace(self.model, **new["model"]))
        tables = {table: replace(getattr(self, table), **new[table]) for table in ("data", "train")}
        return replace(self, model=model, **tables)

    def data_with(self, **values: object) -> DataTable:
        """The table [data] with other values, whatever its rows mean for the other tables."""
        typed_values = _entries({f"data.{name}": value for name, value in values.items()}, self._keys())["data"]
        return replace(self.data, **typed_values)

    def with_settings(self, settings: Iterable[str]) -> Recipe:
        """The recipe with `key=value` strings applied, as `--set` takes them; a value is written as in TOML."""
        return self.with_values(parse_settings(settings))

    def _keys(self) -> dict[str, Field | None]:
        return _keys(type(self.model), data=type(self.data), train=type(self.train))


def parse_settings(settings: Iterable[str]) -> dict[str, object]:
    """{"train.lr": 1e-3} of ["train.lr=1e-3"]; a value is written as in TOML. ValueError where there is no "="."""
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set: expected key=value, as train.lr=1e-3, got {setting!r}")
        values[name.strip()] = _value(text.strip())
    return values


def load_recipe(name) -> Recipe:
    """The recipe `name`: one of `fastlm/recipes`, as "bert-mini", the path of a TOML file, or a task's defaults."""
    if name in task_names():
        return Recipe(name, name=name)
    path = Path(name)
    if path.suffix != ".toml":
        path = RECIPES / f"{name}.toml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
            raise ValueError(f"recipe: expected one of {known}, or the path of a .toml file; got {str(name)!r}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"recipe: {path} is not valid TOML: {error}") from error
    for table, keys in content.items():
        if table != "task" and (table not in TABLES or not isinstance(keys, dict)):
            raise ValueError(f"recipe: {path}: expected task and the tables {', '.join(TABLES)}, got {table!r}")
    return Recipe.from_dict(content, name=path.stem)


def _flat(content: dict) -> dict[str, object]:
    """{"task": ..., "model.architecture": ..., "train.lr": ...} of what `Recipe.to_dict` returns, or a part of it."""
    task = {"task": content["task"]} if "task" in content else {}
    return task | {f"{table}.{name}": value for table in TABLES for name, value in content.get(table, {}).items()}


def _settled(values: dict[str, object], recorded: dict[str, object]) -> dict[str, object]:
    """`values` of a recipe, as of `_flat`, where those that are open are the recorded ones."""
    found = {name: recorded.get(name, before) for name, before in SETTLED.items() if values.get(name) == AUTO}
    return {**values, **found}


def _keys(config: type[Config], **tables: type[Table]) -> dict[str, Field | None]:
    """Every key of a recipe, "task" or "table.entry", and its field; None for those of _KINDS."""
    model = {f"model.{of.name}": of for of in config.settings()}
    others = {f"{table}.{of.name}": of for table, kind in tables.items() for of in fields(kind)}
    return dict.fromkeys(_KINDS) | model | others


def _entries(values: dict[str, object], keys: dict[str, Field | None]) -> dict[str, dict[str, object]]:
    """{"model": {...}, "data": {...}, "train": {...}} of {"train.lr": 1e-3, ...}, without those of _KINDS.

    ValueError for a key that does not exist, or a value of another type.
    """
    entries = {table: {} for table in TABLES}
    for name, value in values.items():
        if name not in keys:
            raise ValueError(f"{name}: there is no such key; {_nearest(name, keys)}")
        if name not in _KINDS:
            table, _, entry = name.partition(".")
            entries[table][entry] = typed(name, value, keys[name])
    return entries


def _config_of(make: Callable[[], Config]) -> Config:
    """make(), a configuration, whose errors then name the key of the recipe."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def _nearest(name: str, keys: Iterable[str]) -> str:
    # A key under the wrong table, or with none, is nearer than any spelling.
    near = [one for one in keys if one.rpartition(".")[2] == name.rpartition(".")[2]]
    near = near or difflib.get_close_matches(name, keys)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(keys)}"


def _value(text: str):
    """`text` as a TOML value, or itself where it is none: a bare word is a string."""
    if text in ("True", "False"):  # as Python writes them
        return text == "True"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
