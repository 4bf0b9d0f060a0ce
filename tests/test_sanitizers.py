"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over every test input of every op.

The instrumented module replaces fastlm._cpu in a separate process, into which the runtimes of the sanitizers are
preloaded. torch's allocations then have guarded borders too.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
CXX = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-DFASTLM_NO_CLONES"]
SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

RUN = """
import importlib.util, sys, torch  # torch first: its OpenMP library serves the module
spec = importlib.util.spec_from_file_location("fastlm._cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["fastlm._cpu"] = module

from fastlm import _native, ops
from fastlm.ops import _registry
from fastlm.testing.cases import CASES
assert _native.cpu() is module
torch.set_num_threads(2)
"""
EVERY_CASE = """
count = 0
for case in CASES.values():
    if "cpu" not in _registry.backends(case.op):
        continue
    for variant in case.tests:
        for dtype in case.dtypes:
            print(case.op, variant, dtype, file=sys.stderr, flush=True)  # the last line before a report
            inputs = case.inputs(variant, 0, dtype)
            outputs = case.run(case.function, variant, inputs, backend="cpu")
            case.run_backward(inputs, outputs, 0)
            count += 1

module.use_isa("amx-twin")  # attention's code for bfloat16 units; the build has no other of these
for variant in CASES["attention"].tests:
    print("attention, amx-twin", variant, file=sys.stderr, flush=True)
    inputs = CASES["attention"].inputs(variant, 0, torch.bfloat16)
    outputs = CASES["attention"].run(CASES["attention"].function, variant, inputs, backend="cpu")
    CASES["attention"].run_backward(inputs, outputs, 0)
    count += 1

from fastlm.train.adamw import AdamW, total_norm
for n in (0, 1, 15, 17, 63, 65, 2049, 16384, 16385, 40000):
    print("adamw", n, file=sys.stderr, flush=True)
    parameters = [torch.nn.Parameter(torch.ones(n)), torch.nn.Parameter(torch.ones(3))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert total_norm(p.grad for p in parameters).isfinite()
    AdamW(parameters).step()
    count += 1
print("sanitized calls:", count)
"""
PLANTED = """
forward = module.layer_norm_fwd
def planted(**named):
    value = named["{argument}"]
    named["{argument}"] = 1 + (value.data_ptr() if isinstance(value, torch.Tensor) else value)
    forward(**named)
module.layer_norm_fwd = planted
ops.layer_norm(torch.ones(4, 8), torch.ones(8), backend="cpu")
"""


def runtime(library):
    """Path of a library as the compiler finds it, or None."""
    if CXX is None or sys.platform != "linux":
        return None
    path = subprocess.run([CXX, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


# The C++ library comes along, or AddressSanitizer, which looks for it when it starts, would fail at the first throw.
PRELOAD = [runtime(library) for library in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
pytestmark = pytest.mark.skipif(None in PRELOAD, reason=f"{CXX or 'no g++'}: no sanitizer runtimes")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Path of fastlm._cpu, built with the sanitizers."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to build the C++ kernels")
    build = tmp_path_factory.mktemp("sanitized")
    includes = [f"-I{path}" for path in (CSRC, CSRC / "common", pybind11.get_include(), sysconfig.get_path("include"))]

    def compile_source(source):
        target = build / f"{source.parent.name}-{source.stem}.o"
        sanitize = SANITIZE if source.parent.name == "cpu" else []  # the bindings are half of the build's time
        subprocess.run([CXX, *FLAGS, *sanitize, *includes, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    sources = sorted((CSRC / "cpu").glob("*.cpp"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, [*sources, *(CSRC / "bindings_cpu").glob("*.cpp")]))
    module = build / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([CXX, "-shared", "-fsanitize=address,undefined", *objects, "-o", str(module)], check=True)
    return module


def run(module, program):
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(PRELOAD),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(CSRC.parent),
    }
    command = [sys.executable, "-c", RUN + program, str(module)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_every_case(sanitized):
    done = run(sanitized, EVERY_CASE)
    assert done.returncode == 0, done.stderr[-6000:]
    assert int(done.stdout.split(":")[-1]) > 0


@pytest.mark.parametrize(
    ("argument", "report"),
    [
        pytest.param("rows", "AddressSanitizer: heap-buffer-overflow", id="a row too many"),
        pytest.param("weight", "runtime error: load of misaligned address", id="a misaligned weight"),
    ],
)
def test_a_planted_error_is_reported(sanitized, argument, report):
    done = run(sanitized, PLANTED.format(argument=argument))
    assert done.returncode != 0
    assert report in done.stderr, done.stderr[-6000:]
