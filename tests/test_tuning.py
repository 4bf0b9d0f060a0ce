"""Tables of kernel configurations, and `fastlm tune` with a fake clock."""

import json

import ptx
import pytest
import torch
from typer.testing import CliRunner

from fastlm import cli
from fastlm.bench import tune
from fastlm.kernels import layer_norm, tuning
from fastlm.testing.cases import CASES, Variant

GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    yield tmp_path
    tuning.forget()


@pytest.fixture
def gpu(monkeypatch):
    """torch says that there are two, and the first one is current; returns what makes the other one so."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: (GPU, "NVIDIA L4")[current[0]])
    return lambda index: current.__setitem__(0, index)


def write(configurations):
    path = tuning.user_directory() / tuning.file_name(GPU)
    tune.write_table(path, GPU, configurations)
    return path


def test_a_table_goes_ahead_of_the_rule(gpu):
    rule = layer_norm.config(768, backward=False)
    assert (rule.block_n, rule.long) == (1024, False)
    write({"layer_norm_fwd": {"1024": {"block_m": 1, "num_warps": 8}}})
    assert layer_norm.config(768, backward=False) == layer_norm.Config(1, 1024, 8)
    assert layer_norm.config(1000, backward=False) == layer_norm.Config(1, 1024, 8)
    assert layer_norm.config(768, backward=True) == layer_norm._rule(768, backward=True)
    assert layer_norm.config(4096, backward=False).block_n == 4096


def test_two_gpus_of_a_process_have_a_table_each(gpu):
    write({"layer_norm_fwd": {"1024": {"block_m": 1}}})
    for device, block_m in ((0, 1), (1, 2), (0, 1)):
        gpu(device)
        assert layer_norm.config(768, backward=False).block_m == block_m


def test_tables_are_for_one_gpu_and_are_not_read_without_one():
    write({"layer_norm_fwd": {"1024": {"block_m": 1}}})
    assert layer_norm.config(768, backward=False).block_m == 2


def test_a_table_is_added_to():
    path = write({"gelu_fwd": {"256": {"block_m": 4}}})
    write({"gelu_fwd": {"128": {"block_m": 8}}, "gelu_bwd": {"256": {"block_m": 2}}})
    table = json.loads(path.read_text())
    assert table["gpu"] == GPU
    assert table["configurations"]["gelu_fwd"] == {"256": {"block_m": 4}, "128": {"block_m": 8}}
    assert path.name.startswith("nvidia-h200-triton-3.")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"configurations": {"k": {"1": 3}}}'])
def test_a_damaged_table_is_an_error_that_names_the_file(gpu, content):
    path = write({})
    path.write_text(content)
    with pytest.raises(ValueError, match=r"nvidia-h200.*delete it, or tune again"):
        layer_norm.config(768, backward=False)


def test_a_configuration_of_another_version_is_an_error(gpu):
    write({"layer_norm_fwd": {"1024": {"stages": 3}}})
    with pytest.raises(ValueError, match=r"layer_norm_fwd.*tune again"):
        layer_norm.config(768, backward=False)


def test_tune_keeps_what_is_faster(monkeypatch):
    """Kernels run on the PTX interpreter; the clock says that backward with two warps is fast, and the rest alike."""
    asked, said = [], []

    def clock(function, sets):
        assert sets == 2
        function()
        now = layer_norm.config(40, backward=True)
        asked.append((layer_norm.config(40, backward=False), now))
        return 0.5 if now.num_warps == 2 else 0.99 if now.num_warps == 4 else 1.0

    monkeypatch.setattr(tune.ceilings, "cache_bytes", lambda device: 1000)  # of 1120 bytes of inputs
    variant = Variant({"rows": 5, "cols": 40})
    with ptx.triton_on_ptx():
        found = tune.tune(["layer_norm"], torch.float32, "cpu", clock, lambda case: [variant], said.append)
    assert found.keys() == {"layer_norm_bwd"}
    assert found["layer_norm_bwd"]["64"]["num_warps"] == 2
    forward, backward = map(set, zip(*asked))
    assert forward == {layer_norm._rule(40, False), *layer_norm._others(40, False)}
    assert backward == {layer_norm._rule(40, True), *layer_norm._others(40, True)}
    assert any("2.00×" in line for line in said)
    assert layer_norm.config(40, backward=True).num_warps == 8  # not before the table is written


def test_every_candidate_computes_the_same():
    """What tune may choose is correct: each candidate, against the reference."""
    from fastlm.testing import checks

    variant = Variant({"rows": 9, "cols": 50, "residual": 1}, {"dropout_p": 0.1})
    keys = [("layer_norm_fwd", c) for c in layer_norm._others(50, False)]
    keys += [("layer_norm_bwd", c) for c in layer_norm._others(50, True)]
    assert len(keys) > 10
    for kernel, candidate in keys:
        with tuning.override((kernel, (64,)), candidate):
            checks.error_bound(
                CASES["layer_norm"], variant, torch.bfloat16, "cpu", ["triton"], range(1), ptx.triton_on_ptx
            )


def test_command_without_a_gpu():
    result = CliRunner().invoke(cli.app, ["tune"])
    assert isinstance(result.exception, ValueError)
    assert "expected a CUDA device, found none" in str(result.exception)


def test_unknown_op():
    with pytest.raises(ValueError, match=r"op: expected one with Triton kernels \(.*layer_norm.*got 'linear'"):
        tune.tune(["linear"], torch.bfloat16)
