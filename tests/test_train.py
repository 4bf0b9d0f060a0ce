"""Recipes, the schedule, a step, and whole small runs."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from training import corpus, set_options, small

from fastlm import cpu_rate
from fastlm.chip import peak_flops
from fastlm.data import open_dataset, prepare
from fastlm.models import Bert, BertConfig, Counts
from fastlm.run.metrics import MetricsFile, first_and_final_loss, read_metrics
from fastlm.run.recipe import RECIPES
from fastlm.tasks.masked_lm import MaskedLM, log_frequencies
from fastlm.train import Diverged, Recipe, load_recipe, make_model, pretrain
from fastlm.train import optimizer as optimizers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small corpus, prepared for the small recipe."""
    directory = tmp_path_factory.mktemp("data")
    prepare(corpus(directory / "corpus.txt"), "train:200", directory / "rows", row_tokens=32, documents="line")
    return directory / "rows"


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


# ---- recipes


def test_shipped_recipes():
    names = {path.stem for path in RECIPES.glob("*.toml")}
    recipes = {name: load_recipe(name) for name in names}
    for name in ("gpt2-mini", "t5-mini"):
        assert recipes[name].task == {"gpt2": "causal_lm", "t5": "span_corruption"}[recipes[name].model.model_type]
    sizes = {"bert-base": (12, 768), "bert-mini": (4, 256), "bert-small": (4, 512)}
    for name, (layers, hidden) in sizes.items():
        assert recipes[name].task == "masked_lm"
        assert (recipes[name].model.num_hidden_layers, recipes[name].model.hidden_size) == (layers, hidden)


def test_set_reaches_every_key_with_its_type():
    recipe = small()
    content = recipe.to_dict()
    assert recipe.with_settings([f"task={content.pop('task')}"]) == recipe
    for table, keys in content.items():
        for key, value in keys.items():
            assert recipe.with_settings([f"{table}.{key}={value}"]) == recipe
    changed = recipe.with_settings(
        ["train.lr=1e-3", "train.max_steps=1e3", "train.grad_clip=2", "train.dtype=bfloat16"]
    )
    assert (changed.train.lr, changed.train.max_steps, changed.train.grad_clip) == (1e-3, 1000, 2.0)
    assert type(changed.train.max_steps) is int
    assert type(changed.train.grad_clip) is float
    assert changed.differences(recipe.to_dict()) == [
        "train.dtype is 'bfloat16', was 'float32'",
        "train.grad_clip is 2.0, was 1.0",
        "train.lr is 0.001, was 0.005",
        "train.max_steps is 1000, was 12",
    ]
    assert not recipe.with_settings(["train.checkpoint_every=9", "train.keep_checkpoints=5"]).differences(
        recipe.to_dict()
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.learning_rate=1", "train.learning_rate: there is no such key"),
        ("train.wramup_steps=1", "did you mean train.warmup_steps"),
        ("hidden_size=64", "did you mean model.hidden_size?"),
        ("train.lr", "expected key=value"),
        ("=3", "--set: expected key=value, as train.lr=1e-3, got '=3'"),
        (" = 3", "--set: expected key=value, as train.lr=1e-3, got ' = 3'"),
        ("train.lr=", "train.lr: expected a number, got ''"),
        ("train.lr=fast", "train.lr: expected a number, got 'fast'"),
        ("train.max_steps=1.5", "train.max_steps: expected an integer, got 1.5"),
        ("train.max_steps=true", "train.max_steps: expected an integer, got True"),
        ("train.max_steps=0", "train.max_steps: expected at least 1, got 0"),
        ("train.lr=nan", "train.lr: expected more than 0"),
        ("train.lr=inf", "train.lr: expected a finite number, got inf"),
        ("train.beta2=1.0", "train.beta2: expected at least 0.0 and less than 1.0, got 1.0"),
        ("train.dtype=float16", "train.dtype: expected 'auto' or 'float32' or 'bfloat16', got 'float16'"),
        ("train.batch_tokens=100", "train.batch_tokens: expected a multiple of data.row_tokens=32, got 100"),
        ("train.micro_batch_tokens=fast", "train.micro_batch_tokens: expected an integer or 'auto', got 'fast'"),
        ("train.micro_batch_tokens=-32", "train.micro_batch_tokens: expected at least 0, got -32"),
        ("train.micro_batch_tokens=96", "(32, 64, 128, 256, or 0 for all), got 96"),
        ("data.row_tokens=128", "data.row_tokens: expected at most model.max_position_embeddings=64, got 128"),
        ("model.num_attention_heads=3", "model.num_attention_heads: expected a divisor of hidden_size=32, got 3"),
        (
            "model.attention_probs_dropout_prob=0.001",
            "model.attention_probs_dropout_prob: expected 0 or at least 1/256",
        ),
        ("model.hidden_size=0", "model.hidden_size: expected a positive integer, got 0"),
        ("model.hidden_size=1000000000", "model.hidden_size: expected at most 268435456, got 1000000000"),
        ("model.num_hidden_layers=100000", "model.num_hidden_layers: expected at most 10000, got 100000"),
        ("model.hidden_dropout_prob=1.0", "model.hidden_dropout_prob: expected less than 1"),
        ("model.attention_probs_dropout_prob=1", "model.attention_probs_dropout_prob: expected less than 1"),
        ("model.hidden_act=relu", "model.hidden_act: expected one of 'gelu'"),
        ("model.vocab_size=9", "model.vocab_size: there is no such key"),
        (
            "model.architecture=gpt2",
            "model.architecture: expected 'bert', the recipe's, on which its other keys depend",
        ),
        ("task=causal", "task: expected 'masked_lm', the recipe's, on which its other keys depend"),
        ("data.mask_replace_prob=0.95", "data.random_replace_prob: expected at most 1 together"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError) as raised:
        small().with_settings([setting])
    assert message in str(raised.value)


def test_a_printed_recipe_is_a_recipe(tmp_path):
    recipe = load_recipe("bert-base").with_settings(["train.lr=2e-4", "model.layer_norm_eps=1e-12"])
    (tmp_path / "mine.toml").write_text(recipe.as_toml())
    assert load_recipe(tmp_path / "mine.toml").to_dict() == recipe.to_dict()


def test_bad_recipe_files(tmp_path):
    for content, message in (
        ("lr = 1", "expected task and the tables model, data, train, got 'lr'"),
        ("[train\n", "is not valid TOML"),
        ("[train]\nlr = '1'", "train.lr: expected a number, got '1'"),
        ("task = 'mlm'", ", got 'mlm'"),
        ("[task]\nname = 'masked_lm'", ", got {"),
        ("[model]\narchitecture = 'gpt2'", "model.architecture: expected 'bert', got 'gpt2'"),
    ):
        (tmp_path / "r.toml").write_text(content)
        with pytest.raises(ValueError) as raised:
            load_recipe(tmp_path / "r.toml")
        assert message in str(raised.value)
    with pytest.raises(ValueError, match="expected one of bert-base, bert-large, bert-mini, bert-small, gpt2-124m"):
        load_recipe("bert-huge")


# ---- schedule, optimizer, step


def test_schedule():
    table = small(train__lr=1.0, train__warmup_steps=4, train__max_steps=12, train__final_lr=0.1).train
    lrs = [optimizers.lr_at(step, table) for step in range(13)]
    assert lrs[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lrs[8] == pytest.approx(0.1 + 0.9 * 0.5)
    assert lrs[12] == pytest.approx(0.1)
    cosine = small(train__lr=1.0, train__schedule="cosine", train__warmup_steps=0).train
    assert optimizers.lr_at(6, cosine) == pytest.approx(0.5)
    assert optimizers.lr_at(3, cosine) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


def step_parts(data, **settings):
    recipe = small(**settings)
    dataset = open_dataset(data)
    model = make_model(recipe, dataset.tokenizer.vocab_size, dataset.tokenizer.pad_id)
    objective = MaskedLM(recipe, dataset, CPU)
    return recipe, model, optimizers.make_optimizer(model, recipe.train), objective


def test_only_matrices_decay(data):
    _, model, optimizer, _ = step_parts(data)
    decayed = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decayed[id(parameter)] is not (name.endswith("bias") or "norm" in name), name


def test_clipping_is_adamw_on_clipped_gradients(data):
    """The division inside the fused kernel gives what clip_grad_norm_ before an ordinary AdamW gives."""
    _, model, optimizer, objective = step_parts(data, train__grad_clip=0.1)
    _, other, _, _ = step_parts(data)
    groups = [{**g, "params": []} for g in optimizer.param_groups]
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        groups[0 if parameter.dim() >= 2 else 1]["params"].append(theirs[name])
    plain = torch.optim.AdamW(
        [{k: g[k] for k in ("params", "weight_decay")} for g in groups], lr=1e-2, betas=(0.9, 0.98), eps=1e-6
    )
    for step in range(3):
        micro = objective.micro(step, 0)
        loss, norm = optimizers.train_step(model, optimizer, [micro], lr=1e-2, grad_clip=0.1, dtype=torch.float32)
        expected = other(**micro.inputs) / micro.counts.predicted
        expected.backward()
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1).item(), rel=1e-5)
        assert norm > 0.1
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        plain.step()
        plain.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_without_finite_gradients_changes_nothing(data):
    _, model, optimizer, objective = step_parts(data)
    arguments = {"lr": 1e-2, "grad_clip": 1.0, "dtype": torch.float32}
    optimizers.train_step(model, optimizer, [objective.micro(0, 0)], **arguments)
    before = [p.detach().clone() for p in model.parameters()]
    state = [v.clone() for p in model.parameters() for v in optimizer.state[p].values()]
    hook = model.head.bias.register_hook(lambda gradient: gradient * torch.inf)
    _, norm = optimizers.train_step(model, optimizer, [objective.micro(1, 0)], **arguments)
    assert not math.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(map(torch.equal, state, (v for p in model.parameters() for v in optimizer.state[p].values())))
    hook.remove()
    optimizers.train_step(model, optimizer, [objective.micro(2, 0)], **arguments)
    assert not torch.equal(before[0], next(model.parameters()))


def test_micro_batches_change_neither_masks_nor_loss(data):
    """M = 1, 2 and 4 see the same tokens, masks and targets, and take the same step up to rounding."""
    seen, results = {}, {}
    for micro_tokens in (256, 128, 64):
        recipe, model, optimizer, objective = step_parts(data, train__micro_batch_tokens=micro_tokens)
        micros = [objective.micro(3, m) for m in range(recipe.micro_count)]
        assert [int(micro.inputs["rng"][1]) for micro in micros] == [3 * len(micros) + m for m in range(len(micros))]
        seen[micro_tokens] = [
            torch.cat([micro.inputs[name] for micro in micros]) for name in ("input_ids", "positions", "targets")
        ]
        results[micro_tokens] = optimizers.train_step(
            model, optimizer, micros, lr=1e-2, grad_clip=1.0, dtype=torch.float32
        )
    for micro_tokens in (128, 64):
        assert all(map(torch.equal, seen[256], seen[micro_tokens]))
        torch.testing.assert_close(results[micro_tokens], results[256], rtol=1e-5, atol=0)


def test_objective_counts(data):
    recipe, _, _, objective = step_parts(data)
    micro = objective.micro(0, 0)
    batch = objective.batches.at(0)
    lengths = batch.cu_seqlens.diff().tolist()
    padding = [int(n) for s, n in zip(batch.cu_seqlens, lengths) if n and batch.sample_ids[s] == 2**63 - 1]
    assert micro.counts.tokens == 256 - sum(padding)
    assert micro.counts.pairs == sum(n * n for n in lengths) - sum(n * n for n in padding)
    assert micro.counts.predicted == len(micro.inputs["targets"]) > 0
    assert (micro.inputs["targets"] >= 5).all()
    on_device = MaskedLM(recipe, open_dataset(data), torch.device("cuda")).micro(0, 0)  # made on the host all the same
    assert on_device.inputs["index"].numel() == 128
    assert on_device.counts.predicted == micro.counts.predicted


def test_unigram_bias(data):
    """The loss of a new model is the unigram entropy where its head starts at the tokens' frequencies."""
    recipe, model, _, objective = step_parts(data)
    with torch.no_grad():
        model.head.bias.copy_(log_frequencies(objective.dataset, recipe.train.seed))
    micro = objective.micro(0, 0)
    with torch.no_grad():
        loss = model(**micro.inputs) / micro.counts.predicted
    probabilities = model.head.bias.detach().exp()
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-3)
    assert (probabilities[list(objective.dataset.tokenizer.special_ids)] < 1e-3).all()
    assert loss == pytest.approx(objective.dataset.unigram_entropy, rel=0.1)


def test_mfu_formula():
    sizes = {"hidden_size": 4, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = Bert(BertConfig(vocab_size=50, **sizes))
    products = 10 * (4 * 4 * 4 + 2 * 4 * 16) + 2 * 100 * 4  # qkv and output, MLP, scores and values
    counts = Counts(tokens=10, pairs=100, predicted=2)
    assert model.flops(counts) == 3 * 2 * (3 * products + 2 * (4 * 4 + 4 * 50))
    assert Counts.total([counts, counts._replace(target_tokens=7)]) == Counts(20, 200, 4, 7)
    assert Counts.total([]) == Counts()
    assert peak_flops(CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA RTX 6000 Ada Generation", 364, 91.1),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("Tesla V100-PCIE-32GB", None, 14),
        ("Tesla T4", None, 8.1),
        # Names that hold another's: what is not in the table has no peak.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),
        ("NVIDIA A10", None, None),
        ("NVIDIA GB200", None, None),
        ("Quadro RTX 6000", None, None),
    ],
)
def test_peaks_are_of_exact_products(name, bfloat16, float32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = [peak_flops(torch.device("cuda"), dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert found == [peak and pytest.approx(peak * 1e12) for peak in (bfloat16, float32)]


def test_no_float32_peak_with_tf32(monkeypatch):
    """Whichever of torch's switches set it; the older one cannot be read after the newer."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    matmul, device = torch.backends.cuda.matmul, torch.device("cuda")
    before = matmul.fp32_precision
    try:
        for precision, peak in (("tf32", None), ("ieee", 30.3e12)):
            matmul.fp32_precision = precision
            assert peak_flops(device, torch.float32) == peak
            assert peak_flops(device, torch.bfloat16) == 121e12
    finally:
        matmul.fp32_precision = before


# ---- runs


def test_run_learns_and_leaves_its_files(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_rate, "known", lambda dtype: cpu_rate.Rate(1e9, 0.0))
    recipe = small(train__max_steps=60, train__checkpoint_every=0, train__batch_tokens=512)
    result = pretrain(recipe, data, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"recipe.json", "metrics.jsonl", "checkpoints", "summary.json", "loss.png", "hf"}
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert set(rows[0]) == {"step", "loss", "tokens", "tokens_per_s", "lr", "grad_norm", "mfu"}
    assert rows[0]["mfu"] > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == result.summary
    assert summary["first_loss"] == pytest.approx(sum(losses(tmp_path / "run")[:10]) / 10)
    assert summary["tokens"] == rows[-1]["tokens"] <= 60 * 512
    assert summary["final_loss"] < summary["unigram_entropy"] - 0.25 < summary["first_loss"]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


# Relative, per loss. The same runs with torch, oneDNN and MKL limited to AVX2 differ by 1.1e-7 in float32 and 1.4e-4 in
# bfloat16. One thread and two give the same bits.
GOLDEN = {
    "float32": (1e-5, {}),
    "bfloat16": (2e-3, {"train.dtype": "bfloat16"}),
    "accumulated": (1e-5, {"train.micro_batch_tokens": 128, "train.unigram_bias": True}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name, data, tmp_path):
    """A refactor changes no loss. The losses were recorded at fe771c7 on an Emerald Rapids Xeon (AMX), as float.hex."""
    tolerance, settings = GOLDEN[name]
    dropout = {"model.hidden_dropout_prob": 0.1, "model.attention_probs_dropout_prob": 0.1}
    pretrain(small().with_values({**dropout, **settings}), data, tmp_path)
    golden = json.loads((Path(__file__).parent / "golden_losses.json").read_text())[name]
    found, expected = losses(tmp_path), [float.fromhex(loss) for loss in golden]
    print(f"{name}: {sum(a == b for a, b in zip(found, expected))} of {len(expected)} losses have the recorded bits")
    assert found == pytest.approx(expected, rel=tolerance)


def test_exported_model_gives_transformers_losses(data, tmp_path):
    transformers = pytest.importorskip("transformers")
    pretrain(small(), data, tmp_path / "run")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    recipe, dataset = small(), open_dataset(data)
    assert tokenizer.mask_token_id == dataset.tokenizer.mask_id
    ours = Bert.from_pretrained(tmp_path / "run" / "hf").eval()
    inputs = MaskedLM(recipe, dataset, CPU).micro(0, 0).inputs
    with torch.no_grad():
        loss = ours(**{**inputs, "reduction": "none"})
        starts = inputs["cu_seqlens"].unique().tolist()
        logits = torch.cat([theirs(inputs["input_ids"][None, a:b]).logits[0] for a, b in pairwise(starts)])
        expected = torch.nn.functional.cross_entropy(logits[inputs["index"]], inputs["targets"], reduction="none")
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-4)


def test_accumulation_trains_the_same_model(data, tmp_path):
    pretrain(small(), data, tmp_path / "one")
    pretrain(small(train__micro_batch_tokens=128), data, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_divergence_stops_the_run_and_leaves_the_checkpoint(data, tmp_path, monkeypatch):
    original = optimizers.train_step

    def poisoned(model, optimizer, micros, **arguments):
        step = int(micros[0].inputs["rng"][1])
        bad = step in (1, 6) or step >= 10
        hook = model.head.bias.register_hook(lambda gradient: gradient * (torch.inf if bad else 1.0))
        try:
            return original(model, optimizer, micros, **arguments)
        finally:
            hook.remove()

    monkeypatch.setattr("fastlm.train.loop.train_step", poisoned)
    with pytest.raises(Diverged, match=r"10 steps in a row, up to step 20.*step-00000008"):
        pretrain(small(train__max_steps=30), data, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [2, 7, *range(11, 21)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]


def test_a_run_shorter_than_the_patience_diverges_too(data, tmp_path, monkeypatch):
    original = optimizers.train_step

    def poisoned(model, *rest, **arguments):
        with torch.no_grad():
            model.head.bias.fill_(torch.nan)
        return original(model, *rest, **arguments)

    monkeypatch.setattr("fastlm.train.loop.train_step", poisoned)
    with pytest.raises(Diverged, match=r"of 3 steps in a row, up to step 3, .*; there is no checkpoint yet"):
        pretrain(small(train__max_steps=3), data, tmp_path)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_a_rate_that_destroys_the_model_fails(steps, data, tmp_path):
    """The first step is applied, and no other has finite gradients: no model is written."""
    recipe = small(train__lr=1e30, train__warmup_steps=0, train__max_steps=steps)
    with pytest.raises(
        Diverged, match=rf"{steps - 1} of {steps} steps.* were not finite.*a lower train.lr than 1e\+30"
    ):
        pretrain(recipe, data, tmp_path)
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(("warmup", "warned"), [(2, False), (3, True), (4, True)])
def test_a_warm_up_that_never_ends_is_said(warmup, warned, data, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pretrain(small(train__warmup_steps=warmup, train__max_steps=3), data, tmp_path)
    said = [str(w.message) for w in caught if "warmup" in str(w.message)]
    assert bool(said) is warned
    assert not warned or said == [
        f"train.warmup_steps: expected fewer than train.max_steps=3, got {warmup}; the learning rate only rises, and "
        "the schedule after the peak is not used"
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"model__hidden_size": 2**26},
        {"model__intermediate_size": 2**28, "model__hidden_size": 1024},
        {"model__num_hidden_layers": 10_000, "model__hidden_size": 1024, "model__intermediate_size": 4096},
    ],
)
def test_a_model_beyond_the_memory_is_refused_before_anything_is_made(settings, data, tmp_path):
    recipe = small(**settings)
    with pytest.raises(
        ValueError, match=r"^model: .* fits into the memory of cpu, got [\d,]+ parameters, .* GB of the"
    ):
        pretrain(recipe, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_loss_of_a_step_without_predictions_is_null(data, tmp_path):
    recipe = small(data__mlm_probability=0.01, train__batch_tokens=32)
    summary = pretrain(recipe, data, tmp_path).summary
    found = losses(tmp_path)
    predicted = [MaskedLM(recipe, open_dataset(data), CPU).micro(step, 0).counts.predicted for step in range(12)]
    assert [loss is None for loss in found] == [count == 0 for count in predicted]
    assert 0 < predicted.count(0) < 12
    half = (12 - found.count(None)) // 2
    assert summary["final_loss"] == pytest.approx(sum([loss for loss in found if loss is not None][-half:]) / half)


def command(*arguments):
    return [sys.executable, "-m", "fastlm", "pretrain", "bert-mini", *map(str, arguments), *set_options()]


def test_the_command_runs_the_small_recipe():
    """Another default in bert-mini must not make the command's runs others than small()'s."""
    assert load_recipe("bert-mini").with_settings(set_options()[1:]).to_dict() == small().to_dict()


def wait_for_steps(run, count):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"no {count} steps in {run}")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGKILL, signal.SIGINT)),
    ],  # also test_kills.py
)
def test_killed_and_resumed_gives_the_same_losses(number, data, tmp_path):
    """SIGKILL loses the steps since the checkpoint, SIGTERM and SIGINT none; the losses are bit-identical.

    The exit status is the signal's, 143 or 130, so that no script takes an interrupted run for a finished one.
    """
    steps = ["train.max_steps=40", "train.checkpoint_every=8"]
    steps += ["model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recipe = small().with_settings(steps)
    pretrain(recipe, data, whole)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the order of a sum depends on them
    process = subprocess.Popen(
        [*command("--data", data, "--out", cut), *steps],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads},
    )
    wait_for_steps(cut, 11)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number, err
        assert "stopped at step" in err
        step = len(read_metrics(cut / "metrics.jsonl"))
        assert (cut / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    assert not (cut / "hf").exists()
    done = len(read_metrics(cut / "metrics.jsonl"))
    assert 11 <= done < 40
    result = pretrain(recipe, data, cut)
    assert result.step == 40
    assert losses(cut) == losses(whole)
    assert result.summary["tokens"] == json.loads((whole / "summary.json").read_text())["tokens"]


# ---- metrics


def test_metrics_are_cut_to_the_step_resumed_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in range(1, 6):
        metrics.add({"step": step, "loss": float(step), "grad_norm": math.inf})
    metrics.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    torn = path.read_bytes()
    path.write_bytes(torn + b"\xff\xfe\n")  # a disk that lost power may hold anything
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    metrics = MetricsFile(path, 3)
    metrics.add({"step": 4, "loss": math.nan})
    metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": s, "loss": float(s), "grad_norm": None} for s in (1, 2, 3)] + [{"step": 4, "loss": None}]
    assert first_and_final_loss(lines) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("count", "want"),
    [(0, (None, None)), (1, (0, 0)), (2, (0, 1)), (9, (1.5, 6.5)), (20, (4.5, 14.5)), (50, (4.5, 44.5))],
)
def test_no_step_is_in_the_first_and_in_the_final_loss(count, want):
    rows = [{"step": step + 1, "loss": float(step)} for step in range(count)]
    assert first_and_final_loss(rows) == want


def test_default_model_is_its_configuration():
    assert Recipe().model == BertConfig()
    assert os.path.basename(RECIPES) == "recipes"
