"""Fine-tuning for text: T5 from source to target, GPT-2 with the loss on the answer alone."""

import sys

import pytest
import torch
from models import to_transformers, widen

from fastlm.models import GPT2, T5, GPT2Config, T5Config
from fastlm.tasks._generated import greedy
from fastlm.tasks._text_scores import check_measures, figures_of, text_scores

VOCAB = 61


def gpt2(positions=24):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions, "bos_token_id": 1, "eos_token_id": 1}
    return widen(GPT2(GPT2Config(vocab_size=VOCAB, **sizes))).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    return widen(T5(T5Config(vocab_size=VOCAB, **sizes, **ids))).eval()


@pytest.mark.parametrize("make", [gpt2, t5])
def test_greedy_texts_are_those_of_transformers(make):
    model = make()
    theirs = to_transformers(model)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VOCAB, (n,), generator=draw).tolist() for n in (3, 9, 1)]
    ends = {theirs.generate(torch.tensor([prompts[1]]), max_new_tokens=4, do_sample=False)[0, -1].item(), 1}
    found = greedy(model, prompts, 8, ends, VOCAB)
    for prompt, ours in zip(prompts, found):
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=sorted(ends), pad_token_id=0
        )[0].tolist()
        new = out[1:] if make is t5 else out[len(prompt) :]
        assert ours == new[: next((i for i, id in enumerate(new) if id in ends), len(new))]
    assert any(len(row) < 8 for row in found)


def test_greedy_ends_with_the_positions():
    assert [len(row) for row in greedy(gpt2(positions=10), [[5] * 7, [6] * 10], 8, (), VOCAB)] == [3, 0]


def test_figures_are_those_of_the_packages():
    predicted = ["the cat sat on the mat ", "a dog", "nothing at all in common here"]
    wanted = ["the cat sat on the mat", "the dog barks", "other words"]
    names = ("rouge", "bleu", "chrf")
    scores = text_scores(predicted, wanted, names)
    assert tuple(scores) == figures_of(names) == ("exact", "rouge1", "rouge2", "rougeL", "bleu", "chrf")
    assert scores["exact"] == pytest.approx(1 / 3)
    assert scores["rouge1"] == pytest.approx((1 + 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3) + 0) / 3)
    same = text_scores(wanted, wanted, names)
    assert same["bleu"] == pytest.approx(100)
    assert same["chrf"] == pytest.approx(100)
    assert text_scores(predicted, wanted, ()) == {"exact": pytest.approx(1 / 3)}


def test_a_missing_package_names_the_extra(monkeypatch):
    with pytest.raises(
        ValueError, match=r"train\.measures: expected some of rouge, bleu, chrf, by commas, got 'meteor'"
    ):
        check_measures("train.measures", ("rouge", "meteor"))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(
        ValueError, match=r"train\.measures: BLEU and chrF figures need the package sacrebleu; pip insta"
    ):
        check_measures("train.measures", ("bleu",))
