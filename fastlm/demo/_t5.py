"""T5: spans of held-out sentences filled in, and accuracy on their tokens beside a trigram model's."""

from __future__ import annotations

import numpy as np
import torch

from fastlm.data.batches import make_batch
from fastlm.data.packing import PADDING_SAMPLE
from fastlm.data.spans import choose, corrupt
from fastlm.demo._ngrams import Trigrams, before
from fastlm.generate import fill_spans
from fastlm.models import T5
from fastlm.tasks import EVALUATION_SEED

RECIPE, SENTENCES, WORDS = "t5-mini", 5, 2
LEAST_STEPS = 150  # the recipe is not judged on fewer; three minutes of two cores are more
ADVANTAGE = 2.0  # times the accuracy of always naming the most frequent token
LOADED_BY = "AutoModelForSeq2SeqLM"
_ROWS = 256  # at a time


def show(model_directory, task, sentences, say) -> None:
    """Print each sentence with a span of words taken out, and what the model puts there."""
    model, tokenizer = T5.from_pretrained(model_directory), task.dataset.tokenizer
    say(f"Held-out sentences, {WORDS} words of each taken out, and what the model puts there:\n")
    for sentence in sentences:
        words = sentence.split(" ")
        at = max(1, (len(words) - WORDS) // 2)
        head, lost, tail = words[:at], words[at : at + WORDS], words[at + WORDS :]
        sides = tokenizer.encode_batch([" ".join(head), "".join(f" {word}" for word in tail)])
        ids = [*sides[0], tokenizer.sentinel_ids[0], *sides[1], tokenizer.eos_id]
        (filled,) = fill_spans(model, ids, tokenizer.sentinel_ids, tokenizer.eos_id, tokens=12)
        say(f"  {' '.join(head)} ____ {' '.join(tail)}", markup=False)
        say(f"    {tokenizer.decode(filled).strip() or '(nothing)'}   (was: {' '.join(lost)})\n", markup=False)


@torch.inference_mode()
def measure(model_directory, task) -> dict[str, float]:
    """Share of the span tokens of held-out rows that each predicts right, given the tokens before them."""
    model, tokenizer = T5.from_pretrained(model_directory).eval(), task.dataset.tokenizer
    trigrams = Trigrams(*_all_contexts(task.dataset), tokenizer.vocab_size)
    special = torch.tensor([*tokenizer.sentinel_ids, tokenizer.eos_id])
    right, other, common, total = 0, 0, 0, 0
    for batch in task.evaluation_batches():
        corruption = task.rows.corruption
        pair = corrupt(batch, corruption, tokenizer, EVALUATION_SEED)
        written = pair.labels.roll(1)
        written[pair.decoder_cu_seqlens[:-1].long()] = model.config.decoder_start_token_id
        logits = model(
            pair.input_ids,
            written,
            cu_seqlens=pair.cu_seqlens,
            max_seqlen=task.rows.row_tokens,
            decoder_cu_seqlens=pair.decoder_cu_seqlens,
            decoder_max_seqlen=task.rows.target_tokens,
        )
        in_span = ~torch.isin(pair.labels, special)
        right += int((logits.argmax(-1) == pair.labels)[in_span].sum())
        chosen = choose(batch, corruption, EVALUATION_SEED)
        a, b, c = (part[chosen.lost] for part in _contexts(chosen.ids, chosen.lengths, tokenizer.vocab_size))
        assert np.array_equal(c, pair.labels[in_span].numpy()), "both predict the same tokens"
        other += int((trigrams.best(a, b) == c).sum())
        common += int((c == trigrams.unigram.argmax()).sum())
        total += len(c)
    return {
        "span_token_accuracy": right / max(1, total),
        "trigram_accuracy": other / max(1, total),
        "unigram_accuracy": common / max(1, total),
        "held_out_span_tokens": total,
    }


def _contexts(ids, lengths, missing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, c) of every token of pieces of such lengths, one after another."""
    positions = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return before(ids, positions, 2, missing), before(ids, positions, 1, missing), ids


def _all_contexts(dataset) -> list[np.ndarray]:
    """(a, b, c) of every token of the training rows."""
    parts = []
    for start in range(0, dataset.rows, _ROWS):
        rows = np.arange(start, min(start + _ROWS, dataset.rows))
        batch = make_batch(dataset, np.zeros_like(rows), rows)
        starts = batch.cu_seqlens[: batch.pieces + 1].long()
        lengths = starts.diff().numpy()
        real = batch.sample_ids.numpy() != PADDING_SAMPLE
        a, b, c = _contexts(batch.input_ids.numpy(), lengths, dataset.tokenizer.vocab_size)
        parts.append((a[real], b[real], c[real]))
    return [np.concatenate(part) for part in zip(*parts)]


def report(found: dict[str, float], say) -> None:
    say(f"Right tokens, of {found['held_out_span_tokens']:,} in held-out spans, each given the tokens before it:")
    for label, name in (
        ("this model", "span_token_accuracy"),
        ("trigrams of tokens", "trigram_accuracy"),
        ("the most frequent token", "unigram_accuracy"),
    ):
        say(f"  {label:<24} {found[name]:.1%}")
    say("")


def judge(found: dict[str, float]) -> tuple[bool, str]:
    ours, trigram, unigram = (found[name] for name in ("span_token_accuracy", "trigram_accuracy", "unigram_accuracy"))
    return ours >= ADVANTAGE * unigram, (
        f"{ours:.1%} of the span tokens are right; the most frequent token is {unigram:.1%} of them (expected: "
        f"{ADVANTAGE:g} times as many), trigrams have {trigram:.1%}"
    )
