"""The recipe's tables [data] and [train], as every task has them. A task with more keys derives its tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlm.data.cleaning import Cleaning
from fastlm.data.mixture import parse_weights
from fastlm.data.tokenizer import LARGEST_SAMPLE, SAMPLE
from fastlm.settings import AUTO, Table, key


@dataclass(frozen=True)
class DataTable(Table):
    tokenizer: str = key(
        "train:8192", "train:N, wordpiece:N, bpe:N, unigram:N or chars to train one, or a tokenizer's directory"
    )
    tokenizer_sample: int = key(
        SAMPLE,
        "most bytes of the text that a tokenizer is trained on, chosen by a hash",
        least=1 << 16,
        most=LARGEST_SAMPLE,
    )
    row_tokens: int = key(128, "length of a row of packed pieces", least=8)
    documents: str = key("file", "what of a plain-text file is a document", one_of=("file", "line", "blank"))
    min_chars: int = key(8, "a document of fewer characters is dropped", least=0)
    field: str = key(
        "text",
        "of JSON lines and tables: the name of the text; of several, by commas, the first there is",
        several=True,
    )
    repair: bool = key(False, "repair of encodings, by ftfy")
    filters: str = key("", "gopher or c4 or both, by commas: rules that drop what is no English prose", several=True)
    languages: str = key("", "codes as en,de: documents in others are dropped", several=True)
    scrub: str = key("", "of email,ip,phone,card,iban: they are replaced by <EMAIL>, <IP> and so on", several=True)
    phone_regions: str = key("US,GB", "where phone numbers without a country code are from, for scrub", several=True)
    near_duplicates: float = key(
        0.0, "similarity, 0.5 to 1, from which a document is dropped as a near duplicate; 0: none", least=0.0, most=1.0
    )
    packing: str = key(
        "cut",
        "cut: documents are cut where a row ends; best_fit: one that fits stays whole, others are cut at sentence ends",
        one_of=("cut", "best_fit"),
    )
    weights: str = key(
        "",
        "of several prepared --data directories, by commas: their shares of the rows; each has epochs of its own",
        several=True,
    )
    validation: str = key("", "text to evaluate on, a path; it is not trained on")
    validation_share: float = key(
        0.0, "share of the documents that is held out for it instead, chosen by their text", least=0.0, below=1.0
    )

    table: ClassVar[str] = "data"
    length_key: ClassVar[str] = "data.row_tokens"

    def __post_init__(self):
        super().__post_init__()
        if 0.0 < self.near_duplicates < 0.5:
            raise ValueError(
                f"data.near_duplicates: expected 0, or a similarity from 0.5 to 1, got {self.near_duplicates}"
            )
        try:
            self.cleaning()
        except ValueError as error:
            raise ValueError(f"data.{error}") from error
        if self.weights:
            try:
                parse_weights(self.weights)
            except ValueError as error:
                raise ValueError(f"data.{error}") from error
        if self.validation and self.validation_share:
            raise ValueError(
                f"data.validation_share: expected 0 with data.validation={self.validation!r}, got "
                f"{self.validation_share}; set one of them"
            )

    def cleaning(self) -> Cleaning:
        """The rules of cleaning. ValueError for an unknown one."""
        names = ("filters", "languages", "scrub", "phone_regions")
        lists = {name: split_names(getattr(self, name)) for name in names}
        return Cleaning(repair=self.repair, min_chars=self.min_chars, **lists)


def split_names(text: str) -> tuple[str, ...]:
    """("gopher", "c4") of "gopher, c4"."""
    return tuple(name.strip() for name in text.split(",")) if text.strip() else ()


@dataclass(frozen=True)
class TokenBatches(Table):
    """How rows of packed text make batches, and for how long they are trained on: counted in tokens and steps."""

    batch_tokens: int = key(4096, "tokens in the global batch of a step, padding included", least=1)
    micro_batch_tokens: int | str = key(
        0,
        "tokens in one forward; it divides batch_tokens; 0: all of them; auto: as many as run fastest here",
        least=0,
        word=AUTO,
    )
    max_steps: int = key(1000, "steps", least=1)
    warmup_steps: int = key(100, "steps of linear warm-up", least=0)

    table: ClassVar[str] = "train"
    batch_key: ClassVar[str] = "train.batch_tokens"
    micro_key: ClassVar[str] = "train.micro_batch_tokens"

    def batch_rows(self, row_tokens: int) -> int:
        """Rows of a global batch, where a row has `row_tokens` tokens."""
        return self.batch_tokens // row_tokens

    def micro_rows(self, row_tokens: int) -> int:
        """Rows of one forward; of a whole batch where the machine is yet to choose."""
        return (self._micro or self.batch_tokens) // row_tokens

    @property
    def _micro(self) -> int:
        """Tokens of one forward, 0 for all: also where they are not measured yet."""
        return 0 if self.micro_batch_tokens == AUTO else self.micro_batch_tokens

    @classmethod
    def sizes(cls, rows: int, row_tokens: int) -> dict[str, int]:
        """Values of the keys, for a global batch of `rows` rows in one forward."""
        return {cls.batch_key: rows * row_tokens, cls.micro_key: 0}

    @classmethod
    def micro_setting(cls, rows: int, row_tokens: int) -> str:
        """The setting with which one forward is of `rows` rows."""
        return f"{cls.micro_key}={rows * row_tokens}"

    def check_rows(self, row_tokens: int) -> None:
        """ValueError where the rows do not fill the batches."""
        if self.batch_tokens % row_tokens:
            below = self.batch_tokens // row_tokens * row_tokens
            raise ValueError(
                f"train.batch_tokens: expected a multiple of data.row_tokens={row_tokens}, got {self.batch_tokens}; "
                f"the next is {below + row_tokens}"
            )
        micro = self._micro
        if micro % row_tokens or self.batch_tokens % (micro or self.batch_tokens):
            rows = self.batch_tokens // row_tokens
            sizes = [row_tokens * n for n in range(1, rows + 1) if rows % n == 0]
            raise ValueError(
                f"train.micro_batch_tokens: expected a divisor of train.batch_tokens={self.batch_tokens} in whole "
                f"rows ({', '.join(map(str, sizes[-6:]))}, or 0 for all), got {micro}"
            )


@dataclass(frozen=True)
class Optimization(Table):
    """Keys of every table [train], however its batches are counted."""

    lr: float = key(1e-3, "peak learning rate", above=0.0)
    schedule: str = key(
        "linear",
        "from the peak to the last step; wsd: constant, then linear",
        one_of=("linear", "cosine", "wsd", "constant"),
    )
    final_lr: float = key(0.0, "where the schedule ends, as a share of lr", least=0.0, most=1.0)
    decay_share: float = key(0.2, "share of the steps in which wsd decays", above=0.0, most=1.0)
    optimizer: str = key(
        "adamw", "muon: for the matrices of linear layers, AdamW for the rest", one_of=("adamw", "muon", "lamb")
    )
    weight_decay: float = key(0.01, "on matrices and tables; none on biases and norms", least=0.0)
    beta1: float = key(0.9, "AdamW's and LAMB's", least=0.0, below=1.0)
    beta2: float = key(0.98, "AdamW's and LAMB's", least=0.0, below=1.0)
    eps: float = key(1e-6, "AdamW's and LAMB's", above=0.0)
    momentum: float = key(0.95, "Muon's", least=0.0, below=1.0)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: as it is", least=0.0)
    dtype: str = key(
        AUTO,
        "of the matrix products; parameters are float32; auto: bfloat16 where this machine is faster in it",
        one_of=(AUTO, "float32", "bfloat16"),
    )
    shard: bool = key(False, "with several processes, each holds a part of every weight (FSDP), not all of them (DDP)")
    cuda_graph: bool | str = key(
        "auto",
        "on a GPU, forward and backward as one CUDA graph: auto: where it is faster; the losses are the same",
        one_of=("auto", True, False),
    )
    seed: int = key(0, "of the initial weights, order, masks and dropout", least=0, most=2**63 - 1)
    eval_every: int = key(500, "steps between evaluations on the held-out text; 0: only after the last", least=0)
    checkpoint_every: int = key(500, "steps between checkpoints; 0: only the last", least=0)
    keep_checkpoints: int = key(2, "how many are kept, the newest", least=1)

    table: ClassVar[str] = "train"


@dataclass(frozen=True)
class TrainTable(Optimization, TokenBatches):
    eval_tokens: int = key(262144, "tokens of it that are evaluated, padding included; 0: all", least=0)
