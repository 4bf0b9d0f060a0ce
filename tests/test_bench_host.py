"""benchmarks/bench_host.py: every contender runs with its launches left out, and the table and JSON say so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm import _native, ops

ROOT = Path(__file__).parent.parent


def test_every_op_is_timed(tmp_path):
    command = [
        sys.executable,
        "benchmarks/bench_host.py",
        "--rounds",
        "1",
        "--calls",
        "1",
        "--json",
        tmp_path / "host.json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    backends = [word for name in ("cuda", "cpu") for word in ("--backend", name)]
    done = subprocess.run([*command, *backends], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "host.json").read_text())
    assert report["provenance"]["rounds"] == 1
    assert all(row["us"] > 0 for row in report["rows"])
    timed = {(row["op"], row["pass"]) for row in report["rows"] if row["contender"] == "fastlm cpu"}
    assert {op for op, _ in timed} == {"layer_norm", "rms_norm", "gelu", "cross_entropy", "mlm_mask"}
    assert ("layer_norm", "fwd+bwd") in timed
    assert len({len(line) for line in done.stdout.splitlines() if line.startswith(("us,", "gelu,", "rms_norm,"))}) == 1
    if _native.cuda() is None:
        assert "cuda is left out" in done.stdout
    else:
        assert "goal of layer_norm, fwd on cuda: 15 us" in done.stdout


@pytest.mark.skipif(_native.cuda() is None, reason="fastlm._cuda is not built")
def test_dropped_launches_run_nothing_and_end():
    x = torch.randn(3, 8)
    _native.drop_cuda_launches(True)
    try:
        assert ops.layer_norm(x, backend="cuda").shape == x.shape
    finally:
        _native.drop_cuda_launches(False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='backend="cuda" cannot run'):
            ops.layer_norm(x, backend="cuda")
