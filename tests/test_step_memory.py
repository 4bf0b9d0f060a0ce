"""The memory of a training step is estimated before anything is allocated, and what does not fit is refused."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from training import corpus, small

from fastlm.data import open_dataset, prepare
from fastlm.tasks.masked_lm import MaskedLM
from fastlm.train import _memory, pretrain


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare(corpus(directory / "corpus.txt"), "train:200", directory / "rows", row_tokens=32, documents="line")
    return directory / "rows"


def step_of(recipe, data):
    dataset = open_dataset(data)
    config = replace(recipe.model, vocab_size=dataset.tokenizer.vocab_size, pad_token_id=0)
    return _memory._Step(MaskedLM(recipe, dataset, torch.device("cpu")), config)


def test_a_step_that_does_not_fit(data, tmp_path, monkeypatch):
    """With the remedy that the error names the run goes through; nothing was allocated or written before."""
    recipe = small(train__batch_tokens=32 * 64, train__max_steps=1, train__warmup_steps=0)
    step = step_of(recipe, data)
    there = (step.peak(16) + step.peak(32)) // 2 + _memory.AHEAD * step.batch_bytes(64)
    monkeypatch.setattr(_memory, "available", lambda device: there)
    with pytest.raises(
        ValueError, match=r"train.micro_batch_tokens: .*2048 tokens.* GB .*, which trains the same"
    ) as bad:
        pretrain(recipe, data, tmp_path / "run")
    assert "set train.micro_batch_tokens=512," in str(bad.value)
    assert not (tmp_path / "run").exists()
    pretrain(recipe.with_values({"train.micro_batch_tokens": 512}), data, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "there", "message"),
    [
        (
            {"train__batch_tokens": 32 * 2**30},
            10**9,
            r"train.batch_tokens: .* got 34359738368: the 3 batches",
        ),
        ({"model__hidden_size": 512}, 10**7, r"train.micro_batch_tokens: .*; choose a smaller model, or a machine"),
    ],
)
def test_what_no_micro_batch_mends(settings, there, message, data, tmp_path, monkeypatch):
    settings = {"train__micro_batch_tokens": 256, **settings}
    monkeypatch.setattr(_memory, "available", lambda device: there)
    with pytest.raises(ValueError, match=message):
        pretrain(small(**settings), data, tmp_path / "run")


def test_layers_are_extrapolated(data):
    """Six layers, counted from three and four, as when all are counted."""
    recipe = small(model__num_hidden_layers=6, train__batch_tokens=4096)
    extrapolated = step_of(recipe, data).peak(128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_memory, "_LAYERS", 6)
        assert extrapolated == pytest.approx(step_of(recipe, data).peak(128), rel=0.02)


def test_what_surely_fits_is_not_counted(data, tmp_path, monkeypatch):
    """Torch's fake tensors take seconds to import."""
    monkeypatch.setattr(_memory, "_Step", None)
    pretrain(small(train__max_steps=1, train__warmup_steps=0), data, tmp_path / "run")


def test_what_torch_keeps_of_a_gpu_is_free(monkeypatch):
    """A second run in one process: the first one's memory is still torch's."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    assert _memory.available(device) == 8_000


MEASURE = """
import json, re, sys
from dataclasses import replace
import torch
from fastlm.data import open_dataset
from fastlm.tasks import find_task, make_model
from fastlm.train import _memory, load_recipe
from fastlm.train.ahead import ahead
from fastlm.train.optimizer import make_optimizer, train_step

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

recipe = load_recipe("bert-mini").with_settings(json.loads(sys.argv[2]))
dataset = open_dataset(sys.argv[1])
task = find_task(recipe.task)(recipe, dataset, torch.device("cpu"))
vocab_size, pad_id = dataset.tokenizer.vocab_size, dataset.tokenizer.pad_id
step = _memory._Step(task, replace(recipe.model, vocab_size=vocab_size, pad_token_id=pad_id))
estimate = step.peak(recipe.batch_rows) + _memory.AHEAD * step.batch_bytes(recipe.batch_rows)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = make_model(recipe, vocab_size, pad_id).train()
optimizer = make_optimizer(model, recipe.train)
for _, micros in ahead(task, range(1), 0, 3):
    train_step(model, optimizer, micros, lr=1e-4, grad_clip=1.0, dtype=getattr(torch, recipe.train.dtype))
print(estimate, status("VmHWM") - before)
"""


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("width", "tokens"), [(256, 4096), (256, 8192), (512, 8192)])
def test_the_estimate_is_near_the_measured_peak(width, tokens, dtype, data):
    settings = [f"model.hidden_size={width}", f"model.intermediate_size={4 * width}", "data.row_tokens=32"]
    settings += [f"train.batch_tokens={tokens}", f"train.dtype={dtype}"]
    command = [sys.executable, "-c", MEASURE, str(data), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    estimate, measured = map(int, done.stdout.split())
    print(f"{width} wide, {tokens} tokens, {dtype}: estimate {estimate / 1e6:.0f} MB, measured {measured / 1e6:.0f}")
    assert 1 / 1.5 < estimate / measured < 1.5
