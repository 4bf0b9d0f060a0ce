"""A small BERT with a tokenizer, and labelled texts that it learns, for tests of fine-tuning."""

import csv
import json
import random

import torch

from fastlm.data import Tokenizer
from fastlm.models import Bert, BertConfig

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "dull")
THINGS = ("a film", "the old play", "this book about two towns", "the song", "some show by friends of mine")
NAMES = ("Anna", "Boris", "Clara")
PLACES = ("Rome", "Paris", "Cairo")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def reviews(count, seed=0):
    """[(text, "pos" or "neg"), ...]"""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(("pos", "neg"))
        rows.append((f"{draw.choice(THINGS)} is {draw.choice(GOOD if label == 'pos' else BAD)}", label))
    return rows


def sentences(count, seed=0):
    """[(words, tags), ...] of persons and places"""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        person = [draw.choice(NAMES)] + ([draw.choice(NAMES)] if draw.random() < 0.3 else [])
        place = draw.choice(PLACES)
        words = [*person, "found", *draw.choice(THINGS).split(), "in", place, "."]
        tags = ["O"] * len(words)
        tags[: len(person)] = ["B-person", "I-person"][: len(person)]
        tags[-2] = "B-place"
        rows.append((words, tags))
    return rows


def make_model(directory, **entries):
    """A BERT with random weights in Transformers' layout."""
    texts = [text for text, _ in reviews(300)] + [" ".join(words) for words, _ in sentences(100)]
    tokenizer = Tokenizer.train(lambda: iter(texts), 120)
    config = {**TINY, "max_position_embeddings": 48, **entries}
    torch.manual_seed(0)
    model = Bert(BertConfig(vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id, **config))
    model.save_pretrained(directory, tokenizer)
    return directory


def write_csv(path, rows, columns=("text", "label"), delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([columns, *rows])
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_conll(path, rows):
    blocks = ("".join(f"{word}\t{tag}\n" for word, tag in zip(words, tags)) for words, tags in rows)
    path.write_text("\n".join(blocks), encoding="utf-8")
    return path
