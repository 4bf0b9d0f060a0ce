"""The shipped recipes: each trains, and each for a GPU costs what its comment says."""

import re

import pytest
from training import corpus

from fastlm.data import open_dataset
from fastlm.models import Counts
from fastlm.run.metrics import read_metrics
from fastlm.run.recipe import RECIPES, load_recipe
from fastlm.tasks import find_task
from fastlm.train import pretrain

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
ON_GPU = "bert-small", "bert-base", "bert-large", "gpt2-124m", "gpt2-350m", "t5-small", "t5-base"
ON_CPU = "bert-mini", "gpt2-mini", "gpt2-shakespeare", "t5-mini"

NARROW = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
}
SHORT = {
    "data.row_tokens": 32,
    "data.documents": "line",
    "data.validation_share": 0.1,
    "train.batch_tokens": 128,
    "train.micro_batch_tokens": 64,
    "train.max_steps": 3,
    "train.warmup_steps": 1,
}
STATED = re.compile(
    r"([\d.]+) billion tokens[^,]*, ([\d.]+) H200\s+hours at 30% of 989\s+TFLOP/s \(([\d.]+)\s+GFLOP a\s+token"
)


def test_every_recipe_is_here():
    assert sorted([*ON_GPU, *ON_CPU]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_of_a_narrow_one(name, tmp_path):
    recipe = load_recipe(name)
    kind = recipe.model.model_type
    tokenizer = recipe.data.tokenizer.partition(":")[0]
    narrow = {f"model.{key}": value for key, value in NARROW[kind].items()}
    size = tokenizer if tokenizer == "chars" else f"{tokenizer}:{500 if kind == 't5' else 400}"
    recipe = recipe.with_values({**narrow, **SHORT, "data.tokenizer": size})
    result = pretrain(recipe, corpus(tmp_path / "corpus.txt", lines=120), tmp_path / "run")
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3
    assert result.summary["skipped_steps"] == 0
    assert 0.0 < result.summary["val_loss"] < 20.0
    vocab_size = open_dataset(tmp_path / "run" / "data").tokenizer.vocab_size
    model = find_task(recipe.task).model_class(kind).from_pretrained(tmp_path / "run" / "hf")
    assert model.config.vocab_size == vocab_size


@pytest.mark.parametrize("name", ON_GPU)
def test_a_gpu_recipe_costs_what_its_comment_says(name):
    """Its tokens by batches and steps; its hours by the FLOPs of full rows."""
    comment = (RECIPES / f"{name}.toml").read_text().partition("task =")[0]
    text = " ".join(line.lstrip("# ") for line in comment.splitlines())
    tokens, hours, gflop = map(float, STATED.search(text).groups())
    assert "Departs from" in text
    recipe = load_recipe(name)
    cls, rows = find_task(recipe.task).model_class(recipe.model.model_type), recipe.data.row_tokens
    vocab_size = int(recipe.data.tokenizer.partition(":")[2])
    config = recipe.model.from_dict({**recipe.model.to_dict(), "vocab_size": vocab_size, "pad_token_id": None})
    if recipe.task == "span_corruption":
        target = find_task(recipe.task).layout(recipe.data).target_tokens
        counts = Counts(rows, rows**2, target, target_tokens=target, target_pairs=target**2, cross_pairs=rows * target)
    else:
        share = recipe.data.mlm_probability if recipe.task == "masked_lm" else 1.0
        counts = Counts(rows, rows**2, round(share * rows))
    a_token = cls(config, device="meta").flops(counts) / rows
    total = recipe.train.batch_tokens * recipe.train.max_steps
    assert total / 1e9 == pytest.approx(tokens, rel=0.01)
    assert a_token / 1e9 == pytest.approx(gflop, abs=0.0051)
    assert a_token * total / (0.3 * 989e12) / 3600 == pytest.approx(hours, rel=0.01, abs=0.051)
