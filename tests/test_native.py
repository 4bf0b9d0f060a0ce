"""The compiled modules in a process: one OpenMP pool, torch's; no hang after a fork; the reasons of dispatch."""

import contextlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastlm import _native, ops
from fastlm.ops import _registry
from fastlm.testing.cases import CASES

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
built = pytest.mark.skipif(_native.missing_cpu() is not None, reason=str(_native.missing_cpu()))


def fresh(program, **environment):
    """Runs a program in a process of its own; what it printed last, from JSON. A hang is killed, and fails."""
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


EVERY_OP = """
import json, os, sys, time, torch
from fastlm import _native
from fastlm.ops import _registry
from fastlm.testing.cases import CASES

def elements(inputs):
    return sum(x.numel() for x in inputs.values() if isinstance(x, torch.Tensor))

torch.set_num_threads(2)
CALLS = []  # every op that has CPU kernels, on the largest of its tests' inputs
for case in CASES.values():
    if "cpu" in _registry.backends(case.op):
        made = [(variant, case.inputs(variant, 0, torch.float32)) for variant in case.tests]
        CALLS.append((case, *max(made, key=lambda pair: elements(pair[1]))))

def call_every_op():
    for case, variant, inputs in CALLS:
        outputs = case.run(case.function, variant, inputs, backend="cpu")
        case.run_backward(inputs, outputs, 0)
    return len(CALLS)
"""


@linux
@built
def test_one_openmp_runtime():
    """After torch's pool and ours have both worked, one OpenMP library is mapped."""
    program = (
        EVERY_OP
        + """
torch.rand(2048, 2048).exp_().sum()
call_every_op()
print(json.dumps(_native.openmp_libraries()))
"""
    )
    libraries = fresh(program)
    assert len(libraries) == 1, libraries


@linux
@built
def test_forked_worker_finishes():
    """A forked child whose kernels are told to use two threads, when the pool that the parent started is gone.

    torch's own regions would hang there, so the child sets torch to one thread, as a DataLoader's worker does.
    """
    program = (
        EVERY_OP
        + """
calls = call_every_op()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    _native.threads = lambda: 2
    os._exit(0 if call_every_op() == calls else 1)
_, status = os.waitpid(pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), calls]))
"""
    )
    code, calls = fresh(program)
    assert code == 0
    assert calls > 0


@linux
@built
def test_thread_count_is_torchs():
    """With torch on one thread no other thread of the process works for a kernel; with two, one does."""
    program = (
        EVERY_OP
        + """
def others_ns():
    me = str(os.getpid())
    tasks = [task for task in os.listdir("/proc/self/task") if task != me]
    return sum(int(open(f"/proc/self/task/{task}/schedstat").read().split()[0]) for task in tasks)

spent = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    time.sleep(0.2)  # a pool's thread spins for a while after its last work
    before = others_ns()
    for _ in range(3):
        call_every_op()
    spent.append(others_ns() - before)
print(json.dumps(spent))
"""
    )
    one, two = fresh(program)
    assert one == 0
    assert two > 0


CALLS = [
    pytest.param(case, backend, id=f"{case.op}-{backend}")
    for case in CASES.values()
    for backend in ("cpu", "triton", "cuda", "sdpa", "flash_attn", "apex", "nonsense")
]


@pytest.mark.parametrize(("case", "backend"), CALLS)
def test_explicit_backend_never_falls_back(case, backend):
    """A backend that cannot run is refused with the reason and the remedy; "auto" runs all the same."""
    inputs = case.inputs(case.tests[0], 0, torch.float64 if backend == "cpu" else torch.float32)
    dtypes = [x.dtype for x in inputs.values() if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]
    if (reason := _registry.reason(case.op, backend, "cpu", dtypes[0] if dtypes else None)) is None:
        assert backend in _registry.backends(case.op)
        return
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        case.run(case.function, case.tests[0], inputs, backend=backend)
    assert f'backend="{backend}" cannot run {case.op} here' in str(error.value)
    assert 'Use backend="auto"' in str(error.value)
    case.run(case.function, case.tests[0], inputs, backend="auto")


def test_triton_launches_on_the_device_of_its_tensors(monkeypatch):
    """An implementation in Triton finds the device of its first argument current; afterwards it is what it was."""
    current, switches, seen = [0], [], []

    @contextlib.contextmanager
    def device(x):
        before, current[0] = current[0], x.index
        switches.append(x.index)
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    run = _registry._on_its_device(lambda args: seen.append((current[0], args[1])))
    on = {name: SimpleNamespace(device=torch.device(name)) for name in ("cuda:0", "cuda:1")}
    run((on["cuda:0"], "a"))
    run((on["cuda:1"], "b"))
    run(((on["cuda:1"], 0), "c"))  # a group of arguments
    assert (seen, switches, current) == ([(0, "a"), (1, "b"), (1, "c")], [1, 1], [0])
    monkeypatch.setattr(torch.cuda, "current_device", None)  # an interpreter's tensors ask for no device
    run((torch.zeros(1), "d"))
    assert seen[-1] == (0, "d")


def test_triton_implementations_take_a_tensor_first():
    """Whose device is the one to launch on."""
    for name in _registry._raw:
        first = getattr(torch.ops.fastlm, name).default._schema.arguments[0]
        assert str(first.type) == "Tensor", name


def test_a_missing_module_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(_native, "_cpu_error", ImportError("no module"))
    with pytest.raises(ValueError, match=r"fastlm\._cpu is not built \(no module\); run `pip install \.`"):
        ops.layer_norm(torch.zeros(1, 4), backend="cpu")


def test_cuda_module_imports_without_a_gpu():
    """Where _cuda is built, it loads with no device in sight, and says why it cannot run."""
    pytest.importorskip("fastlm._cuda", reason="built without nvcc")
    program = """
import json
from fastlm import _cuda, _native
print(json.dumps([_native.missing_cuda(), _cuda.architectures()]))
"""
    reason, architectures = fresh(program, CUDA_VISIBLE_DEVICES="")
    assert reason.startswith(("no usable CUDA device", "there is no CUDA device"))
    assert architectures


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        (80, "800,900,1000", True),
        (89, "800,900,1000", True),  # machine code of the same major version
        (120, "800,900,1000", True),  # PTX of sm_100
        (75, "800,900,1000", False),
        (80, "860,900", False),
        (80, "900", False),
        (90, "900", True),
    ],
)
def test_cuda_is_offered_where_its_build_has_code_for_the_device(capability, built, runs, monkeypatch):
    device = SimpleNamespace(name="a GPU", capability=capability)
    module = SimpleNamespace(devices=lambda: [device], architectures=lambda: built)
    monkeypatch.setattr(_native, "_cuda", lambda: (module, None))
    reason = _native.missing_cuda.__wrapped__()
    assert (reason is None) == runs
    if not runs:
        assert f"a GPU is sm_{capability}; build fastlm with FASTLM_CUDA_ARCHS={capability}" in reason
