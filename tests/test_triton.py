"""Every OpCase on backend="triton" without a GPU.

bfloat16 is compiled for sm_80 and its PTX executed by tests/ptx, which checks memory, races and barriers on the way.
float32 and float16 go through Triton's own interpreter, in a process of their own: TRITON_INTERPRET=1 decides when a
kernel is defined.
"""

import os
import subprocess
import sys
from contextlib import nullcontext

import ptx
import pytest
import torch

from fastlm.ops import _registry
from fastlm.testing import checks
from fastlm.testing.cases import CASES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.bfloat16,)
DEVICE = nullcontext if INTERPRETED else ptx.triton_on_ptx
HAVE = [case for case in CASES.values() if "triton" in _registry.backends(case.op)]
EVERY = [pytest.param(case, variant, id=f"{case.op}-{variant}") for case in HAVE for variant in case.tests]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_error_bound(case, variant, dtype):
    checks.error_bound(case, variant, dtype, "cpu", ["triton"], around=DEVICE)


@pytest.mark.parametrize(
    "check", [checks.non_contiguous, checks.deterministic, checks.opcheck], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_check(check, case, variant):
    check(case, variant, DTYPES[0], "cpu", "triton", around=DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="of the host's code, and the same in both")
@pytest.mark.parametrize("case", HAVE, ids=lambda case: case.op)
def test_compile(case):
    checks.compiles(case, case.tests[0], DTYPES[0], "cpu", "triton", around=DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_float32_and_float16_through_tritons_interpreter():
    """The tests above, in a process where Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
