"""Imports: what a fresh process loads and pays, and that no floor of the house reaches for a higher one."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# fastlm/kernels is kernels/: a link here, a copy in an sdist.
FILES = sorted(path for path in (ROOT / "fastlm").rglob("*.py") if ROOT / "fastlm" / "kernels" not in path.parents)
KERNELS = sorted((ROOT / "kernels").glob("*.py"))

# Part of the package -> the other parts that it may import. DESIGN: nothing imports upwards.
LOW = {"philox", "storage", "_native", "_malloc"}
MODELS = LOW | {"ops", "nn", "models", "data"}
FLOORS = {
    "philox": set(),
    "storage": set(),
    "_malloc": set(),
    "_native": {"_cpu", "_cuda"},
    "kernels": set(),
    "ops": {"philox", "_native", "kernels"},
    "data": {"philox", "storage", "ops"},
    "nn": {"ops"},
    "models": {"storage", "ops", "nn"},
    "hf": {"ops", "nn"},
    "testing": MODELS | {"train", "hf"},
    "info": LOW | {"ops"},
    "bench": MODELS | {"kernels", "train", "hf", "testing", "info"},
    "train": MODELS,
    "finetune": MODELS | {"train"},
    "generate": MODELS,
    "fill_mask": MODELS,
    "demo": MODELS | {"train", "info", "fill_mask", "bench"},
    "cli": MODELS | {"train", "finetune", "generate", "fill_mask", "bench", "demo", "info", "hf"},
    "__main__": {"cli"},
    "__init__": set(),
}


def name_of(path):
    """ "fastlm.ops.gelu" of its file; kernels/<op>.py is fastlm.kernels.<op>."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "fastlm" else ("fastlm", *parts))


def imports(path):
    """Full names of everything that a file imports, at its top or inside a function."""
    package = name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [*FILES, *KERNELS], ids=name_of)
def test_floors(path):
    part = name_of(path).split(".")[1]
    assert part in FLOORS, f"fastlm.{part} is new: say in FLOORS what it may import"
    for name in imports(path):
        if name.startswith("fastlm."):
            other = name.split(".")[1]
            if other != part and other in FLOORS:
                assert other in FLOORS[part], f"fastlm.{part} may not import {name}"
        elif name == "fastlm":
            assert part not in ("kernels", "ops", "nn", "data"), f"{path.name} imports the whole of fastlm"


FRESH = """
import importlib, json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import fastlm.ops
seconds = time.process_time() - start
heavy = {}
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    for package in ("triton", "transformers"):
        if package in sys.modules and package not in before:
            heavy.setdefault(package, name)
print(json.dumps({"seconds": seconds, "heavy": heavy}))
"""


def test_imports_stay_light():
    """Neither triton nor transformers comes with any module but the kernels; fastlm.ops adds little to torch."""
    modules = [name_of(path).removesuffix(".__init__") for path in FILES if path.name != "__main__.py"]
    command = [sys.executable, "-c", FRESH, json.dumps(modules)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"import fastlm.ops: {result['seconds'] * 1e3:.0f} ms of CPU time after import torch")
    assert result["heavy"] == {}
    assert result["seconds"] < 2.0
