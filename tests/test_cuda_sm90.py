"""csrc/cuda/sm90 without a GPU: the host code runs unchanged, and the PTX of sm_90a is executed.

Every day a few variants are drawn by a seed, which a failure prints; `make test-all` has them all.
"""

import functools
import os
import random
import re
import time
from contextlib import contextmanager
from unittest import mock

import ptx
import pytest
import test_cuda
import torch
from attention_checks import LAYOUTS, LONG, WRONG, dropout_bits_are_the_cpus, padding_has_no_influence, wrong_offsets

from fastlm import _native, ops
from fastlm.testing import checks
from fastlm.testing.cases import CASES, Variant

pytestmark = test_cuda.pytestmark
CASE = CASES["attention"]
DTYPES = (torch.bfloat16, torch.float16)
FORWARD = test_cuda.CSRC / "cuda" / "sm90" / "attention_fwd.cu"
# The same in all processes of a run: what they collect must be the same.
SEED = os.environ.get("FASTLM_TEST_SEED") or os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(time.time_ns())


@functools.cache
def forward() -> str:
    return ptx.compile_cuda(FORWARD, includes=test_cuda.INCLUDES, arch="90a")


@functools.cache
def kernels() -> str:
    """The PTX of attention: forward for sm_90a, backward for sm_80."""
    files = [test_cuda.CSRC / "cuda" / f"attention_{part}.cu" for part in ("bwd", "dkdv", "dq")]
    return "\n".join([forward(), *(ptx.compile_cuda(file, includes=test_cuda.INCLUDES) for file in files)])


@contextmanager
def hopper(text=kernels, **options):
    """What test_cuda.device is for sm_80."""
    with mock.patch.object(_native, "cuda_is_sm90", lambda place: True), test_cuda.device(text, **options) as remember:
        yield remember


# Blocks without a mask come first, before and behind the others with a bias; more than two blocks, so that stages are
# used again; two groups of queries and a part of a third.
MORE = (
    *LONG,
    Variant({"h": 2, "kv": 1, "d": 64, "lengths": (30, 300, 0, 140)}, {"causal": True}),
    Variant({"b": 1, "s": 150, "sk": 450, "h": 1, "d": 128}),
    Variant({"b": 2, "s": 70, "sk": 520, "h": 1, "d": 64, "padding": "both"}, {"dropout_p": 0.1}),
    Variant({"b": 1, "s": 300, "sk": 270, "h": 1, "d": 96, "padding": "holes"}, {"window_size": (-1, 90)}),
    Variant({"h": 1, "d": 72, "lengths": (20, 290), "buckets": 8}, {"max_distance": 9, "dropout_p": 0.1}),
    Variant({"b": 1, "s": 300, "h": 1, "d": 24}, {"softcap": 2.0, "causal": True, "dropout_p": 0.6}),
)


def taken(variant):
    shape = variant.shape
    keys = shape.get("sk", shape.get("s", 1))
    return shape["d"] % 8 == 0 and shape["d"] <= 128 and keys > 0 and shape.get("s", 1) > 0 and "cache" not in shape


def drawn():
    """Parameters (variant, dtype); all but three are marked long."""
    choices = [(v, dtype) for v in (*CASE.tests, *MORE) for dtype in DTYPES if taken(v)]
    daily = random.Random(SEED).sample(choices, 3)
    for variant, dtype in choices:
        marks = () if (variant, dtype) in daily else pytest.mark.long
        yield pytest.param(variant, dtype, id=f"{variant}-{str(dtype).removeprefix('torch.')}", marks=marks)


@pytest.mark.parametrize(("variant", "dtype"), list(drawn()))
def test_error_bound(variant, dtype):
    """Forward by the kernel for sm_90a, and backward, by that for sm_80, of what it left."""
    print(f"FASTLM_TEST_SEED={SEED}")
    checks.error_bound(CASE, variant, dtype, "cpu", ["cuda"], range(1), hopper)


@pytest.mark.long
@pytest.mark.parametrize("chip", ["high", "low", "scattered"])
@pytest.mark.parametrize("variant", MORE[-6:], ids=str)
def test_error_bound_with_a_chips_arithmetic(variant, chip):
    around = functools.partial(hopper, chip=chip)
    checks.error_bound(CASE, variant, torch.bfloat16, "cpu", ["cuda"], range(1), around)


def test_padding_has_no_influence():
    """TMA brings padding: v's is set to 0 in shared memory."""
    padding_has_no_influence("cuda", hopper)


@pytest.mark.long
@pytest.mark.parametrize(("layout", "causal"), LAYOUTS)
def test_dropout_bits_are_the_cpus(layout, causal):
    dropout_bits_are_the_cpus(layout, causal, "cuda", hopper)


@pytest.mark.parametrize(
    "name", [name if name == "far off" else pytest.param(name, marks=pytest.mark.long) for name in WRONG]
)
def test_wrong_offsets(name):
    offsets_q, offsets_k = WRONG[name]
    wrong_offsets("cuda", hopper, offsets_q, offsets_k or offsets_q, causal=True, dropout_p=0.1)


@pytest.mark.long
@pytest.mark.parametrize("check", [checks.non_contiguous, checks.deterministic], ids=lambda f: f.__name__)
@pytest.mark.parametrize("variant", [v for v in CASE.kinds() if taken(v)], ids=str)
def test_check(check, variant):
    check(CASE, variant, torch.bfloat16, "cpu", "cuda", around=hopper)


def launched(q, k=None, **options):
    """The kernels of a forward pass, none of which runs."""
    found = []
    _native.record_cuda(lambda entry, *_: found.append(entry))
    try:
        with mock.patch.object(_native, "cuda_is_sm90", lambda place: True):
            ops.attention(q, *[q if k is None else k] * 2, backend="cuda", **options)
    finally:
        _native.record_cuda(None)
    return found


def test_what_the_kernel_takes():
    """All else runs the kernels for sm_80, and on another device all does."""

    def is_sm90(x, **options):
        (entry,) = launched(x, **options)
        return "4sm90" in entry  # its namespace

    x = torch.zeros(2, 20, 3, 64, dtype=torch.bfloat16)
    assert is_sm90(x)
    assert is_sm90(x.half(), causal=True, softcap=3.0)
    assert is_sm90(x[..., :8])
    assert is_sm90(x[..., 1:33])  # not on 16 bytes: copied
    assert is_sm90(x[:, :, :1].expand(2, 20, 4, 64))  # TMA takes no stride of 0: copied
    assert is_sm90(torch.zeros(2, 20, 2, 128).bfloat16())
    assert not is_sm90(x.float())
    assert not is_sm90(x[..., :33])
    assert not is_sm90(torch.zeros(2, 20, 2, 136).bfloat16())
    assert not is_sm90(x, k=x[:, :0])
    with mock.patch.object(_native, "_sm90_devices", lambda: (False, True)):
        assert not _native.cuda_is_sm90(_native.Place(0, 0))
        assert _native.cuda_is_sm90(_native.Place(1, 0))
        _native.record_cuda(lambda *_: None)
        try:
            assert not _native.cuda_is_sm90(_native.Place(1, 0))
        finally:
            _native.record_cuda(None)
    with pytest.raises(ValueError, match="attention_fwd_sm90: expected 16 bits, d of 8 to 128 and some keys, got d 33"):
        with mock.patch("fastlm.ops._cuda.attention._takes_sm90", lambda args, place: True):
            launched(x[..., :33])


# ---- planted faults: (kind, pattern, which, what takes its place, what the finding says) ---------------------------
# In the kernel with all features, of heads of 64. Waits, in the order of the code: see `bring`, `clean`, `compute`.

FAULTS = {}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name):
    kind, pattern, which, instead, message = FAULTS[name]
    text = forward()
    found = list(re.finditer(pattern, text))[which]
    text = text[: found.start()] + found.expand(instead) + text[found.end() :]
    x = torch.randn(1, 300, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with pytest.raises(ptx.KernelFault) as caught, hopper(lambda: text):
        ops.attention(x, x, x, backend="cuda")
    (finding,) = caught.value.findings
    print(finding)
    assert finding.kind == kind
    assert message in finding.message
