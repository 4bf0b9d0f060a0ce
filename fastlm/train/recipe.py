"""A recipe: what a run is, in three tables. Frozen, checked when it is made, and stored in every checkpoint.

    [model]     the architecture and its sizes
    [data]      rows, and how tokens are masked
    [train]     batches, optimizer, schedule, checkpoints

A recipe is a short TOML file; `fastlm/recipes/` holds some. A key that a file leaves out has the default written here.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent.parent / "recipes"


def _key(default, doc: str, *, least=None, above=None, most=None, below=None, one_of: tuple = ()):
    """A key of a table: its default, its meaning, and the values it may have."""
    bounds = {"at least": least, "more than": above, "at most": most, "less than": below}
    return field(default=default, metadata={"doc": doc, "bounds": bounds, "of": one_of})


@dataclass(frozen=True)
class ModelTable:
    architecture: str = _key("bert", "bert: an encoder, trained on masked tokens", one_of=("bert",))
    hidden_size: int = _key(256, "width of the residual stream", least=1)
    num_hidden_layers: int = _key(4, "layers", least=1)
    num_attention_heads: int = _key(4, "heads; they divide hidden_size", least=1)
    intermediate_size: int = _key(1024, "width of the MLP", least=1)
    max_position_embeddings: int = _key(512, "positions that have an embedding; at least data.row_tokens", least=1)
    hidden_dropout_prob: float = _key(0.1, "dropout of embeddings and of what a block adds", least=0.0, most=1.0)
    attention_probs_dropout_prob: float = _key(0.1, "dropout of attention: 0, or at least 1/256", least=0.0, most=1.0)
    initializer_range: float = _key(0.02, "standard deviation of the initial weights", above=0.0)
    layer_norm_eps: float = _key(1e-12, "added to the variance", above=0.0)


@dataclass(frozen=True)
class DataTable:
    tokenizer: str = _key("train:8192", "train:N for a WordPiece of N tokens, or a tokenizer's directory")
    row_tokens: int = _key(128, "length of a row of packed pieces", least=8)
    documents: str = _key("file", "what of a plain-text file is a document", one_of=("file", "line", "blank"))
    min_chars: int = _key(8, "a document of fewer characters is dropped", least=0)
    mlm_probability: float = _key(0.15, "share of the tokens that are predicted", above=0.0, most=1.0)
    mask_replace_prob: float = _key(0.8, "share of those that become the mask token", least=0.0, most=1.0)
    random_replace_prob: float = _key(0.1, "share of those that become a random token", least=0.0, most=1.0)


@dataclass(frozen=True)
class TrainTable:
    batch_tokens: int = _key(4096, "tokens in the global batch of a step, padding included", least=1)
    micro_batch_tokens: int = _key(0, "tokens in one forward; it divides batch_tokens; 0: all of them", least=0)
    max_steps: int = _key(1000, "steps", least=1)
    lr: float = _key(1e-3, "peak learning rate", above=0.0)
    warmup_steps: int = _key(100, "steps of linear warm-up", least=0)
    schedule: str = _key("linear", "from the peak to the last step", one_of=("linear", "cosine", "constant"))
    final_lr: float = _key(0.0, "where linear and cosine end, as a share of lr", least=0.0, most=1.0)
    weight_decay: float = _key(0.01, "AdamW's, on matrices; none on biases and norms", least=0.0)
    beta1: float = _key(0.9, "AdamW's", least=0.0, below=1.0)
    beta2: float = _key(0.98, "AdamW's", least=0.0, below=1.0)
    eps: float = _key(1e-6, "AdamW's", above=0.0)
    grad_clip: float = _key(1.0, "largest norm of the gradient; 0: as it is", least=0.0)
    unigram_bias: bool = _key(False, "the head's bias starts at the tokens' log frequencies, not at 0")
    dtype: str = _key("float32", "of the matrix products; parameters are float32", one_of=("float32", "bfloat16"))
    seed: int = _key(0, "of the initial weights, order, masks and dropout", least=0, most=2**63 - 1)
    checkpoint_every: int = _key(500, "steps between checkpoints; 0: only the last", least=0)
    keep_checkpoints: int = _key(2, "how many are kept, the newest", least=1)


# Keys that say nothing about what is learned: a run may be resumed with others.
FREE_KEYS = {"train.checkpoint_every", "train.keep_checkpoints"}
# Keys of preparation: a run on data that is prepared takes the data as it is.
PREPARATION_KEYS = {"data.tokenizer", "data.documents", "data.min_chars"}


@dataclass(frozen=True)
class Recipe:
    """A whole run. `name` is where it came from, for messages."""

    model: ModelTable = field(default_factory=ModelTable)
    data: DataTable = field(default_factory=DataTable)
    train: TrainTable = field(default_factory=TrainTable)
    name: str = "recipe"

    def __post_init__(self):
        model, data, train = self.model, self.data, self.train
        for table_name, table in (("model", model), ("data", data), ("train", train)):
            for key in fields(table):
                _check_range(f"{table_name}.{key.name}", getattr(table, key.name), key.metadata)
        if model.hidden_size % model.num_attention_heads:
            raise ValueError(
                f"model.num_attention_heads: expected a divisor of model.hidden_size={model.hidden_size}, "
                f"got {model.num_attention_heads}"
            )
        if data.row_tokens > model.max_position_embeddings:
            raise ValueError(
                f"data.row_tokens: expected at most model.max_position_embeddings={model.max_position_embeddings}, "
                f"got {data.row_tokens}; set either"
            )
        if 0.0 < model.attention_probs_dropout_prob < 1 / 256:
            raise ValueError(
                "model.attention_probs_dropout_prob: expected 0 or at least 1/256, which is the step attention drops "
                f"in; got {model.attention_probs_dropout_prob}"
            )
        if data.mask_replace_prob + data.random_replace_prob > 1:
            raise ValueError(
                "data.random_replace_prob: expected at most 1 together with data.mask_replace_prob="
                f"{data.mask_replace_prob}, got {data.random_replace_prob}"
            )
        if train.batch_tokens % data.row_tokens:
            below = train.batch_tokens // data.row_tokens * data.row_tokens
            raise ValueError(
                f"train.batch_tokens: expected a multiple of data.row_tokens={data.row_tokens}, got "
                f"{train.batch_tokens}; the next is {below + data.row_tokens}"
            )
        if train.micro_batch_tokens % data.row_tokens or train.batch_tokens % self.micro_batch_tokens:
            rows = train.batch_tokens // data.row_tokens
            sizes = [data.row_tokens * n for n in range(1, rows + 1) if rows % n == 0]
            raise ValueError(
                f"train.micro_batch_tokens: expected a divisor of train.batch_tokens={train.batch_tokens} in whole "
                f"rows ({', '.join(map(str, sizes[-6:]))}, or 0 for all), got {train.micro_batch_tokens}"
            )

    @property
    def batch_rows(self) -> int:
        """B, the rows of a global batch."""
        return self.train.batch_tokens // self.data.row_tokens

    @property
    def micro_batch_tokens(self) -> int:
        return self.train.micro_batch_tokens or self.train.batch_tokens

    @property
    def micro_count(self) -> int:
        """M, the micro-batches of a global batch."""
        return self.train.batch_tokens // self.micro_batch_tokens

    def tables(self) -> dict[str, dict]:
        """{"model": {...}, "data": {...}, "train": {...}}, plain values."""
        return {name: asdict(getattr(self, name)) for name in TABLES}

    def as_toml(self) -> str:
        """A file that `load_recipe` reads, every key in it with its meaning."""
        lines = []
        for table, keys in self.tables().items():
            docs = {key.name: key.metadata["doc"] for key in fields(TABLES[table])}
            lines += ["", f"[{table}]"]
            # JSON's strings, numbers and booleans are TOML's; a float that JSON writes as 1e-12 is one too.
            lines += [f"{f'{key} = {json.dumps(value)}':<40}# {docs[key]}" for key, value in keys.items()]
        return "\n".join(lines[1:]) + "\n"

    @classmethod
    def of(cls, tables: dict[str, dict], name: str = "recipe") -> Recipe:
        """The recipe whose `tables()` these are; what they leave out has its default."""
        return cls(name=name).with_values(_flat(tables))

    def differences(self, tables: dict[str, dict]) -> list[str]:
        """What of `tables`, another recipe's, trains something else: ["train.lr is 0.001, was 0.002", ...]."""
        ours, theirs = _flat(self.tables()), _flat(tables)
        return [
            f"{key} is {ours.get(key)!r}, was {theirs.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if key not in FREE_KEYS | PREPARATION_KEYS and ours.get(key) != theirs.get(key)
        ]

    def with_values(self, values: dict[str, object]) -> Recipe:
        """The recipe with other values, {"train.lr": 1e-3}; all are set before what depends on two is checked.

        ValueError for a key that does not exist, a value of another type, or one out of range.
        """
        tables = {name: {} for name in TABLES}
        for name, value in values.items():
            table, key = _find(name)
            tables[table][key.name] = _typed(name, value, type(key.default))
        return replace(self, **{name: replace(getattr(self, name), **new) for name, new in tables.items() if new})

    def with_settings(self, settings: Iterable[str]) -> Recipe:
        """The recipe with `key=value` strings applied, as `--set` takes them; a value is written as in TOML."""
        values = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise ValueError(f"--set: expected key=value, as train.lr=1e-3, got {setting!r}")
            values[name.strip()] = _value(text.strip())
        return self.with_values(values)


TABLES: dict[str, type] = {"model": ModelTable, "data": DataTable, "train": TrainTable}


def load_recipe(name) -> Recipe:
    """The recipe `name`: one of `fastlm/recipes`, as "bert-mini", or the path of a TOML file."""
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
        if table not in TABLES or not isinstance(keys, dict):
            raise ValueError(f"recipe: {path}: expected the tables {', '.join(TABLES)}, got {table!r}")
    return Recipe.of(content, name=path.stem)


def _flat(tables: dict) -> dict[str, object]:
    return {f"{table}.{key}": value for table in TABLES for key, value in tables.get(table, {}).items()}


def _find(name: str):
    """(table, field) of a key "table.key". ValueError with the nearest ones where it does not exist."""
    table, _, key = name.partition(".")
    for found in fields(TABLES[table]) if table in TABLES else ():
        if found.name == key:
            return table, found
    every = [f"{table}.{found.name}" for table, cls in TABLES.items() for found in fields(cls)]
    # A key under the wrong table, or with none, is nearer than any spelling.
    near = [one for one in every if one.split(".")[1] == name.split(".")[-1]] or difflib.get_close_matches(name, every)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(every)}"
    raise ValueError(f"{name}: there is no such key; {hint}")


def _value(text: str):
    """`text` as a TOML value, or itself where it is none: a bare word is a string."""
    if text in ("True", "False"):  # as Python writes them
        return text == "True"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text


_TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def _typed(name: str, value, kind: type):
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # 1e6
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {_TYPES[kind]}, got {value!r}")
    return value


_HOLDS = {"at least": operator.ge, "more than": operator.gt, "at most": operator.le, "less than": operator.lt}


def _check_range(name: str, value, meta) -> None:
    if value in (math.inf, -math.inf):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if meta["of"] and value not in meta["of"]:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, meta['of']))}, got {value!r}")
    bounds = {words: bound for words, bound in meta["bounds"].items() if bound is not None}
    if not all(_HOLDS[words](value, bound) for words, bound in bounds.items()):
        raise ValueError(f"{name}: expected {' and '.join(f'{w} {b}' for w, b in bounds.items())}, got {value}")
