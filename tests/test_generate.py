"""Sampling from GPT-2, and T5's spans."""

import pytest
import torch

from fastlm.generate import Sampling, continue_tokens, fill_spans, sample
from fastlm.models import GPT2, T5, GPT2Config, T5Config


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.3}
    return GPT2(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **sizes))


def test_draws_follow_the_softmax_of_the_likeliest():
    logits = torch.tensor([2.0, -1.0, 1.0, 0.0])
    sampling = Sampling(temperature=0.5, top_k=3)
    generator, draws = sampling.generator(), 4000
    counts = torch.bincount(torch.tensor([sample(logits, sampling, generator) for _ in range(draws)]), minlength=4)
    expected = (torch.tensor([2.0, -torch.inf, 1.0, 0.0]) / 0.5).softmax(-1)
    assert counts[1] == 0
    deviation = (counts / draws - expected).abs()
    assert (deviation <= 4 * (expected * (1 - expected) / draws).sqrt()).all()
    assert sample(logits, Sampling(temperature=0.0), generator) == 0
    everything = Sampling(temperature=50.0, top_k=0)
    assert {sample(logits, everything, everything.generator()) for _ in range(1)} <= set(range(4))


def test_continuation_is_a_function_of_the_seed(gpt2):
    first, again, other = (
        continue_tokens(gpt2, [1, 2, 3], 12, sampling=Sampling(temperature=1.0, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(first) == 12
    assert gpt2.training


def test_greedy_continuation_takes_the_likeliest_of_the_window(gpt2):
    """Beyond the model's length the window moves; `longest` makes it shorter."""
    gpt2.eval()
    for longest in (16, 7):
        text = [1, 2, 3]
        found = continue_tokens(gpt2, text, 24, sampling=Sampling(temperature=0.0), longest=longest)
        for token in found:
            assert token == int(gpt2(torch.tensor([text[-longest:]]))[0, -1].argmax())
            text.append(token)
    stop = found[5]
    cut = continue_tokens(gpt2, [1, 2, 3], 24, sampling=Sampling(temperature=0.0), longest=7, stop={stop})
    assert cut == found[: found.index(stop)]
    gpt2.train()


def test_wrong_arguments(gpt2):
    with pytest.raises(ValueError, match="ids: expected at least one token"):
        continue_tokens(gpt2, [], 3)
    with pytest.raises(ValueError, match="longest: expected from 1 to the model's n_positions=16, got 17"):
        continue_tokens(gpt2, [1], 3, longest=17)
    with pytest.raises(ValueError, match="tokens: expected 0 or more, got -1"):
        continue_tokens(gpt2, [1], -1)
    with pytest.raises(ValueError, match="temperature: expected 0 or a positive number"):
        Sampling(temperature=-1.0)
    with pytest.raises(ValueError, match="top_k: expected 0, for all tokens, or a positive integer"):
        Sampling(top_k=-1)


def test_spans_are_those_that_the_decoder_writes():
    """A T5 that has learned one corrupted text by heart."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    model = T5(T5Config(vocab_size=40, **sizes))
    sentinels, source, written = (39, 38, 37), [5, 39, 8, 38, 9, 1], [39, 6, 7, 38, 11, 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(torch.tensor([source]), labels=torch.tensor([written])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert fill_spans(model, source, sentinels, 1) == [[6, 7], [11]]
    assert fill_spans(model, source, sentinels, 1, tokens=2) == [[6], []]
    for wrong in ([5, 8, 1], [5, 38, 1], [38, 5, 39, 1]):
        with pytest.raises(ValueError, match=r"ids: expected the sentinels 0, 1, \.\.\. in this order"):
            fill_spans(model, wrong, sentinels, 1)
