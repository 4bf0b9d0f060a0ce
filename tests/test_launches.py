"""What a micro-step of BERT-base launches on a GPU, counted without one (launches.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA's device guard: the stand-in for it is of a torch for the CPU")
    root, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("device") / "absent_device.so"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root}/include", HERE / "absent_device.cpp"]
    command += ["-o", library, f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
    subprocess.run(command, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-W", "ignore", HERE / "launches.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_launches_of_a_step(counted):
    """The bounds are what was counted. With torch.nn.Linear it was 644: 178 casts, 28 additions, 15 copies, 39 sums."""
    step = counted["step"]
    for name in ("kinds", "names"):
        print(json.dumps(step[name], indent=1))
    assert step["launches"] <= 378
    for kind, most in (("cast", 8), ("copy", 3), ("add", 3), ("sum", 14)):
        assert step["kinds"][kind] <= most
    assert step["names"]["_fused_adamw_"] <= 2
    assert step["names"]["_dkdv"] == 12  # the launchers of the kernels were reached


def test_a_graph_makes_few_calls(counted):
    """The optimizer's, the copies of the inputs, and the cast of the weights; beside the replay."""
    assert counted["graph"]["calls"] + 1 <= counted["step"]["calls"] // 10


@pytest.mark.parametrize("part", ["step", "micro", "graph"])
def test_nothing_waits_for_the_device(part, counted):
    assert counted[part]["waits"] == []


def test_what_is_captured_is_on_the_device(counted):
    """A graph would hold what the host computed at its capture, as a number that no replay changes."""
    assert counted["micro"]["host"] == []
