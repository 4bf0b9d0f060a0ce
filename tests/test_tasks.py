"""Tasks: found by their module's name, with models and recipe keys of their own, trained by a loop that knows none."""

import json
import sys

import pytest
import torch
from training import corpus

import fastlm.tasks
from fastlm.bench.steps import find_step
from fastlm.data import open_dataset, prepare
from fastlm.models import GPT2, Bert, BertConfig, Counts, GPT2Config, T5Config
from fastlm.run.metrics import read_metrics
from fastlm.run.recipe import Recipe, load_recipe
from fastlm.settings import meaning, typed
from fastlm.tasks import DataTable, TrainTable, find_task, make_model, task_names
from fastlm.tasks.masked_lm import MaskedLM
from fastlm.train import pretrain

# The next token, for GPT-2 and T5; `share` is a key of its own, how many of the batch's rows are predicted.
NEXT_TOKEN = """
from __future__ import annotations

from dataclasses import dataclass

import torch

from fastlm.data import Batches
from fastlm.data.packing import PADDING_SAMPLE
from fastlm.models import GPT2, T5, Counts
from fastlm.ops import IGNORE_INDEX
from fastlm.settings import key
from fastlm.tasks import DataTable, Micro, Task, TrainTable


@dataclass(frozen=True)
class NextTokenData(DataTable):
    share: float = key(1.0, "share of the rows whose tokens are predicted", above=0.0, most=1.0)


class NextToken(Task):
    models = (GPT2, T5)
    tables = {"data": NextTokenData, "train": TrainTable}

    def micro(self, step, m):
        recipe = self.recipe
        batch = Batches(self.dataset, batch_rows=recipe.batch_rows, seed=recipe.train.seed).at(
            step, m, recipe.micro_count
        )
        first = batch.positions == 0
        ignored = (batch.sample_ids == PADDING_SAMPLE) | (
            torch.arange(len(first)) >= recipe.data.share * len(first)
        )
        return Micro(
            {
                "input_ids": batch.input_ids,
                "cu_seqlens": batch.cu_seqlens,
                "max_seqlen": batch.max_seqlen,
                "rng": torch.tensor([recipe.train.seed, step * recipe.micro_count + m]),
                "labels": batch.input_ids.masked_fill(ignored, IGNORE_INDEX),
                "reduction": "sum",
            },
            Counts(batch.tokens, 0, int((~ignored & ~first).sum())),
        )
"""

SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.0}
CONTENT = {
    "task": "next_token",
    "model": {"architecture": "gpt2", **SIZES},
    "data": {"row_tokens": 32},
    "train": {"batch_tokens": 256, "max_steps": 30, "warmup_steps": 2, "lr": 1e-2},
}


@pytest.fixture
def next_token(tmp_path, monkeypatch):
    """fastlm.tasks with one more module, as if its file lay there."""
    (tmp_path / "next_token.py").write_text(NEXT_TOKEN)
    with monkeypatch.context() as patch:
        patch.setattr(fastlm.tasks, "__path__", [*fastlm.tasks.__path__, str(tmp_path)])
        patch.delitem(sys.modules, "fastlm.tasks.next_token", raising=False)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare(corpus(directory / "corpus.txt"), "train:200", directory / "rows", row_tokens=32, documents="line")
    return directory / "rows"


def test_tasks_are_the_modules_of_the_package():
    assert "masked_lm" in task_names()
    assert "_task" not in task_names()
    assert find_task("masked_lm") is MaskedLM
    for name in ("_task", "mlm", ""):
        with pytest.raises(ValueError, match=rf"task: expected one of .*\bmasked_lm\b.*, got '{name}'"):
            find_task(name)


def test_a_new_module_is_a_task_and_is_trained(next_token, data, tmp_path):
    assert {"masked_lm", "next_token"} <= set(task_names())
    recipe = Recipe.from_dict(CONTENT, name="next")
    assert type(recipe.model) is GPT2Config
    result = pretrain(recipe, data, tmp_path / "run")
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 30
    assert result.summary["final_loss"] < losses[0] - 1.0
    assert "unigram_entropy" not in result.summary
    assert GPT2.from_pretrained(tmp_path / "run" / "hf").config.n_embd == 32
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert stored["model"]["architecture"] == "gpt2"
    assert Recipe.from_dict(stored) == Recipe.from_dict(CONTENT).with_values({"train.dtype": "float32"})


def test_the_keys_of_a_recipe_are_its_tasks_and_models(next_token, tmp_path):
    recipe = Recipe.from_dict(CONTENT)
    assert recipe.with_settings(["data.share=0.5"]).data.share == 0.5
    with pytest.raises(ValueError, match=r"data\.mlm_probability: there is no such key"):
        recipe.with_settings(["data.mlm_probability=0.2"])
    with pytest.raises(ValueError, match=r"data.share: expected more than 0.0 and at most 1.0, got 2.0"):
        recipe.with_settings(["data.share=2"])
    with pytest.raises(ValueError, match=r"data.row_tokens: expected at most model.n_positions=64, got 128"):
        recipe.with_settings(["data.row_tokens=128"])
    assert Recipe.from_dict({"task": "next_token"}).model == GPT2Config()
    t5 = Recipe.from_dict({"task": "next_token", "model": {"architecture": "t5"}, "data": {"row_tokens": 4096}})
    assert t5.model == T5Config()  # whose sequences may have any length
    t5 = Recipe.from_dict({"task": "next_token", "model": {"architecture": "t5", "num_layers": 3}})
    assert t5.model.num_decoder_layers == 3  # by default num_layers, not the default's
    (tmp_path / "mine.toml").write_text(recipe.as_toml())
    assert "n_inner" not in (tmp_path / "mine.toml").read_text()  # TOML has no None
    assert load_recipe(tmp_path / "mine.toml").to_dict() == recipe.to_dict()


def test_tables_of_another_task_are_refused(next_token):
    with pytest.raises(ValueError, match="data: expected MaskedLMData, the table of task masked_lm, got DataTable"):
        Recipe(data=DataTable())
    with pytest.raises(ValueError, match="train: expected MaskedLMTrain, the table of task masked_lm, got TrainTable"):
        Recipe(train=TrainTable())
    with pytest.raises(ValueError, match=r"model\.architecture: expected 'bert', got 'gpt2'"):
        Recipe(model=GPT2Config())
    with pytest.raises(ValueError, match=r"model\.architecture: expected 'bert', got \['bert'\]"):
        Recipe.from_dict({"model": {"architecture": ["bert"]}})
    with pytest.raises(ValueError, match=r"model\.architecture: expected 'gpt2' or 't5', got 'bert'"):
        Recipe("next_token", model=BertConfig())


@pytest.mark.parametrize("config", [BertConfig, GPT2Config, T5Config])
def test_every_entry_of_a_recipes_model_has_a_meaning(config):
    entries = {of.name for of in config.settings()}
    assert not entries & set(config.decided)
    assert {config.attention_dropout, config.length or config.attention_dropout} <= entries
    for of in config.settings():
        assert meaning(of), of.name
        assert typed(of.name, of.default, of) == of.default


def test_the_model_of_a_recipe_has_the_tokenizers_entries(data):
    tokenizer = open_dataset(data).tokenizer
    recipe = Recipe.from_dict({"model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}})
    before = torch.random.get_rng_state()
    model, again = (make_model(recipe, tokenizer.vocab_size, tokenizer.pad_id) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(model) is Bert
    assert (model.config.vocab_size, model.config.pad_token_id) == (tokenizer.vocab_size, tokenizer.pad_id)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    other = make_model(recipe.with_values({"train.seed": 1}), tokenizer.vocab_size, tokenizer.pad_id)
    assert not torch.equal(model.embeddings.word, other.embeddings.word)
    assert model.flops(Counts(tokens=10)) < model.flops(Counts(tokens=10, predicted=1))


def test_steps_are_drawn_for_masked_lm_alone(next_token, tmp_path):
    """What `fastlm profile` and bench_train time."""
    (tmp_path / "next.toml").write_text(Recipe.from_dict(CONTENT).as_toml())
    with pytest.raises(ValueError, match=r"recipe: expected one of task masked_lm, .* got next_token"):
        find_step(str(tmp_path / "next.toml"))
