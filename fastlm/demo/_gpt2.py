"""GPT-2: held-out sentences continued, and bits a character of held-out text beside a trigram model's."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import torch

from fastlm.data.batches import make_batch
from fastlm.demo._ngrams import Trigrams, before
from fastlm.generate import generate
from fastlm.models import GPT2

RECIPE, SENTENCES, WORDS, TOKENS = "gpt2-mini", 4, 5, 48
LEAST_STEPS = 150  # the recipe is not judged on fewer; three minutes of two cores are more
SHARE = 0.85  # of the bits a character of the tokens' frequencies: one that has learned no more ends at 1
LOADED_BY = "AutoModelForCausalLM"
_SAMPLING = {"temperature": 0.7, "top_k": 40, "seed": 0}
_ROWS = 256  # at a time


def show(model_directory, task, sentences, say) -> None:
    """Print a continuation of the first words of each sentence."""
    model, tokenizer = GPT2.from_pretrained(model_directory), task.dataset.tokenizer
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    longest = min(task.recipe.data.row_tokens, model.config.n_positions)  # later positions are untrained
    say(
        "The first words of held-out sentences, and what the model continues them with\n(temperature "
        f"{_SAMPLING['temperature']}, the {_SAMPLING['top_k']} likeliest tokens, seed {_SAMPLING['seed']}):\n"
    )
    for sentence in sentences:
        prompt = " ".join(sentence.split(" ")[:WORDS])
        ids = [begin, *tokenizer.encode_batch([prompt])[0]][-longest:]
        most = min(TOKENS, longest - len(ids) + 1)
        (written,) = generate(
            model, [ids], tokenizer=tokenizer, max_new_tokens=most, eos_token_id=tokenizer.eos_id, **_SAMPLING
        )
        text = f"{prompt} ▸{written.text}"
        say(textwrap.fill(text, 76, initial_indent="  ", subsequent_indent="    ") + "\n", markup=False)


@torch.inference_mode()
def measure(model_directory, task) -> dict[str, float]:
    """Bits a character of the held-out rows that training evaluated; of the model and of the trigrams."""
    model, tokenizer = GPT2.from_pretrained(model_directory).eval(), task.dataset.tokenizer
    trigrams = Trigrams(*_all_contexts(task.dataset), tokenizer.vocab_size)
    nats, other, unigram, characters, tokens = 0.0, 0.0, 0.0, 0, 0
    for micro in task.evaluation():
        inputs = micro.inputs
        nats += float(model(**inputs))
        a, b, c = _contexts(inputs["input_ids"], inputs["positions"], inputs["shift_labels"], tokenizer.vocab_size)
        other += trigrams.nats(a, b, c).sum()
        unigram -= np.log(trigrams.unigram[c]).sum()
        characters += len(tokenizer.decode(c))  # one that a row's end cuts counts once too often: 1 in 10,000
        tokens += len(c)
    names = "bits_per_character", "trigram_bits_per_character", "unigram_bits_per_character"
    bits = [value / (max(1, characters) * math.log(2)) for value in (nats, other, unigram)]
    return {**dict(zip(names, map(float, bits))), "held_out_characters": characters, "held_out_tokens": tokens}


def _contexts(ids, positions, targets, missing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, c) of every predicted token of a batch."""
    ids, positions, targets = ids.numpy(), positions.numpy(), targets.numpy()
    real = targets >= 0
    return before(ids, positions, 1, missing)[real], ids[real], targets[real]


def _all_contexts(dataset) -> list[np.ndarray]:
    """(a, b, c) of every token of the training rows."""
    parts = []
    for start in range(0, dataset.rows, _ROWS):
        rows = np.arange(start, min(start + _ROWS, dataset.rows))
        batch = make_batch(dataset, np.zeros_like(rows), rows)
        parts.append(_contexts(batch.input_ids, batch.positions, batch.targets, dataset.tokenizer.vocab_size))
    return [np.concatenate(part) for part in zip(*parts)]


def report(found: dict[str, float], say) -> None:
    say(f"Bits a character, on {found['held_out_characters']:,} characters of held-out text:")
    for label, name in (
        ("this model", "bits_per_character"),
        ("trigrams of tokens", "trigram_bits_per_character"),
        ("frequencies of tokens", "unigram_bits_per_character"),
    ):
        say(f"  {label:<22} {found[name]:.3f}")
    say("")


def judge(found: dict[str, float]) -> tuple[bool, str]:
    ours, trigram, unigram = (found[f"{kind}bits_per_character"] for kind in ("", "trigram_", "unigram_"))
    return ours <= SHARE * unigram, (
        f"{ours:.3f} bits a character; the tokens' frequencies have {unigram:.3f} (expected: at most {SHARE:g} of "
        f"that), trigrams {trigram:.3f}"
    )
