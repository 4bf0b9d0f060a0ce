"""`pytest --device cuda` runs the device-independent tests on a GPU; the default is the CPU.

`--backend cuda` has the tests of all ops (test_ops.py) take that one backend, and leave out the ops that lack it.
`--all` adds the tests marked long: `make test-all`. A GPU takes seconds for them, so that --device cuda adds them too.
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from fastlm import cpu_rate
from fastlm.storage import replace_json

# What the tests measure of this machine, which others may load meanwhile, is no run's peak. Models stay where they are.
_CACHE = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
os.environ.setdefault("HF_HOME", str(Path(_CACHE, "huggingface")))
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir(), f"fastlm-tests-cache-{os.getuid()}"))


def _plant_rates():
    """Equal rates in both dtypes, for any number of threads: train.dtype = "auto" is float32, and nothing is measured.

    They are larger than what any test measures, which is not kept.
    """
    path = cpu_rate.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = range(1, max(64, os.cpu_count() or 1) + 1)
    rate = cpu_rate.Rate(1e18, 0.0)._asdict()
    replace_json(path, {cpu_rate.key(dtype, n): rate for dtype in cpu_rate.BOTH for n in threads})


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the op and model tests")
    parser.addoption("--all", action="store_true", help="the tests marked long too")
    parser.addoption("--backend", default=None, help="the one backend that test_ops.py takes")


def pytest_configure(config):
    torch.set_num_threads(2)  # what a test asserts about threads must not depend on the machine
    _plant_rates()


def pytest_collection_modifyitems(config, items):
    """Without --all no long ones. With --device cuda, tests that never look at the device would repeat themselves."""
    if config.getoption("--device") == "cuda":
        left = [item for item in items if "device" not in item.fixturenames]
    elif config.getoption("--all"):
        left = []
    else:
        left = [item for item in items if item.get_closest_marker("long")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(scope="session")
def device(request):
    device = request.config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: torch sees no CUDA device")
    return device


@pytest.fixture
def seeded():
    torch.manual_seed(0)
