"""`fastlm profile`: names of layers and ops, written files, and the command lines of Nsight."""

import csv
import json
import os
import stat

import pytest
import torch
from training import SETTINGS

from fastlm.bench import profile as profiler
from fastlm.models import Bert, BertConfig

SMALL = [f"{key}={value}" for key, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """(rows of ops, the directory, what was said) of two small steps."""
    out, said = tmp_path_factory.mktemp("profile"), []
    rows = profiler.profile("bert-mini", out, steps=2, settings=SMALL, vocab_size=100, say=said.append)
    return rows, out, said


def test_ops_are_ours_and_count_a_step(profiled):
    rows, out, _ = profiled
    calls = {row.name: row.calls for row in rows}
    assert calls["fastlm::attention_bwd"] == 2  # layers
    assert calls["fastlm::layer_norm_bwd"] == 5
    assert calls["fastlm::adamw"] == calls["fastlm::squared_norm"] == 1
    assert all(row.self_ms <= row.total_ms + 1e-6 for row in rows)
    with (out / profiler.OPS).open() as file:
        assert {row["name"] for row in csv.DictReader(file)} == calls.keys()


def test_modules_have_ranges_by_their_names(profiled):
    _, out, _ = profiled
    with (out / profiler.MODULES).open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    expected = {
        "embeddings",
        "layers.0",
        "layers.0.norm1",
        "layers.1",
        "layers.0 backward",
        "layers.1 backward",
        "head",
    }
    assert expected <= rows.keys()
    assert all(float(rows[name]["calls"]) == 1 for name in expected)
    trace = json.loads((out / profiler.TRACE).read_text())["traceEvents"]
    assert {"step 0", "step 1", "layers.1 backward"} <= {event.get("name") for event in trace}
    # A layer's time is its modules'.
    inner = sum(float(row["total_ms"]) for name, row in rows.items() if name in ("layers.0.qkv", "layers.0.mlp"))
    assert float(rows["layers.0"]["total_ms"]) > inner > 0


def test_hooks_are_gone_and_change_nothing():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = Bert(BertConfig(vocab_size=50, **sizes)).eval()
    ids = torch.arange(12).view(2, 6)
    want = torch.autograd.grad(model(ids).sum(), list(model.parameters()), allow_unused=True)
    with profiler.named_ranges(model):
        got = torch.autograd.grad(model(ids).sum(), list(model.parameters()), allow_unused=True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(want, got))
    for module in model.modules():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        assert not any(getattr(module, kind) for kind in kinds)


def test_nsights_command_lines_are_said_with_why_they_do_not_run(profiled):
    _, out, said = profiled
    lines = [text for text in said if isinstance(text, str)]
    nsys = next(line for line in lines if "nsys profile" in line)
    assert "--capture-range=cudaProfilerApi" in nsys
    assert "--cuda-graph-trace=node" in nsys
    assert f"--out {out}" in nsys
    assert nsys.endswith("--inside")
    assert any(line.strip().startswith("not run: the device is cpu") for line in lines)


def test_nsight_runs_where_it_is_installed(tmp_path, monkeypatch):
    """A stand-in on the PATH that writes down its arguments."""
    tool = tmp_path / "ncu"
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    said = []
    profiler._with_nsight("ncu", profiler.command("ncu", tmp_path, ["bert-mini"]), "cuda", said.append)
    arguments = (tmp_path / "arguments").read_text().split()
    assert "--profile-from-start=off" in arguments
    assert arguments[-4:] == ["fastlm", "profile", "bert-mini", "--inside"]
    assert "exit status 0" in said[-1]
    profiler._with_nsight("nsys", profiler.command("nsys", tmp_path, ["bert-mini"]), "cuda", said.append)
    assert "nsys is not installed" in said[-1]


def test_ncu_runs_without_nsys_at_the_clock_of_training(tmp_path, monkeypatch):
    """As on a machine that has ncu alone: few kernels with all sections, and no lock of the clock."""
    tool = tmp_path / "ncu"
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = []
    profiler.profile("bert-mini", tmp_path / "out", device="cuda", tools=("nsys", "ncu"), say=said.append)
    assert any("nsys is not installed" in line for line in said)
    assert "exit status 0" in said[-1]
    arguments = (tmp_path / "arguments").read_text().split()
    assert {"--clock-control=none", "--set=full"} <= set(arguments)
    (count,) = [argument for argument in arguments if argument.startswith("--launch-count=")]
    assert int(count.partition("=")[2]) <= 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": ("perf",)}, "tools: expected of torch, nsys, ncu, got perf"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"recipe": "bert-giant"}, "bert-giant"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        profiler.profile(**{"recipe": "bert-mini", "out": tmp_path / "out", "settings": SMALL, **arguments})
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
