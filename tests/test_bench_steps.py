"""Training steps beside their peers': inputs, contenders, times on a fake clock, and that a wrong one is not timed."""

import math
import os
import random
import re
from functools import partial
from pathlib import Path

import contenders_on_purpose
import pytest
import torch
from step_workers import STEP_MS, Here
from torch.utils.flop_counter import FlopCounterMode
from training import small

from fastlm.bench import ceilings, job, step_contenders, step_worker, steps
from fastlm.bench import compare as comparison
from fastlm.bench.peers import transformers as transformers_peers
from fastlm.models import GPT2, T5, Counts, GPT2Config, T5Config

OTHERS = contenders_on_purpose.__name__


def run(*contenders, dropout=0.0, sizes=(), here=True, **options):
    """compare_steps of a small BERT; other contenders are those of OTHERS. here: in this process, on its fake clock."""
    recipe = small(model__hidden_dropout_prob=dropout, model__attention_probs_dropout_prob=dropout, **dict(sizes))
    options = {"rounds": 1, "seconds": 0.0, **options}
    if here:
        options["start"] = partial(Here, contenders_on_purpose.CLOCK)
    names = [name if name in comparison.EVERY else f"{OTHERS}:{name}" for name in contenders]
    inputs = steps.drawn(recipe, 100)
    return inputs, comparison.compare_steps(recipe, inputs, contenders=names, **options)


def test_a_whole_step_that_is_a_fifth_slower_shows_as_that():
    inputs, (ours, paced, slower) = run("fastlm", "paced", "slower", rounds=3)
    assert (ours.ms, paced.ms, slower.ms) == pytest.approx((STEP_MS, 80.0, 96.0))
    assert slower.ms_iqr == pytest.approx(0.0)
    assert paced.tokens_per_s == pytest.approx(inputs.tokens / 80e-3)
    # The product of the bound takes a step too: its rate is that of MATMUL_SIZE^3 products in STEP_MS.
    rate = ceilings.matmul_flops(torch.device("cpu")) / STEP_MS
    assert paced.of_bound == pytest.approx(inputs.flops / rate / 80)


def test_a_round_is_as_long_as_asked_and_its_first_step_comes_before_the_clock():
    """A contender that is slow once a round is as fast as its other steps."""
    began = contenders_on_purpose.CLOCK.now()
    _, (paced, cold) = run("paced", "cold", rounds=2, seconds=0.045)
    assert (paced.ms, cold.ms) == pytest.approx((80.0, 2.0))
    # Each runs BATCHES steps, one step, and two rounds as long as 45 ms; before each of these four, one step more.
    before = steps.BATCHES + 1 + 4
    in_paced, in_product = (before + 2 * 1) * 80, (before + 2 * 5) * STEP_MS
    in_cold = (before + 2 * 23 - 3) * 2 + 3 * 1000  # its first step and those that begin a round
    took = (contenders_on_purpose.CLOCK.now() - began) * 1e3
    assert took == pytest.approx(in_paced + in_cold + in_product)


def test_a_skipped_layer_or_a_failure_is_named_and_not_timed():
    """At BERT-mini's width: with weights as drawn, a layer of 32 columns adds next to nothing."""
    sizes = {"model__hidden_size": 256, "model__intermediate_size": 1024}
    _, (ours, shallow, broken) = run("fastlm", "shallow", "broken", sizes=sizes, curve=3)
    assert not ours.missing
    assert shallow.missing.startswith(f"{comparison.WRONG}computes a loss of ")
    assert broken.missing == "failed: ZeroDivisionError: division by zero"
    assert not any(time.losses for time in (shallow, broken))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here: the maximum is getrusage's")
def test_a_process_of_its_own(monkeypatch, tmp_path):
    """Its peak is not that of the process that started it; killed, it answers with its exit status."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
    held = torch.ones(3 << 28, dtype=torch.uint8)  # 768 MB
    recipe = small()
    comparison.write_inputs(recipe, steps.drawn(recipe, 100), tmp_path, "cpu", threads=1)
    worker = step_worker.Worker(f"{OTHERS}:killed", tmp_path)
    try:
        assert worker.start()["loss"] > 0
        answer = worker.run(1)
        assert answer["seconds"] > 0
        assert 0 < answer["step_mb"] < answer["peak_mb"] < held.numel() / 2**20
        assert worker.run(1) == {"failed": "its process ended with -9"}
    finally:
        worker.close()


def test_a_fastlm_that_breaks_is_an_error():
    with pytest.raises(RuntimeError, match=r"contenders_on_purpose:broken failed: ZeroDivision"):
        run("broken", "idle")
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        run("fastlm", rounds=0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_contender_that_learns_less_leaves_the_noise(dropout):
    """Its first loss is right; its curve is not. The same step under another seed of dropout stays inside."""
    _, (ours, same, halved, idle) = run("fastlm", "reseeded", "halved", "idle", dropout=dropout, curve=20)
    assert ours.curve_off == 0
    assert same.learns_alike
    assert not halved.learns_alike
    assert not idle.learns_alike
    note = comparison.table([ours, same, halved, idle], title="steps").caption
    assert "idle)" in note or "halved)" in note
    assert note.count("LEARNS OTHERWISE") == 2


def test_steps_are_named_by_model_rows_and_length():
    for name in steps.STEPS:
        assert re.fullmatch(r"(bert|gpt2|t5)-[a-z0-9]+-\d+x\d+(-text)?", name), name


def test_the_noise_of_a_curve_is_not_its_trend():
    """With dropout: noise about the same mean is explained, an offset of the same size as the noise is not."""
    draw = random.Random(0)
    expected = [5.0 - 0.05 * step for step in range(40)]
    noisy = [loss * (1 + draw.gauss(0, 0.02)) for loss in expected]
    off, noise = comparison.curve_off(noisy, expected, dropout=True, dtype="float32")
    assert off <= noise < 0.05
    drifting = [loss * (1 + 0.004 * step) for step, loss in enumerate(noisy)]
    off, noise = comparison.curve_off(drifting, expected, dropout=True, dtype="float32")
    assert off > noise
    off, _ = comparison.curve_off([*expected[:-1], float("nan")], expected, dropout=True, dtype="float32")
    assert off == float("inf")


def test_whose_first_loss_is_another_is_wrong():
    losses = {"fastlm": 5.0, "close": 5.0001, "other": 4.99, "none": float("nan")}
    wrong = comparison.wrong_losses(losses, 1e-4)
    assert wrong.keys() == {"other", "none"}
    assert wrong["other"] == "WRONG: computes a loss of 4.990000 where fastlm computes 5.000000"


def test_a_contender_that_cannot_run_is_named():
    times = [
        comparison.StepTime("fastlm", 100, 10.0, 1.0),
        comparison.StepTime("theirs", missing="it is not installed"),
    ]
    table = comparison.table(times, title="steps")
    assert list(table.columns[1].cells) == ["10,000"]
    assert "not run: theirs: it is not installed" in table.caption


def job_of(recipe, inputs, path):
    inputs.model.save_pretrained(path)
    return job.Job(type(inputs.model), recipe.train, path, inputs.batches, torch.device("cpu"))


def first_losses(recipe, inputs, names, path, steps=0):
    """{contender: its loss before `steps` steps}."""
    given, losses = job_of(recipe, inputs, path), {}
    for name in names:
        contender = step_contenders.CONTENDERS[name]
        loss, step = contender.prepare(given, contender.load(given))
        losses[name] = loss()
        for _ in range(steps):
            step(0)
    return losses


@pytest.mark.parametrize("name", ["fastlm", "transformers tuned", "transformers patched"])
def test_a_batch_that_comes_again_draws_other_dropout(name, tmp_path):
    """With the same dropout each time the curve would fall further. The rate is too small to change a loss."""
    if name != "fastlm":
        pytest.importorskip("transformers")
    settings = {"model__hidden_dropout_prob": 0.1, "model__attention_probs_dropout_prob": 0.1}
    recipe = small(**settings, train__lr=1e-12)
    made = job_of(recipe, steps.drawn(recipe, 100), tmp_path)
    contender = step_contenders.CONTENDERS[name]
    _, step = contender.prepare(made, contender.load(made))
    losses = [float(torch.as_tensor(step(number)).flatten()[0]) for number in range(2 * steps.BATCHES)]
    for first, second in zip(losses, losses[steps.BATCHES :], strict=False):
        assert first != second
        assert first == pytest.approx(second, rel=0.1)


def test_drawn_inputs():
    recipe = small()
    inputs = steps.drawn(recipe, 100)
    assert not inputs.padded
    predicted = 0
    for input_ids, labels, _ in inputs.batches:
        assert input_ids.shape == labels.shape == (8, 32)
        assert torch.equal(labels != -100, input_ids == 4)
        assert labels[labels != -100].min() >= 5
        assert labels.max() < 100
        predicted += int((labels != -100).sum())
    assert 0 < predicted < len(inputs.batches) * inputs.tokens
    assert inputs.tokens == 256


def test_texts_are_as_long_as_sentences_and_padded_as_collators_pad():
    recipe = small(data__row_tokens=64, train__batch_tokens=64 * 64)
    inputs = steps.texts(recipe, 100)
    assert inputs.padded
    real = []
    for input_ids, labels, lengths in inputs.batches:
        rows, width = input_ids.shape
        assert (rows, width % 8) == (64, 0)
        assert width - 8 < lengths.max() <= width
        padding = torch.arange(width) >= lengths[:, None]
        assert torch.equal(input_ids == 0, padding)
        assert (labels[padding] == -100).all()
        real += lengths.tolist()
    count, total = sum(steps.SENTENCES), sum(n * c for n, c in enumerate(steps.SENTENCES))
    assert count == 10662
    assert sum(real) / len(real) == pytest.approx(total / count, rel=0.1)
    assert inputs.tokens == round(sum(real) / len(inputs.batches))


@pytest.mark.parametrize("form", ["transformers packed", "transformers patched", "transformers tuned"])
def test_texts_padded_or_packed_are_one_loss(form, tmp_path):
    """fastlm on packed texts computes Transformers' loss on the same texts padded, packed by a mask, and patched."""
    pytest.importorskip("transformers")
    recipe = small(data__row_tokens=64, train__batch_tokens=8 * 64)
    inputs = steps.texts(recipe, 100)
    losses = first_losses(recipe, inputs, ("fastlm", form), tmp_path)
    assert not comparison.wrong_losses(losses, 1e-5)


def test_packing_for_transformers_loses_no_token_and_pads_less():
    inputs = steps.texts(small(data__row_tokens=64, train__batch_tokens=32 * 64), 100)
    for batch in inputs.batches:
        input_ids, labels, lengths = batch
        packed = transformers_peers.packed(*batch)
        real = packed["input_ids"] != 0
        assert int(real.sum()) == int(lengths.sum())
        assert real.shape[0] < len(input_ids)
        assert real.shape[1] == input_ids.shape[1]
        assert int((packed["labels"] != -100).sum()) == int((labels != -100).sum())
        # A token sees its own text, as many tokens as that has.
        seen = packed["attention_mask"][:, 0].sum(-1)[real]
        assert sorted(seen.tolist()) == sorted(n for n in lengths.tolist() for _ in range(n))
        assert int((packed["position_ids"][real] == 0).sum()) == len(lengths)


def test_full_rows_are_not_packed(tmp_path):
    recipe = small()
    made = job_of(recipe, steps.drawn(recipe, 100), tmp_path)
    with pytest.raises(job.NotRun, match="nothing to pack"):
        step_contenders.CONTENDERS["transformers packed"].prepare(made, torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["fastlm float32", "transformers pure"])
def test_contenders_of_a_step_in_bfloat16(name, tmp_path):
    """They start from the step's loss up to rounding, keep their dtype, and do not run a step in float32."""
    pytest.importorskip("transformers")
    recipe = small(train__dtype="bfloat16")
    given = job_of(recipe, steps.drawn(recipe, 100), tmp_path)
    contender = step_contenders.CONTENDERS[name]
    model = contender.load(given)
    loss, step = contender.prepare(given, model)
    expected, _ = step_contenders.FASTLM.prepare(given, step_contenders.FASTLM.load(given))
    assert loss() == pytest.approx(expected(), rel=2e-2)
    assert math.isfinite(float(torch.as_tensor(step(0)).flatten()[0]))
    dtype = torch.bfloat16 if name == "transformers pure" else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    in_float32 = small(train__dtype="float32")
    with pytest.raises(job.NotRun, match="in float32 already"):
        contender.prepare(job_of(in_float32, steps.drawn(in_float32, 100), tmp_path), model)


@pytest.mark.parametrize(
    "made",
    [
        lambda: steps.gpt2_step(2, 16, vocab_size=100, n_embd=32, n_layer=1, n_head=2),
        lambda: steps.t5_step(2, 16, 8, vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
    ],
    ids=["gpt2", "t5"],
)
def test_steps_of_other_models(made, tmp_path):
    """fastlm and Transformers start from one loss, and take their steps."""
    pytest.importorskip("transformers")
    table, inputs = made()
    losses = first_losses(
        steps.Training("step", table),
        inputs,
        ("fastlm", "transformers tuned", "transformers patched"),
        tmp_path,
        steps=3,
    )
    assert not comparison.wrong_losses(losses, 1e-4)


def test_a_step_longer_than_berts_positions():
    _, inputs = steps.gpt2_step(1, 1024, vocab_size=100, n_embd=16, n_layer=1, n_head=1)
    assert inputs.shape == "1x1024"


def test_flops_of_other_models(tmp_path):
    """Against torch's count of Transformers' products, which masks what is causal but multiplies all of it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 2, "attn_implementation": "eager"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    ids = torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    ours = GPT2(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2))
    want = ours.flops(Counts(tokens=48, pairs=2 * 3 * 16**2, predicted=48))
    assert counter.get_total_flops() == want / 3

    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1}
    sizes |= {"num_heads": 3, "feed_forward_proj": "gated-gelu"}
    config = transformers.T5Config(**sizes, attn_implementation="eager")
    model = transformers.T5ForConditionalGeneration(config)
    with FlopCounterMode(display=False) as counter:
        model(ids, decoder_input_ids=ids[:, :5])
    model = T5(T5Config(**sizes))
    want = model.flops(
        Counts(48, 3 * 16**2, predicted=15, target_tokens=15, target_pairs=2 * 3 * 5**2, cross_pairs=3 * 16 * 5)
    )
    assert counter.get_total_flops() == want / 3
