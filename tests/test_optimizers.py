"""Muon, LAMB, their groups of parameters, schedules, and runs with them. (AdamW: test_adamw.py)"""

import shutil
from itertools import pairwise

import pytest
import torch
from training import corpus, small

from fastlm.data import prepare
from fastlm.models import GPT2, T5, GPT2Config, T5Config
from fastlm.ops._low_weights import LowWeights, low_copy
from fastlm.run.metrics import read_metrics
from fastlm.tasks import TrainTable
from fastlm.train import muon as muons
from fastlm.train import pretrain
from fastlm.train.lamb import LAMB
from fastlm.train.muon import Muon, orthogonalize
from fastlm.train.optimizer import lr_at, make_optimizer, parameter_groups


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare(corpus(directory / "corpus.txt"), "train:200", directory / "rows", row_tokens=32, documents="line")
    return directory / "rows"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_orthogonalize(dtype):
    torch.manual_seed(0)
    for shape in ((40, 24), (24, 40), (3, 16, 16)):
        x = torch.randn(shape)
        out = orthogonalize(x, dtype)
        singular = torch.linalg.svdvals(out)
        assert singular.min() > 0.6
        assert singular.max() < 1.25
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        similarity = (out * (u @ v)).sum((-2, -1)) / (out.norm(dim=(-2, -1)) * (u @ v).norm(dim=(-2, -1)))
        assert similarity.min() > 0.97
    assert orthogonalize(torch.zeros(4, 4), dtype).eq(0).all()


def test_muon_is_torchs():
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(24, 40))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    muon = Muon([ours], **settings)
    reference = torch.optim.Muon([theirs], nesterov=True, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(5):
        gradient = torch.randn(24, 40)
        muon.grad_scale, muon.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        ours.grad, theirs.grad = gradient * 4, gradient.clone()
        muon.step()
        reference.step()
        # torch's iterates in bfloat16, whose steps differ by some hundredths, and keeps (1 - μ) of the gradient
        drift = (ours - theirs).abs().max() / (step + 1)
        assert drift < 0.05 * 0.02 * 0.2 * 40**0.5


def test_muon_refuses_float16():
    with pytest.raises(ValueError, match="dtype: expected None, float32 or bfloat16, got float16"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], dtype=torch.float16)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_muon_by_passes_is_muon(dtype, monkeypatch):
    """csrc/cpu/muon.cpp beside plain torch, of matrices that lie by rows and by columns; it writes bfloat16 copies."""
    found = []
    for passes in (True, False):
        if not passes:
            monkeypatch.setattr(muons, "takes", lambda parameters: False)
        torch.manual_seed(0)
        w = [torch.nn.Parameter(x) for x in (torch.randn(48, 20), torch.randn(20, 48).t(), torch.randn(300, 200))]
        optimizer, low = Muon([{"params": w, "parts": 2}], lr=0.02, weight_decay=0.1, dtype=dtype), LowWeights(w)
        optimizer.low_weights, optimizer.grad_scale = low, torch.tensor(1.3)
        with low.fresh(torch.bfloat16):
            copies = [low_copy(p, torch.bfloat16) for p in w]
        for _ in range(3):
            for p in w:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        assert torch.equal(copies[0], w[0].bfloat16()) == passes
        with low.fresh(torch.bfloat16):
            assert all(map(torch.equal, copies, (p.bfloat16() for p in w)))
        found.append([*w, *(optimizer.state[p]["momentum"] for p in w)])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5 if dtype is None else 1e-3)


def test_fused_projections_are_orthogonalized_apart():
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(36, 12))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    whole.grad = torch.randn(36, 12)
    for part, gradient in zip(parts, whole.grad.chunk(3)):
        part.grad = gradient.clone()
    Muon([{"params": [whole], "parts": 3}], lr=0.1).step()
    Muon(parts, lr=0.1).step()
    torch.testing.assert_close(whole, torch.cat(parts))
    with pytest.raises(ValueError, match=r"params: expected matrices whose rows 5 parts divide, got \(36, 12\)"):
        Muon([{"params": [whole], "parts": 5}])
    with pytest.raises(ValueError, match=r"params: expected matrices .* got \(3,\); give others to AdamW"):
        Muon([torch.nn.Parameter(torch.ones(3))])


def test_lamb_is_its_formula():
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(7))
    optimizer = LAMB([{"params": [w], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}], lr=0.02, eps=1e-6)
    expected = [p.detach().double() for p in (w, b)]
    m, v = [torch.zeros_like(p) for p in expected], [torch.zeros_like(p) for p in expected]
    for t in range(1, 6):
        for i, (p, decay) in enumerate(((w, 0.1), (b, 0.0))):
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            r = (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-6) + decay * expected[i]
            ratio = expected[i].norm() / r.norm() if decay else 1.0
            expected[i] = expected[i] - 0.02 * ratio * r
        optimizer.step()
    for p, q in zip((w, b), expected):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "lamb"])
def test_a_step_that_is_not_finite_changes_nothing(name):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    optimizer = make_optimizer(model, TrainTable(optimizer=name))
    for found in (0.0, 1.0):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * (torch.nan if found else 1.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found)
        before = [p.detach().clone() for p in model.parameters()]
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters() if found]
        optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters())]
        assert all(same) if found else not any(same)
    for p, state in zip(model.parameters(), states):
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())


def test_groups_are_complete_and_by_rule():
    for model in (
        GPT2(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
        T5(
            T5Config(
                vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
            )
        ),
    ):
        for name in ("adamw", "muon", "lamb"):
            groups = parameter_groups(model, TrainTable(optimizer=name))
            assert sorted(id(p) for g in groups for p in g.parameters) == sorted(map(id, model.parameters()))
            assert all((g.weight_decay > 0) == (p.dim() > 1) for g in groups for p in g.parameters)
        muon = [g for g in parameter_groups(model, TrainTable(optimizer="muon")) if g.optimizer == "muon"]
        parts = {
            name: g.parts for g in muon for name, p in model.named_parameters() if any(p is q for q in g.parameters)
        }
        assert {name for name, count in parts.items() if count == 3} == {n for n in parts if n.endswith("qkv.weight")}
        assert not any("word" in name or "position" in name or "relative" in name for name in parts)
        if isinstance(model, T5):
            twos = {name for name, count in parts.items() if count == 2}
            assert twos == {n for n in parts if n.endswith(("cross.kv.weight", "mlp.linear1.weight"))}
    assert str(muon[0]).startswith("muon: ")


def test_wsd():
    table = TrainTable(schedule="wsd", lr=1.0, warmup_steps=10, max_steps=100, decay_share=0.2, final_lr=0.1)
    rates = [lr_at(step, table) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert all(a > b for a, b in pairwise(rates[80:]))
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 20)


@pytest.mark.parametrize("name", ["muon", "lamb"])
def test_a_run_resumes_exactly(data, tmp_path, name):
    recipe = small(train__optimizer=name, train__weight_decay=0.1)
    pretrain(recipe, data, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for part in ("summary.json", "hf"):
        path = tmp_path / "again" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(sorted((tmp_path / "again" / "checkpoints").iterdir())[-1])
    pretrain(recipe, data, tmp_path / "again")
    runs = [[row["loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("whole", "again")]
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0]
