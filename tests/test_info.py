"""`fastlm info`: which backends run here, and why the others cannot."""

import json

import torch

from fastlm import _native, cpu_rate, info
from fastlm.ops import _registry


def test_report_names_every_op_and_what_runs_it(monkeypatch):
    monkeypatch.setattr(cpu_rate, "measure", lambda: dict.fromkeys(cpu_rate.BOTH, cpu_rate.Rate(1e9, 0.0)))
    report = info.report()
    table = {line.split()[0]: line.split()[1:] for line in report.splitlines() if line.split()[:1]}
    header = table["on"][1:]
    for op in _registry.ops():
        cells = dict(zip(header, table[op]))
        x = torch.zeros(1)
        assert cells[_registry.choose(op, "auto", x)].startswith("auto")
    assert torch.__version__ in report
    assert "train.dtype   auto is float32, since this CPU multiplies 1 times as fast in bfloat16" in report


def test_a_backend_that_cannot_run_has_its_reason():
    """On a device where the CPU kernels cannot run, each refusal points at a line below the table."""
    lines = info.backends_table("cuda")
    assert "no (1)" in next(line for line in lines if line.startswith("layer_norm"))
    assert "  (1) it runs on the cpu, the input is on cuda" in lines
    assert any(line.startswith("  attention: auto is sdpa on sm_90, for padded 16-bit input") for line in lines)
    rows = (
        '  cross_entropy: backend="cuda" runs cuda\'s cluster kernel (predicted, not measured) on sm_90, for 97281 to'
    )
    assert any(line.startswith(rows) for line in lines)
    long = '  attention: backend="cuda" runs cuda\'s sm90 kernel (predicted, not measured) on sm_90, for 16-bit input'
    assert any(line.startswith(long) for line in lines)
    assert not any("auto is sdpa on" in line for line in info.backends_table("cpu"))


def test_machine_is_json_and_says_what_is_missing():
    machine = json.loads(json.dumps(info.machine()))
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert info.version("no-such-package") is None


def test_on_a_gpu_without_triton_the_cuda_kernels_are_next(monkeypatch):
    monkeypatch.setattr(_native, "missing_cuda", lambda: None)
    has_both = [op for op in _registry.ops() if {"triton", "cuda"} <= set(_registry.backends(op)) and op != "attention"]
    assert {"layer_norm", "rms_norm", "cross_entropy", "linear_cross_entropy", "mlm_mask"} <= set(has_both)
    for installed, name in ((True, "triton"), (False, "cuda")):
        monkeypatch.setattr(_registry, "_triton_installed", lambda installed=installed: installed)
        assert {info._auto(op, "cuda", torch.bfloat16) for op in has_both} == {name}
    monkeypatch.setattr(_native, "missing_cuda", lambda: "no")
    assert info._auto("layer_norm", "cuda", torch.bfloat16) == "reference"
