"""Imports: what a fresh process loads and pays; no floor imports a higher one; no circles."""

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
LOW = {"philox", "storage", "settings", "cpu_rate", "chip", "_native", "_malloc", "_cgroup", "_threads"}
MODELS = LOW | {"ops", "nn", "models", "data"}
RUN = MODELS | {"tasks", "run"}
FLOORS = {
    "philox": set(),
    "storage": set(),
    "settings": set(),
    "terminal": set(),
    "cpu_rate": {"storage"},
    "chip": {"cpu_rate"},
    "cuda_graph": set(),
    "_malloc": set(),
    "_cgroup": set(),
    "_threads": {"_cgroup"},
    "_native": {"_cpu", "_cuda"},
    "kernels": set(),
    "ops": {"philox", "_native", "kernels"},
    "data": {"philox", "storage", "ops"},
    "nn": {"ops"},
    "models": {"storage", "settings", "_cgroup", "ops", "nn"},
    "hf": {"ops", "nn"},
    "testing": RUN | {"train", "hf"},
    "info": LOW | {"ops"},
    "bench": RUN | {"kernels", "train", "generate", "hf", "testing", "info", "cuda_graph"},
    "tasks": MODELS,
    "run": MODELS | {"tasks", "terminal"},
    "train": RUN | {"cuda_graph"},
    "pretrained": MODELS,
    "fill_mask": MODELS | {"pretrained"},
    "evaluate": RUN | {"pretrained"},
    "generate": MODELS | {"cuda_graph"},
    "demo": RUN | {"train", "fill_mask", "generate", "bench", "terminal"},
    "predict": MODELS | {"tasks"},
    "predict_answers": RUN | {"predict"},
    "finetune_cli": RUN | {"train", "terminal", "predict", "predict_answers"},
    "text_cli": RUN | {"terminal", "fill_mask", "evaluate", "generate"},
    "cli": RUN | {"train", "bench", "demo", "info", "terminal", "finetune_cli", "text_cli"},
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


def import_graph():
    """Module -> the modules of fastlm that it imports, at its top or inside a function. No package is implied."""
    modules = {name_of(path).removesuffix(".__init__"): path for path in [*FILES, *KERNELS]}
    graph = {}
    for module, path in modules.items():
        # `from fastlm.ops import gelu` is the module fastlm.ops.gelu where there is one, else a name in fastlm.ops.
        named = {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        graph[module] = sorted(name for name in named if name in modules and name != module)
    return graph


def circles(graph):
    """The strongly connected components of more than one node, each sorted (Tarjan's algorithm)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def test_circles_are_found():
    graph = {"a": ["b"], "b": ["c", "d"], "c": ["b"], "d": ["e"], "e": ["f"], "f": ["d", "g"], "g": []}
    assert circles(graph) == [["b", "c"], ["d", "e", "f"]]


def test_no_import_circles():
    """Imports inside functions count: they hide a circle, and the order of first calls decides whether it shows."""
    graph = import_graph()
    assert "fastlm.hf.attention" in graph["fastlm.hf._swap"]
    assert "fastlm.kernels.tuning" in graph["fastlm.kernels.gelu"]
    assert circles(graph) == []


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
    """Neither triton nor transformers comes with a module other than the kernels and their adapters in ops/_triton;
    fastlm.ops adds little to torch.
    """
    named = [path for path in FILES if path.name != "__main__.py" and path.parent.name != "_triton"]
    modules = [name_of(path).removesuffix(".__init__") for path in named]
    command = [sys.executable, "-c", FRESH, json.dumps(modules)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"import fastlm.ops: {result['seconds'] * 1e3:.0f} ms of CPU time after import torch")
    assert result["heavy"] == {}
    assert result["seconds"] < 2.0
