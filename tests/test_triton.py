"""Every OpCase on backend="triton" without a GPU.

Kernels are compiled for sm_80 and their PTX is executed by tests/ptx, which checks memory, races and barriers.
They also run in float32 on Triton's interpreter, for one seed, since it takes six times as long. It runs in a separate
process, since TRITON_INTERPRET=1 is read when a kernel is defined.
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
# Seeds of each dtype. Five for bfloat16, what one trains in; the others differ in few instructions.
SEEDS = {torch.float32: 1} if INTERPRETED else {torch.float32: 2, torch.bfloat16: 5, torch.float16: 2}
DEVICE = nullcontext if INTERPRETED else ptx.triton_on_ptx
HAVE = [case for case in CASES.values() if "triton" in _registry.backends(case.op)]
# What compiles for seconds is tested in float16, which differs from bfloat16 in one cast, where it has dropout alone:
# that only adds to a kernel, and attention's variants with it reach every kernel and all of its loops.
FLOAT16 = {"attention": "dropout_p"}
EVERY = [pytest.param(case, variant, id=f"{case.op}-{variant}") for case in HAVE for variant in case.tests]


@pytest.mark.parametrize("dtype", SEEDS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_error_bound(case, variant, dtype):
    if dtype not in case.dtypes and dtype != torch.float16:
        pytest.skip(f"{case.op} is tested in {case.dtypes}")
    if dtype == torch.float16 and case.op in FLOAT16 and FLOAT16[case.op] not in variant.options:
        pytest.skip("float16 is tested with dropout")
    checks.error_bound(case, variant, dtype, "cpu", ["triton"], range(SEEDS[dtype]), DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="of the host's code, and the same in both")
@pytest.mark.parametrize(
    "check", [checks.non_contiguous, checks.deterministic, checks.opcheck], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_check(check, case, variant):
    check(case, variant, torch.bfloat16, "cpu", "triton", around=DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="of the host's code, and the same in both")
@pytest.mark.parametrize("case", HAVE, ids=lambda case: case.op)
def test_compile(case):
    checks.compiles(case, case.tests[0], torch.bfloat16, "cpu", "triton", around=DEVICE)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_error_bound_through_tritons_interpreter():
    """The first test above, in a process where Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
