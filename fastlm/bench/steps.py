"""The training steps that benchmarks time: a model, and batches that every contender gets.

Rows are full, of ids drawn with the frequencies of words; or (`texts`) one text each, as long as sentences are, padded
for the contenders that pad. About 15% of BERT's tokens are predicted, all of GPT-2's, and a row of labels of T5's.

A step is named <model>-<rows>x<length>, with -text where its rows are texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch

from fastlm import models
from fastlm.data import Dataset
from fastlm.ops import IGNORE_INDEX
from fastlm.run.recipe import Recipe, load_recipe, parse_settings
from fastlm.run.settled import find_dtype, with_dtype
from fastlm.settings import AUTO, typed
from fastlm.tasks import TrainTable, find_task, make_model

BATCHES = 4  # different ones, in turn
# Of the fixed steps, which have no warm-up. At 1e-4 BERT-small's loss jumps from 6 to 14 nats within twenty steps, at a
# different step in each contender; at 3e-5 it falls evenly.
_LR = 3e-5
_MULTIPLE = 8  # a collator pads the longest text of a batch to a multiple of it

# How many sentences of film reviews have 0, 1, 2, ... BERT wordpieces, [CLS] and [SEP] among them: rt-polarity's 10662
# (Pang and Lee 2005), tokenized with the vocabulary of bert-base-uncased. Mean 27.4, Σ length² / Σ length 32.2.
_COUNTS = """
0 0 0 2 5 22 53 76 109 136 161 197 202 224 248 236 277 257 329 314 349 323 341 367 366 335 364 340 374 361 334 300
308 280 260 257 281 226 211 206 170 198 150 145 143 106 91 90 72 74 53 40 56 49 34 34 23 27 11 14 11 7 9 7 4 3 2 2 1
0 1 0 1 1 0 0 1 0 0 0 0 0 0 0 1
"""
SENTENCES = tuple(int(count) for count in _COUNTS.split())

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Training:
    """How all contenders of a step train. A Recipe has both fields too, and can stand in its place."""

    name: str
    train: TrainTable


@dataclass(frozen=True)
class StepInputs:
    """What every contender gets: the model, and batches of (input_ids, labels, lengths).

    input_ids (rows, length) int64, of which the first lengths (rows,) of each row are real. BERT's and GPT-2's labels
    are like input_ids, -100 where nothing is predicted; T5's are (rows, target tokens).
    """

    model: models.Bert | models.GPT2 | models.T5
    batches: list[Batch]
    tokens: int  # real ones in a batch, T5's encoder's
    flops: float  # of a step's matrix products: of real tokens, and of pairs of them in a row

    @property
    def shape(self) -> str:
        """Rows and the longest padded one."""
        return f"{len(self.batches[0][0])}x{max(ids.shape[1] for ids, _, _ in self.batches)}"

    @property
    def padded(self) -> bool:
        return any(is_padded(ids, lengths) for ids, _, lengths in self.batches)

    @property
    def dropout(self) -> bool:
        """Whether the model has dropout, which each contender draws differently."""
        settings = self.model.config.to_dict().items()
        return any(bool(value) for name, value in settings if name.endswith(("dropout_prob", "pdrop", "dropout_rate")))


def is_padded(input_ids: torch.Tensor, lengths: torch.Tensor) -> bool:
    return bool((lengths < input_ids.shape[1]).any())


def _full(input_ids: torch.Tensor, labels: torch.Tensor) -> Batch:
    return input_ids, labels, torch.full((len(input_ids),), input_ids.shape[1])


def _masked_inputs(recipe: Recipe, vocab_size: int, pad_id: int, batches: list[Batch], tokens: int) -> StepInputs:
    """BERT's, of `tokens` in all batches."""
    pairs = sum(int(lengths.square().sum()) for _, _, lengths in batches)
    predicted = sum(int((labels != IGNORE_INDEX).sum()) for _, labels, _ in batches)
    model = make_model(recipe, vocab_size, pad_id)
    flops = model.flops(models.Counts(tokens, pairs, predicted)) / len(batches)
    return StepInputs(model, batches, round(tokens / len(batches)), flops)


def from_dataset(recipe: Recipe, dataset: Dataset) -> StepInputs:
    """The first micro-batches of a run, every row one sequence."""
    task, shape = find_task(recipe.task)(recipe, dataset, torch.device("cpu")), (-1, recipe.data.row_tokens)
    batches, tokens = [], 0
    for step in range(BATCHES):
        micro = task.micro(step, 0)
        inputs, tokens = micro.inputs, tokens + micro.counts.tokens
        labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        labels[inputs["index"]] = inputs["targets"]
        batches.append(_full(inputs["input_ids"].view(shape), labels.view(shape)))
    tokenizer = dataset.tokenizer
    return _masked_inputs(recipe, tokenizer.vocab_size, tokenizer.pad_id, batches, tokens)


def drawn(recipe: Recipe, vocab_size: int) -> StepInputs:
    """Micro-batches of ids drawn with the frequencies of words (Zipf's law), no padding; id 4 is the mask."""
    draw = torch.Generator().manual_seed(recipe.train.seed)
    shape = recipe.micro_rows, recipe.data.row_tokens
    batches = [_full(*_draw_masked(recipe, shape, vocab_size, draw)) for _ in range(BATCHES)]
    return _masked_inputs(recipe, vocab_size, 0, batches, BATCHES * math.prod(shape))


def texts(recipe: Recipe, vocab_size: int) -> StepInputs:
    """As many rows, a sentence each, of lengths drawn from SENTENCES; id 0 pads them to the longest of the batch."""
    draw = torch.Generator().manual_seed(recipe.train.seed)
    rows, longest = recipe.micro_rows, recipe.data.row_tokens
    batches = []
    for _ in range(BATCHES):
        counts = torch.tensor(SENTENCES, dtype=torch.float64)
        lengths = torch.multinomial(counts, rows, replacement=True, generator=draw).clamp(max=longest)
        width = min(-(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE, longest)
        padding = torch.arange(width) >= lengths[:, None]
        ids, labels = _draw_masked(recipe, (rows, width), vocab_size, draw)
        batches.append((ids.masked_fill(padding, 0), labels.masked_fill(padding, IGNORE_INDEX), lengths))
    return _masked_inputs(recipe, vocab_size, 0, batches, sum(int(lengths.sum()) for _, _, lengths in batches))


def _draw_masked(recipe: Recipe, shape: tuple[int, int], vocab_size: int, draw: torch.Generator):
    """(input_ids, labels) of BERT."""
    ids = _draw_ids(shape, vocab_size, draw)
    selected = torch.rand(shape, generator=draw) < recipe.data.mlm_probability
    return ids.masked_fill(selected, 4), ids.masked_fill(~selected, IGNORE_INDEX)


def _draw_ids(shape: tuple[int, int], vocab_size: int, draw: torch.Generator) -> torch.Tensor:
    weights = 1.0 / torch.arange(1.0, vocab_size - 4.0)
    return 5 + torch.multinomial(weights, math.prod(shape), replacement=True, generator=draw).view(shape)


def gpt2_step(rows: int = 4, length: int = 256, dtype: str = "float32", **sizes) -> tuple[TrainTable, StepInputs]:
    """A step of GPT-2 on ids drawn likewise; sizes: of GPT2Config."""
    table, draw = TrainTable(batch_tokens=rows * length, lr=_LR, dtype=dtype), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = models.GPT2(models.GPT2Config(**sizes))
    ids = [_draw_ids((rows, length), model.config.vocab_size, draw) for _ in range(BATCHES)]
    counts = models.Counts(tokens=rows * length, pairs=rows * length**2, predicted=rows * (length - 1))
    return table, StepInputs(model, [_full(i, i) for i in ids], rows * length, model.flops(counts))


def t5_step(
    rows: int = 8, length: int = 256, target: int = 64, dtype: str = "float32", **sizes
) -> tuple[TrainTable, StepInputs]:
    """A step of T5, rows of `length` tokens to rows of `target`; sizes: of T5Config."""
    table, draw = TrainTable(batch_tokens=rows * length, lr=_LR, dtype=dtype), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = models.T5(models.T5Config(**sizes))
    batches = [
        _full(*(_draw_ids((rows, n), model.config.vocab_size, draw) for n in (length, target))) for _ in range(BATCHES)
    ]
    counts = models.Counts(
        tokens=rows * length,
        pairs=rows * length**2,
        predicted=rows * target,
        target_tokens=rows * target,
        target_pairs=rows * target**2,
        cross_pairs=rows * length * target,
    )
    return table, StepInputs(model, batches, rows * length, model.flops(counts))


def bert_step(
    name: str, rows: int, length: int, dtype: str = "float32", draw: Callable[[Recipe, int], StepInputs] = drawn
) -> tuple[TrainTable, StepInputs]:
    """A step of a recipe's BERT, with dropout, on rows of BERT's vocabulary; draw: `drawn` or `texts`."""
    tokens = rows * length
    recipe = load_recipe(name).with_values(
        {
            "model.hidden_dropout_prob": 0.1,
            "model.attention_probs_dropout_prob": 0.1,
            "data.row_tokens": length,
            "train.batch_tokens": tokens,
            "train.micro_batch_tokens": tokens,
            "train.lr": _LR,
            "train.dtype": dtype,
        }
    )
    return recipe.train, draw(recipe, 30522)


# The fixed steps by name. Those in bfloat16 are for a GPU. gpt2-39m is GPT-2 with four layers of 512 columns.
STEPS: dict[str, Callable[[], tuple[TrainTable, StepInputs]]] = {
    "bert-mini-16x128": lambda: bert_step("bert-mini", 16, 128),
    "bert-small-8x128": lambda: bert_step("bert-small", 8, 128),
    "bert-small-32x128": lambda: bert_step("bert-small", 32, 128),
    "bert-base-4x128": lambda: bert_step("bert-base", 4, 128),
    "bert-mini-32x128-text": lambda: bert_step("bert-mini", 32, 128, draw=texts),
    "bert-small-16x128-text": lambda: bert_step("bert-small", 16, 128, draw=texts),
    "gpt2-39m-4x256": lambda: gpt2_step(n_embd=512, n_layer=4, n_head=8),
    "gpt2-39m-4x512": lambda: gpt2_step(4, 512, n_embd=512, n_layer=4, n_head=8),
    "t5-small-8x256": t5_step,
    "bert-base-32x512": lambda: bert_step("bert-base", 32, 512, "bfloat16"),
    "bert-base-256x128-text": lambda: bert_step("bert-base", 256, 128, "bfloat16", texts),
    "gpt2-124m-16x1024": lambda: gpt2_step(16, 1024, "bfloat16"),
    "t5-base-32x512": lambda: t5_step(
        32, 512, 128, "bfloat16", d_model=768, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12
    ),
}


def find_step(
    name: str, settings: Sequence[str] = (), vocab_size: int = 30522, device: str | None = None
) -> tuple[Training, StepInputs]:
    """The step of a recipe, `drawn`, or of STEPS.

    device: where it is to run; a dtype that is "auto" then is what it is in a run there
    ValueError for an unknown one, or settings that it does not take.
    """
    if name not in STEPS:
        try:
            recipe = load_recipe(name).with_settings(settings)
        except ValueError as error:
            if str(error).startswith("recipe: expected one of"):
                raise ValueError(f"{error}; or of the fixed steps {', '.join(STEPS)}") from error
            raise
        if recipe.task != "masked_lm":
            raise ValueError(f"recipe: expected one of task masked_lm, for which batches are drawn, got {recipe.task}")
        if device is not None:
            recipe = with_dtype(recipe, torch.device(device))
        return Training(recipe.name, recipe.train), drawn(recipe, vocab_size)
    table, inputs = STEPS[name]()
    batches = "batch_tokens", "micro_batch_tokens"
    keys = {f"train.{of.name}": of for of in fields(TrainTable) if of.name not in batches}
    values = parse_settings(settings)
    if others := sorted(values.keys() - keys.keys()):
        raise ValueError(
            f"--set: expected keys of train other than its batches, since {name} fixes model and batches; got "
            f"{', '.join(others)}"
        )
    if values.get("train.dtype") == AUTO and device is not None:
        values["train.dtype"] = find_dtype(torch.device(device)).name
    entries = {keys[key].name: typed(key, value, keys[key]) for key, value in values.items()}
    return Training(name, replace(table, **entries)), inputs
