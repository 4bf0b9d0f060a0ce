"""BERT: masked words of held-out sentences, and accuracy on held-out masks beside the unigram's."""

from __future__ import annotations

import torch

from fastlm.fill_mask import fill_mask
from fastlm.models import Bert
from fastlm.tasks.masked_lm import log_frequencies

RECIPE, SENTENCES, TOP = "bert-mini", 6, 5
MARGIN = 0.7  # nats below the unigram entropy of the held-out text
ADVANTAGE = 1.5  # times the unigram's top-5 accuracy
LOADED_BY = "AutoModelForMaskedLM"


def show(model_directory, task, sentences, say) -> None:
    """Print the candidates for a word of each sentence."""
    tokenizer = task.dataset.tokenizer
    mask = tokenizer.decode([tokenizer.mask_id], skip_special_tokens=False)
    say("Held-out sentences, a word of each masked, and the five likeliest words:\n")
    for sentence in sentences:
        words = sentence.split(" ")
        place = _masked_word(words, tokenizer)
        word = words[place].rstrip(",.")
        words[place] = words[place].replace(word, mask, 1)
        text = " ".join(words)
        (candidates,) = fill_mask(model_directory, text, top=TOP)
        say(f"  {text}", markup=False)
        listed = ", ".join(f"{c.token} {c.probability:.0%}" for c in candidates)
        say(f"    {listed}   (was: {word})\n", markup=False)


def _masked_word(words: list[str], tokenizer) -> int:
    """The word to mask: the one nearest to the middle that is one token, of four letters or more if there is one."""
    middle = len(words) // 2
    order = sorted(range(1, len(words)), key=lambda place: (abs(place - middle), place))
    whole = [i for i in order if len(tokenizer.encode_batch([words[i].rstrip(",.")])[0]) == 1]
    return next((i for i in whole if len(words[i].rstrip(",.")) >= 4), (whole or order)[0])


@torch.inference_mode()
def measure(model_directory, task, summary) -> dict[str, float]:
    """Accuracy on the held-out masks, and that of always naming the most frequent tokens."""
    model = Bert.from_pretrained(model_directory).eval()
    common = log_frequencies(task.dataset, task.recipe.train.seed).topk(TOP).indices
    hits, total = torch.zeros(4), 0
    for micro in task.evaluation():
        inputs = dict(micro.inputs)
        targets = inputs.pop("targets")[:, None]
        del inputs["reduction"]
        best = model(**inputs).topk(TOP).indices
        found = [best[:, :1] == targets, best == targets, common[:1] == targets, common == targets]
        hits += torch.tensor([float(hit.any(-1).sum()) for hit in found])
        total += len(targets)
    names = "top1", "top5", "unigram_top1", "unigram_top5"
    return {
        **dict(zip(names, (hits / max(1, total)).tolist())),
        "held_out_masks": total,
        "held_out_loss": summary["val_loss"],
        "held_out_unigram_entropy": task.validation.unigram_entropy,
    }


def report(found: dict[str, float], say) -> None:
    say(f"{found['held_out_masks']:,} masks of held-out text:")
    say("                        this model   the most frequent tokens")
    for label, name in (("right at once", "top1"), ("among the first five", "top5")):
        say(f"  {label:<20}  {found[name]:>10.1%}   {found['unigram_' + name]:>24.1%}")
    say(f"  {'nats a token':<20}  {found['held_out_loss']:>10.3f}   {found['held_out_unigram_entropy']:>24.3f}\n")


def judge(found: dict[str, float]) -> tuple[bool, str]:
    below = found["held_out_unigram_entropy"] - found["held_out_loss"]
    good = below >= MARGIN and found["top5"] >= ADVANTAGE * found["unigram_top5"]
    return good, (
        f"the held-out loss is {below:.3f} nats below the unigram entropy (expected: {MARGIN}), top-5 accuracy "
        f"{found['top5']:.1%}, the unigram's {found['unigram_top5']:.1%} (expected: {ADVANTAGE} times as high)"
    )
