"""The race to a loss, at a small size: the plain loop, the identical recipe, and what is printed."""

import math
from dataclasses import replace

import pytest
import torch
from training import corpus

from fastlm.bench import time_to_loss as race
from fastlm.bench.plain_gpt2 import PlainGPT2, PlainLoop, PlainRecipe
from fastlm.models import GPT2
from fastlm.run.recipe import load_recipe
from fastlm.tasks import make_model
from fastlm.train.optimizer import lr_at

SMALL = PlainRecipe(layers=1, heads=2, width=32, block=16, batch=4, steps=60, warmup=5, lr=1e-2, min_lr=1e-3)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    return race.Text.split(corpus(directory / "corpus.txt"), directory)


def test_the_text_is_split_once(text):
    train, held = text.prepared(16)
    assert train.text_tokens == len(text.train)
    assert held.text_tokens == len(text.held)
    assert len(text.held) / (len(text.train) + len(text.held)) == pytest.approx(0.1, abs=0.001)
    assert train.tokenizer.vocab_size == text.vocab_size + 2  # the end of a document, and the unknown character


def test_the_identical_recipe_is_the_same_model_and_schedule():
    """With the same weights the same loss and gradients; the warm-up of nanoGPT divides by one step more."""
    recipe = race.identical(SMALL)
    assert recipe.batch_rows == SMALL.batch
    assert recipe.train.weight_decay == SMALL.weight_decay
    torch.manual_seed(0)
    plain, ours = PlainGPT2(SMALL, 20), make_model(recipe, 20, None, bos_token_id=0, eos_token_id=0)
    assert type(ours) is GPT2
    names = {"word": "word.weight", "position": "position.weight", "norm.weight": "norm.weight"}
    for i in range(SMALL.layers):
        for a, b in (("norm1", "norm1"), ("norm2", "norm2"), ("qkv", "qkv"), ("out", "out")):
            names[f"layers.{i}.{a}.weight"] = f"blocks.{i}.{b}.weight"
        names |= {f"layers.{i}.mlp.linear{j}.weight": f"blocks.{i}.{n}.weight" for j, n in ((1, "up"), (2, "down"))}
    theirs = dict(plain.named_parameters())
    assert set(names) == {name for name, _ in ours.named_parameters()}
    assert set(names.values()) == set(theirs)
    ours.load_state_dict({name: theirs[other].detach() for name, other in names.items()})
    ids = torch.randint(20, (3, 17))
    loss = plain(ids[:, :-1], ids[:, 1:])
    loss.backward()
    mine = ours(ids[:, :-1].contiguous(), shift_labels=ids[:, 1:].contiguous())
    mine.backward()
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[names[name]].grad, rtol=1e-3, atol=1e-6)
    for step in (0, 4, 5, 30, 59):
        first = (SMALL.warmup + 1) / SMALL.warmup if step < SMALL.warmup else 1.0
        assert lr_at(step, recipe.train) == pytest.approx(SMALL.lr_at(step) * first)


def test_validation_predicts_every_character_once():
    loop = PlainLoop(SMALL, torch.arange(100) % 20, 20, seed=0)
    held, sizes = torch.arange(1 + 3 * 16 + 5) % 20, []
    loop.model.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[1].shape)))
    loss = loop.validate(held)
    assert sizes == [(3, 16), (1, 5)]
    whole = loop.model(held[:48].view(3, 16), held[1:49].view(3, 16)).item()
    rest = loop.model(held[48:53][None], held[49:][None]).item()
    assert loss == pytest.approx((48 * whole + 5 * rest) / 53)


def test_a_race(text, capsys):
    """All learn, the clock runs in steps alone, and the row says when the plain loop's loss was reached."""
    clock = race.Clock()
    recipe = race.identical(SMALL)
    fast = recipe.with_values({"train.optimizer": "muon", "train.lr": 2e-2})
    contenders = [
        race.plain_contender(SMALL, text, 0, compiled=False),
        race.fastlm_contender("identical", recipe, text, 0, points=1),
        race.fastlm_contender("fastlm", fast, text, 0, points=10),
    ]
    before = [contender.validate() for contender in contenders]
    assert all(abs(loss - math.log(text.vocab_size)) < 0.3 for loss in before)
    race.race(contenders, clock)
    found = race.row(0, contenders)
    assert [len(contender.curve) for contender in contenders] == [1, 1, 10]
    assert found["plain_loss"] < before[0] - 0.5
    assert found["identical_loss"] == pytest.approx(found["plain_loss"], abs=0.15)
    assert found["fastlm_loss"] < found["plain_loss"]
    assert found["fastlm_steps"] < SMALL.steps
    assert found["fastlm_ratio"] == pytest.approx(found["fastlm_seconds"] / found["plain_seconds"])
    unreached = {**found, "fastlm_steps": None, "fastlm_seconds": None, "fastlm_ratio": None}
    race.report([found, unreached, unreached], print)
    printed = capsys.readouterr().out
    assert printed.count("not reached") == 2
    assert "to the plain loop's final loss: inf of its time, median of 3 seeds" in printed


def test_contenders_take_turns_and_the_clock_stops_for_validation():
    class Ticks:
        time = 0.0

        def now(self):
            return self.time

    clock, order = Ticks(), []

    def contender(name, steps, cost, every):
        def step(number):
            order.append(name)
            clock.time += cost

        def validate():
            clock.time += 1000.0
            return 3.0 - 0.1 * one.done

        one = race.Contender(name, steps, step, validate, every)
        return one

    slow, fast = contender("slow", 40, 1.0, 40), contender("fast", 20, 0.5, 5)
    race.race([slow, fast], clock)
    assert order == ["slow", "slow", "fast"] * 20
    assert (slow.seconds, fast.seconds, slow.ms) == (40.0, 10.0, 1000.0)
    assert [point[:2] for point in fast.curve] == [(5, 2.5), (10, 5.0), (15, 7.5), (20, 10.0)]
    assert fast.reached(2.0) == (10, 5.0)
    assert fast.reached(0.5) is None


def test_arguments(tmp_path, capsys):
    for arguments, message in (
        (["--text", str(tmp_path / "none")], "--text: expected a file"),
        (["--text", __file__, "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--text", __file__, "--steps", "100"], "--steps: expected more than the 100 of the warm-up, got 100"),
        (["--text", __file__, "--set", "train.lrr=1"], "train.lrr: there is no such key"),
    ):
        with pytest.raises(SystemExit):
            race.parse(arguments)
        assert message in capsys.readouterr().err
    assert race.parse(["--text", __file__]).recipe == load_recipe("gpt2-shakespeare")
    assert replace(SMALL, steps=2000).lr_at(1999) == pytest.approx(1e-3, rel=1e-3)
