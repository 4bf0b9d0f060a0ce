"""A small corpus and a small recipe for tests of training."""

import random

from fastlm.run.recipe import Recipe

NAMES = ("anna", "boris", "clara", "david", "elena", "felix", "greta", "hugo")
THINGS = ("a red apple", "the old clock", "two green stones", "a paper boat", "the last letter", "some warm bread")
PLACES = ("the garden", "a small house", "the river", "an empty street", "the station")

SETTINGS = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 64,
    "model.max_position_embeddings": 64,
    "model.hidden_dropout_prob": 0.0,
    "model.attention_probs_dropout_prob": 0.0,
    "data.row_tokens": 32,
    "data.tokenizer": "train:200",
    "data.documents": "line",
    "data.mlm_probability": 0.15,
    "train.batch_tokens": 256,
    "train.dtype": "float32",
    "train.max_steps": 12,
    "train.warmup_steps": 4,
    "train.lr": 5e-3,
    "train.checkpoint_every": 4,
    "train.unigram_bias": False,
}


def corpus(path, lines=400):
    """Writes lines of simple sentences, and returns the path."""
    draw = random.Random(0)
    sentences = (
        f"{draw.choice(NAMES)} found {draw.choice(THINGS)} near {draw.choice(PLACES)} on day {i}." for i in range(lines)
    )
    path.write_text("\n".join(sentences) + "\n")
    return path


def small(**settings) -> Recipe:
    """The small recipe; keys as `train__lr=1e-3`."""
    return Recipe(name="small").with_values({**SETTINGS, **{k.replace("__", "."): v for k, v in settings.items()}})


def set_options(**settings) -> list[str]:
    """The same recipe as arguments of `fastlm pretrain bert-mini`."""
    values = {**SETTINGS, **{k.replace("__", "."): v for k, v in settings.items()}}
    return ["--set", *(f"{key}={value}" for key, value in values.items())]
