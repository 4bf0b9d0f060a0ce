"""Every OpCase on backend="triton" without a GPU.

Kernels are compiled for sm_80 and their PTX is executed by tests/ptx, which checks memory, races and barriers.
They also run in float32 on Triton's interpreter, for one seed, since it takes six times as long. It runs in a separate
process, since TRITON_INTERPRET=1 is read when a kernel is defined.
"""

import functools
import importlib
import os
import subprocess
import sys
from contextlib import nullcontext

import ptx
import pytest
import torch
from variants import on_chips, seeds, sweep

from fastlm.kernels import device as device_module
from fastlm.ops import _registry
from fastlm.testing import checks
from fastlm.testing.ahead_of_time import compile_for
from fastlm.testing.cases import CASES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
DEVICE = nullcontext if INTERPRETED else ptx.triton_on_ptx
HAVE = [case for case in CASES.values() if "triton" in _registry.backends(case.op)]
# What compiles for seconds is tested in float16, which differs from bfloat16 in one cast, where it has dropout alone:
# that only adds to a kernel, and attention's variants with it reach every kernel and all of its loops.
FLOAT16 = {"attention": "dropout_p"}


def daily(case, variant, dtype):
    """Every variant in bfloat16, the kinds in float16; in float32 the kinds of attention.

    Triton's interpreter takes a minute for all kinds, which the PTX has executed: it gets the plain one of each op, and
    the last of attention, which is packed, causal, and has a bias and dropout.
    """
    kinds, slow = case.kinds(), case.op in FLOAT16
    if INTERPRETED:
        return variant in ((kinds[0], kinds[-1]) if slow else kinds[:1])
    return dtype == torch.bfloat16 or (dtype == torch.float32 and not slow) or variant in kinds


@pytest.mark.parametrize(("case", "variant", "dtype"), sweep(HAVE, DTYPES, daily))
def test_error_bound(case, variant, dtype, pytestconfig):
    if dtype not in case.dtypes and dtype != torch.float16:
        pytest.skip(f"{case.op} is tested in {case.dtypes}")
    if dtype == torch.float16 and case.op in FLOAT16 and FLOAT16[case.op] not in variant.options:
        pytest.skip("float16 is tested with dropout")
    count = range(1) if INTERPRETED else seeds(pytestconfig, dtype)
    checks.error_bound(case, variant, dtype, "cpu", ["triton"], count, DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter computes with the host's arithmetic")
@pytest.mark.parametrize(("case", "variant", "dtype", "chip"), on_chips(HAVE, DTYPES))
def test_error_bound_with_a_chips_arithmetic(case, variant, dtype, chip, pytestconfig):
    around = functools.partial(DEVICE, chip=chip)
    checks.error_bound(case, variant, dtype, "cpu", ["triton"], seeds(pytestconfig, dtype), around)


@pytest.mark.skipif(INTERPRETED, reason="of the host's code, and the same in both")
@pytest.mark.parametrize(
    "check", [checks.non_contiguous, checks.deterministic, checks.opcheck], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("case", "variant"), sweep(HAVE))
def test_check(check, case, variant):
    check(case, variant, torch.bfloat16, "cpu", "triton", around=DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="of the host's code, and the same in both")
@pytest.mark.parametrize("case", HAVE, ids=lambda case: case.op)
def test_compile(case):
    checks.compiles(case, case.tests[0], torch.bfloat16, "cpu", "triton", around=DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="it compiles")
@pytest.mark.parametrize(("op", "kernels"), [("layer_norm", 1), ("gelu", 1), ("embedding", 2)])
def test_programs_that_loop_are_resident_at_once(op, kernels, monkeypatch):
    """As many as a launcher takes for resident fit a multiprocessor, by their registers and shared memory."""
    module, taken = importlib.import_module(f"fastlm.kernels.{op}"), []

    def resident(num_warps, registers, device):
        taken.append(device_module.resident(num_warps, registers, device) // device_module.multiprocessors(device))
        return taken[-1]

    monkeypatch.setattr(module, "resident", resident)
    case = CASES[op]
    variant = next(v for v in case.production if v.shape["cols"] in (768, 3072) and v.options.get("dropout_p") != 0.5)
    inputs = case.inputs(variant, 0, torch.bfloat16)
    with compile_for(90) as compiled:
        case.everything(case.function, variant, inputs, 0, backend="triton")
    looping = [kernel for kernel in compiled if kernel.name in ("_bwd", "_few_rows")]
    fitting = [kernel.occupancy(kernel.resources()) * 64 / kernel.num_warps for kernel in looping]
    assert len(taken) == len(fitting) == kernels
    assert all(programs <= fit for programs, fit in zip(taken, fitting)), (taken, fitting)
    assert all("cp.async" in kernel.ptx for kernel in looping)  # the next tiles are on their way meanwhile


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_error_bound_through_tritons_interpreter(pytestconfig):
    """The first test above, in a process where Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["--all"] if pytestconfig.getoption("--all") else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
