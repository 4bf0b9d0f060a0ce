"""fastlm/bench/optimizers.py: rows of every contender, apex by stand-ins, what is wrong or missing is named."""

import dataclasses
import json
import sys
from types import ModuleType

import pytest
import torch
from fake_clock import FakeClock

from fastlm.bench import ceilings, optimizers


class Clock(FakeClock):
    """Every look at it takes a millisecond."""

    def now(self):
        self.advance(1)
        return self.seconds


class FusedAdam(torch.optim.AdamW):
    """apex's signature."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        use_master=False,
    ):
        assert bias_correction
        assert adam_w_mode
        super().__init__(params, lr, betas, eps, weight_decay)


class FusedLAMB(torch.optim.Optimizer):
    """apex's signature and meaning: the norm of all gradients is clipped, and a gradient is left as the update."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        amsgrad=False,
        adam_w_mode=True,
        grad_averaging=True,
        set_grad_none=True,
        max_grad_norm=1.0,
        use_nvlamb=False,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.max_grad_norm, self.ratios = max_grad_norm, not use_nvlamb

    @torch.no_grad()
    def step(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        clip = max(1.0, torch.nn.utils.get_total_norm(gradients).item() / self.max_grad_norm)
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                state, (beta1, beta2) = self.state[p], group["betas"]
                m, v = state.setdefault("m", torch.zeros_like(p)), state.setdefault("v", torch.zeros_like(p))
                g = p.grad / clip
                m.mul_(beta1).add_((1 - beta1) * g)
                v.mul_(beta2).add_((1 - beta2) * g * g)
                scaled_m, scaled_v = m / (1 - beta1 ** group["step"]), v / (1 - beta2 ** group["step"])
                p.grad.copy_(scaled_m / (scaled_v.sqrt() + group["eps"]) + group["weight_decay"] * p)
                ratio = p.norm() / p.grad.norm() if group["weight_decay"] and self.ratios else 1.0
                p.sub_(group["lr"] * ratio * p.grad)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "_LARGE_COPY", 1 << 12)
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 32)
    shape = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(optimizers.MODELS, "tiny", shape | {"intermediate_size": 48})
    for name in ("adamw", "lamb"):  # so that the stand-ins run here
        peers = optimizers.OPTIMIZERS[name]
        monkeypatch.setitem(peers, "apex", dataclasses.replace(peers["apex"], cuda=False))


@pytest.fixture
def apex(monkeypatch):
    module = ModuleType("apex.optimizers")
    module.FusedAdam, module.FusedLAMB = FusedAdam, FusedLAMB
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    return module


def run(tmp_path, *arguments):
    file = tmp_path / "rows.json"
    arguments = ["--model", "tiny", "--rounds", "2", "--min-ms", "1", "--json", str(file), *arguments]
    return optimizers.main(arguments, clock=Clock()), json.loads(file.read_text())


def test_every_contender_has_a_row(apex, tmp_path, capsys):
    status, found = run(tmp_path)
    assert status == 0
    assert found["provenance"]["missing"] == []
    names = [(row["op"], row["contender"]) for row in found["rows"]]
    want = {"adamw": ("eager", "fastlm", "foreach", "fused", "apex"), "lamb": ("fastlm", "apex")}
    want["muon"] = ("eager", "fastlm")
    assert sorted(names) == sorted((op, name) for op, peers in want.items() for name in peers)
    assert {"commit", "cpu", "torch", "time"} <= set(found["provenance"])
    for row in found["rows"]:
        assert row["ms"] == pytest.approx(1.0)
        assert row["timed"] == "host"
        assert row["gbps"] == pytest.approx(
            optimizers.moved_bytes(row["op"], optimizers.shapes("tiny", row["op"])) / 1e6
        )
        assert (row["tflops"] > 0) == (row["op"] == "muon")
    printed = capsys.readouterr().out
    assert "x  1.00 of" in printed
    assert [beside["copy_gbps"] for beside in found["provenance"]["ceilings"]] == [pytest.approx((2 << 12) / 1e6)] * 3


def test_what_is_wrong_is_named(apex, tmp_path, monkeypatch):
    monkeypatch.setattr(apex, "FusedLAMB", lambda groups, max_grad_norm, **given: FusedLAMB(groups, **given))
    status, found = run(tmp_path, "--optimizer", "lamb")
    assert status == 1
    assert [row["contender"] for row in found["rows"]] == ["fastlm"]
    (missing,) = found["provenance"]["missing"]
    assert missing["contender"] == "apex"
    assert missing["reason"].startswith("WRONG: the change of tensor ")


def test_what_is_missing_is_named(tmp_path):
    status, found = run(tmp_path, "--optimizer", "lamb,adamw", "--vs", "apex,fused")
    assert status == 0
    assert [row["contender"] for row in found["rows"]] == ["fastlm", "fastlm", "fused"]
    assert {one["reason"] for one in found["provenance"]["missing"]} == {"apex is not installed"}


def test_apex_needs_a_device(monkeypatch):
    monkeypatch.undo()
    make = optimizers.contenders("adamw", torch.device("cpu"), ("apex",))["apex"]
    with pytest.raises(ValueError, match="needs a CUDA device"):
        make([], 1e-3)
    with pytest.raises(ValueError, match="a run takes torch's fused AdamW on a device"):
        optimizers.contenders("adamw", torch.device("cuda"), ())["fastlm"]([], 1e-3)


def test_a_fused_projection_is_three_matrices_to_torch():
    """Of BERT-base: 12 projections of q, k and v, with 3 square parts, 3 other matrices a layer, and the head's."""
    own = optimizers.shapes("bert-base", "muon")
    assert sorted({(shape.size, shape.parts) for shape in own}) == [
        ((768, 768), 1),
        ((768, 3072), 1),
        ((2304, 768), 3),
        ((3072, 768), 1),
    ]
    square, long = 5 * 2 * 3 * 768**3, 5 * 2 * (2 * 768 * 768 * 3072 + 768**3)
    assert optimizers.flops("muon", own) == 12 * (4 * square + 2 * long) + square
    assert optimizers.flops("adamw", optimizers.shapes("bert-base", "adamw")) == 0.0
    running = optimizers.Running(lambda groups, lr: groups, own[:1], torch.device("cpu"), split=True)
    assert [len(pieces) for pieces in running.parameters] == [own[0].parts]
