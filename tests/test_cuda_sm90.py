"""csrc/cuda/sm90 without a GPU: the host code runs unchanged, and the PTX of sm_90a is executed.

Every day two small variants are drawn by a seed, which a failure prints; `make test-all` has them all.
"""

import functools
import math
import os
import random
import re
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import ptx
import pytest
import test_cuda
import torch
from attention_checks import LONG, WRONG, padding_has_no_influence, wrong_offsets
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm import _native, ops
from fastlm.bench import sass
from fastlm.ops import _preferences, _registry
from fastlm.testing import checks
from fastlm.testing.ahead_of_time import serialised
from fastlm.testing.cases import CASES, Variant

pytestmark = test_cuda.pytestmark
CASE = CASES["attention"]
DTYPES = (torch.bfloat16, torch.float16)
KERNELS = ("fwd", "dkdv", "dq")
# The same in all processes of a run: what they collect must be the same.
SEED = os.environ.get("FASTLM_TEST_SEED") or os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(time.time_ns())


@functools.cache
def compiled(name) -> str:
    """The PTX of csrc/cuda/sm90/attention_{name}.cu."""
    source = test_cuda.CSRC / "cuda" / "sm90" / f"attention_{name}.cu"
    return ptx.compile_cuda(source, includes=test_cuda.INCLUDES, arch="90a")


@functools.cache
def kernels() -> str:
    """The PTX of attention: that for sm_90a, and delta and the gradient of a bias table for sm_80."""
    files = [test_cuda.CSRC / "cuda" / f"attention_{part}.cu" for part in ("bwd", "dq")]
    sm80 = [ptx.compile_cuda(file, includes=test_cuda.INCLUDES) for file in files]
    return "\n".join([*map(compiled, KERNELS), *sm80])


@contextmanager
def hopper(text=kernels, **options):
    """What test_cuda.device is for sm_80, whatever the length."""
    with mock.patch.object(_registry, "kernel", return_value="sm90"), test_cuda.device(text, **options) as remember:
        yield remember


# Blocks without a mask come first, before and behind the others with a bias; more than four blocks, so that stages are
# used again, also by the next head; two groups of queries and a part of a third.
MORE = (
    *LONG,
    Variant({"h": 2, "kv": 1, "d": 64, "lengths": (30, 300, 0, 140)}, {"causal": True}),
    Variant({"h": 6, "kv": 1, "d": 128, "lengths": (30, 110)}),
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


def is_small(variant):
    shape = variant.shape
    return max(shape.get("s", 0), shape.get("sk", 0), *shape.get("lengths", (0,))) <= 100


def drawn():
    """Parameters (variant, dtype); all but two are marked long."""
    choices = [(v, dtype) for v in (*CASE.tests, *MORE) for dtype in DTYPES if taken(v)]
    daily = random.Random(SEED).sample([choice for choice in choices if is_small(choice[0])], 2)
    for variant, dtype in choices:
        marks = () if (variant, dtype) in daily else pytest.mark.long
        yield pytest.param(variant, dtype, id=f"{variant}-{str(dtype).removeprefix('torch.')}", marks=marks)


@pytest.mark.parametrize(("variant", "dtype"), list(drawn()))
def test_error_bound(variant, dtype):
    print(f"FASTLM_TEST_SEED={SEED}")
    checks.error_bound(CASE, variant, dtype, "cpu", ["cuda"], range(1), hopper)


@pytest.mark.long
@pytest.mark.parametrize("chip", ["high", "low", "scattered"])
@pytest.mark.parametrize("variant", MORE[len(LONG) :], ids=str)
def test_error_bound_with_a_chips_arithmetic(variant, chip):
    around = functools.partial(hopper, chip=chip)
    checks.error_bound(CASE, variant, torch.bfloat16, "cpu", ["cuda"], range(1), around)


@pytest.mark.long
def test_padding_has_no_influence():
    """TMA brings padding: v's is set to 0 in shared memory."""
    padding_has_no_influence("cuda", hopper)


@pytest.mark.long
@pytest.mark.parametrize("name", WRONG)
def test_wrong_offsets(name):
    offsets_q, offsets_k = WRONG[name]
    wrong_offsets("cuda", hopper, offsets_q, offsets_k or offsets_q, causal=True, dropout_p=0.1)


@pytest.mark.long
@pytest.mark.parametrize("check", [checks.non_contiguous, checks.deterministic], ids=lambda f: f.__name__)
@pytest.mark.parametrize("variant", [v for v in CASE.kinds() if taken(v)], ids=str)
def test_check(check, variant):
    check(CASE, variant, torch.bfloat16, "cpu", "cuda", around=hopper)


@pytest.mark.parametrize("key", [40, 57, 128 + 57])
def test_exponentials_on_the_fma_units(key):
    """Heads of 64 in bfloat16 without dropout, bias and softcap: of 64 keys, those of 57, 59, 61 and 63 are by FMA.

    Far below the maximum a weight is 0; NaN and infinity stay. The exponential unit computes that of key 40.
    """
    q, k, v = torch.randn(3, 1, 256, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = q[:, :8].abs()

    def out(score, value):
        k[:, key], v[:, key] = score, value
        with hopper(lambda: compiled("fwd")):
            return ops.attention(q, k, v, backend="cuda")

    want = out(-100.0, 0.0)  # 2 to the power of about -900
    assert want.isfinite().all()
    assert torch.equal(out(-100.0, 3e38), want)
    assert torch.equal(out(-torch.inf, 3e38), want)
    assert out(torch.inf, 1.0).isnan().all()
    assert out(torch.nan, 1.0).isnan().all()
    q[:, 3] = torch.nan
    rows = out(1.0, 1.0).isnan().flatten(2).any(-1)[0]
    assert rows.tolist() == [row == 3 for row in range(8)]


@pytest.mark.parametrize("key", [40, 57, 128 + 57])
def test_error_of_exponentials_on_the_fma_units(key):
    """At most 1.03e-4 of the value: the lse of two keys is log(1 + 2^x). That of key 40 is on the exponential unit."""
    x = -torch.arange(128.0) / 64  # exact in bfloat16
    q, k = torch.zeros(1, 128, 1, 64), torch.zeros(1, 256, 1, 64)
    q[0, :, 0, 0], q[0, :, 0, 1] = 1.0, x
    k[..., 0] = -1000.0
    k[:, 0] = k[:, key] = 0.0
    k[:, key, :, 1] = 1.0
    q, k = q.bfloat16(), k.bfloat16()
    with hopper(lambda: compiled("fwd")):
        _, lse = ops.attention(q, k, k, softmax_scale=math.log(2), return_lse=True, backend="cuda")
    error = (torch.expm1(lse.flatten().double()) / 2 ** x.double() - 1).abs().max()
    assert error < 5e-6 if key == 40 else 1.0e-4 < error < 1.03e-4


def launched(q, k=None, **options):
    """The kernels of a forward pass and, of an input with a gradient, of backward; none runs."""
    found = []
    _native.record_cuda(lambda entry, *_: found.append(entry))
    try:
        with mock.patch.object(_registry, "kernel", return_value="sm90"):
            out = ops.attention(q, *[q if k is None else k] * 2, backend="cuda", **options)
            if out.requires_grad:
                out.sum().backward()
    finally:
        _native.record_cuda(None)
    return found


@pytest.mark.parametrize(
    ("shape", "changed", "sm90"),
    [
        ((2, 1024, 3, 64), {}, True),
        ((2, 1024, 3, 64), {"dtype": torch.float16}, True),
        ((2, 1024, 3, 40), {}, True),
        ((2, 1024, 2, 128), {}, True),
        ((2, 1023, 3, 64), {}, False),
        ((2, 1024, 3, 32), {}, False),
        ((2, 1024, 3, 66), {}, False),
        ((2, 1024, 2, 136), {}, False),
        ((2, 1024, 3, 64), {"dtype": torch.float32}, False),
        ((2, 1024, 3, 64), {"keys": 0}, False),
        ((4096, 3, 64), {"longest": 1024}, True),
        ((4096, 3, 64), {"longest": 512}, False),  # packed
        ((2, 1024, 3, 64), {"capability": 100}, False),
    ],
)
def test_what_it_is_predicted_to_do_better(shape, changed, sm90, monkeypatch):
    """ "auto" stays with Triton, and FASTLM_PREDICTED=0 with sm_80's kernels."""
    pytest.importorskip("triton", reason="triton is not installed")
    asked = []
    q = torch.empty(1).expand(shape).to(torch.bfloat16)
    monkeypatch.setattr(_registry, "kernel", lambda *args, **features: asked.append(features) or "")
    cu = torch.tensor([0, shape[0]], dtype=torch.int32)
    packed = {"cu_seqlens_q": cu, "max_seqlen_q": changed.get("longest", 1)} if len(shape) == 3 else {}
    _native.record_cuda(lambda *_: None)
    try:
        ops.attention(q, q, q, backend="cuda", **packed)
    finally:
        _native.record_cuda(None)
    monkeypatch.undo()
    (features,) = asked
    features |= {"keys": changed["keys"]} if "keys" in changed else {}
    monkeypatch.setattr(_preferences, "_capability", lambda index: changed.get("capability", 90))
    with FakeTensorMode():
        q = torch.empty(shape, dtype=changed.get("dtype", torch.bfloat16), device="cuda:0")
    assert _registry.kernel("attention", "cuda", q, **features) == ("sm90" if sm90 else "")
    assert _registry.choose("attention", "auto", q, gradient=True) == "triton"
    monkeypatch.setenv("FASTLM_PREDICTED", "0")
    page = _registry._pages["attention"]
    monkeypatch.setitem(_registry._pages, "attention", page._replace(prefer=_preferences.measured_first(page.prefer)))
    assert _registry.kernel("attention", "cuda", q, **features) == ""
    assert _registry.kernel("attention", "sdpa", q) == ""


def test_what_the_kernel_takes():
    """It runs in forward and backward; inputs that TMA cannot read are copied."""

    def is_sm90(x, **options):
        (entry,) = launched(x, **options)
        return "4sm90" in entry  # its namespace

    x = torch.zeros(2, 20, 3, 64, dtype=torch.bfloat16)
    assert is_sm90(x)
    assert is_sm90(x.half(), causal=True, softcap=3.0)
    assert is_sm90(x[..., :8])
    assert is_sm90(x[..., 1:33])  # not on 16 bytes: copied
    assert is_sm90(x[:, :, :1].expand(2, 20, 4, 64))  # TMA takes no stride of 0: copied
    leaf = x.detach().requires_grad_()
    assert ["4sm90" in entry for entry in launched(leaf)] == [True, False, True, True]  # delta is any device's
    table = ops.RelativeBias(torch.zeros(8, 3, requires_grad=True), max_distance=9)
    names = [re.search(r"(4sm90)?\d\d(attention_\w+?)_kernel", entry) for entry in launched(leaf, relative_bias=table)]
    passes = [name.group(2) for name in names if name.group(1)]
    assert passes == ["attention_fwd", "attention_dkdv"]
    assert "attention_dq" in {name.group(2) for name in names if not name.group(1)}  # it sums the table's gradient
    with pytest.raises(ValueError, match="sm_90a: expected 16 bits, d of 8 to 128 and some keys, got d 33"):
        launched(x[..., :33])


def test_keys_expanded_from_one_head_are_not_copied_in_forward(monkeypatch):
    q, one = torch.randn(40, 4, 16).bfloat16()[None], torch.randn(1, 40, 1, 16).bfloat16()
    k = one.expand(1, 40, 4, 16)
    with hopper(lambda: compiled("fwd")):
        want = ops.attention(q, k.contiguous(), k.contiguous(), backend="cuda")
        clone = torch.Tensor.clone
        monkeypatch.setattr(
            torch.Tensor, "clone", lambda x, **options: pytest.fail("a copy") if x.stride() == k.stride() else clone(x)
        )
        assert torch.equal(ops.attention(q, k, k, backend="cuda"), want)


def test_what_tma_cannot_read_is_refused_by_name(monkeypatch):
    """The adapter copies such inputs. The driver would say "error 1"."""
    monkeypatch.setattr("fastlm.ops._cuda.attention._mapped", lambda x: x)
    x = torch.zeros(2, 20, 3, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^q: expected an address .* 16 bytes, .* got \d+; use a copy"):
        launched(torch.zeros(64 * 120 + 1).bfloat16()[1:].view(2, 20, 3, 64), k=x)
    for wrong in (torch.zeros(2, 20, 3, 65).bfloat16()[..., :64], x[:1].expand(2, 20, 3, 64)):
        with pytest.raises(ValueError, match=r"^k: expected strides of 16 bytes .* got (130|0); use a copy"):
            launched(x, k=wrong)


def machine_code(name):
    """What ptxas says of a file, and the machine code of its kernels."""
    knobs = pytest.importorskip("triton.knobs")  # where Triton's cuobjdump is
    with tempfile.TemporaryDirectory() as directory:
        source, cubin = Path(directory, "kernel.ptx"), Path(directory, "kernel.cubin")
        source.write_text(compiled(name))
        command = [ptx.nvcc(), "-cubin", "-arch=sm_90a", "-Xptxas=-v", source, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [knobs.nvidia.cuobjdump.path, "--dump-sass", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return log, dict(part.split("\n", 1) for part in text.split("\tFunction : ")[1:])


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name):
    """Products by wgmma, none serialised (C75xx); copies by TMA; no spills.

    The exponentials are between two waits. ptxas moved forward's behind the wait for p v, where nothing overlaps with
    them (LOG.md, 2026-11-30).
    """
    log, kernels = machine_code(name)
    assert not serialised(log)
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}
    assert set(re.findall(r"Used (\d+) registers", log)) == {"168"}  # what setmaxnreg shares out: kRegisters
    assert len(kernels) == 6
    for entry, code in kernels.items():
        assert "UTMALDG.4D" in code
        loop = next(loop for loop in sass.loops(sass.parse(code)) if any("HGMMA" in i.opcode for i in loop))
        order = " ".join(i.opcode.split(".")[0] + i.operands[-3:] * i.opcode.startswith("WARPGROUP.D") for i in loop)
        before, softmax, after = re.split(r"WARPGROUP0x\d", order, maxsplit=2)
        wide, extras = "Li128" in entry, "ELb1" in entry
        columns = 64 if name != "fwd" or (wide and extras) else 128
        depth, deep = (128 if wide else 64) // 16, columns // 16
        # Those before the first wait. At 128 columns dkdv has no registers to start dk of the block before.
        products = depth + deep if name == "fwd" else 2 * depth + deep * (name == "dq" or not wide)
        assert before.count("HGMMA") == products
        exponentials = columns // 2 + 2 * (name == "fwd")
        if name == "fwd" and not wide and not extras:
            exponentials -= columns // 2 // 16  # on the FMA units
        assert softmax.count("MUFU") >= 2 * exponentials  # of both kinds of blocks
        assert "HGMMA" not in softmax
        if name != "dkdv":
            assert "HGMMA" not in after
        if not extras:  # dkdv has the slope of a softcap behind
            assert "MUFU" not in after
            assert softmax.count("MUFU") == 2 * exponentials


# ---- planted faults ------------------------------------------------------------------------------------------------

WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[(%r\d+)\], (%r\d+);"
NO_WAIT = r"setp.eq.u32 p, \2, \2;"
OTHER_PHASE = r".reg .b32 o; xor.b32 o, \2, 1; mbarrier.try_wait.parity.shared::cta.b64 p, [\1], o;"
EXPECT = r"(mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\]), (%r\d+);"
MORE_BYTES = r"{ .reg .b32 o; add.u32 o, \2, 16; \1, o; }"
ARRIVE = r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];"
MEET = r"bar\.sync \s*%r\d+, %r\d+;"
PROXY = r"fence\.proxy\.async[^;]*;"
GROUP = r"(wgmma\.wait_group\.sync\.aligned) (\d);"
WRITING, FULL = "a bulk copy is still writing", "1 arrivals at an mbarrier that misses 0"
# The waits in the order of the code: of forward and, below, of dkdv and dq.
K_FREE, V_FREE, V_LANDED, Q_FULL, FIRST_K, K_FULL, V_FULL, LAST_V = range(8)
# File: its kernel of heads of 128, or of those named, without dropout and bias. (kind, pattern, which, what takes its
# place, what the finding says.)
FAULTS = {
    ("fwd", "keys of another phase"): ("async", WAIT, K_FULL, OTHER_PHASE, WRITING),
    ("fwd", "keys are not waited for"): ("async", WAIT, K_FULL, NO_WAIT, WRITING),
    ("fwd", "values are not waited for"): ("async", WAIT, V_FULL, NO_WAIT, WRITING),
    ("fwd", "queries are not waited for"): ("async", WAIT, Q_FULL, NO_WAIT, WRITING),
    ("fwd", "keys of a stage in use"): ("async", WAIT, K_FREE, NO_WAIT, FULL),
    ("fwd", "values of a stage in use"): ("async", WAIT, V_FREE, NO_WAIT, FULL),
    ("fwd", "rows set to 0 before they are there"): ("async", WAIT, V_LANDED, NO_WAIT, WRITING),
    ("fwd", "too many bytes"): ("divergence", EXPECT, 1, MORE_BYTES, "16 bytes"),
    ("fwd", "a warp does not free the stage"): ("divergence", ARRIVE, 3, ";", "nothing completes"),
    ("fwd", "no fence of the proxies"): ("async", PROXY, 0, ";", "fence.proxy.async"),
    ("fwd", "scores in flight"): ("async", GROUP, 1, r"\1 2;", "still writing"),
    ("fwd", "output in flight"): ("async", GROUP, 2, r"\1 1;", "still writing"),
    ("fwd", "no fence of the accumulators"): ("async", r"wgmma\.fence[^;]*;", 1, ";", "after the last wgmma.fence"),
    ("fwd", "output over queries in use"): ("race", MEET, 1, ";", "nothing orders"),
    ("dkdv", "queries of a stage in use"): ("async", WAIT, 0, NO_WAIT, WRITING),
    ("dkdv", "lse of a stage in use"): ("async", WAIT, 1, NO_WAIT, FULL),
    ("dkdv", "rows set to 0 before they are there"): ("async", WAIT, 2, NO_WAIT, WRITING),
    ("dkdv", "keys are not waited for"): ("async", WAIT, 3, NO_WAIT, WRITING),
    ("dkdv", "queries of another phase"): ("async", WAIT, 4, OTHER_PHASE, WRITING),
    ("dkdv", "too many bytes"): ("divergence", EXPECT, 1, MORE_BYTES, "16 bytes"),
    ("dkdv", "no fence of the proxies"): ("async", PROXY, 0, ";", "fence.proxy.async"),
    ("dkdv", "scores in flight"): ("async", GROUP, 0, r"\1 2;", "still writing"),
    ("dkdv", "dp in flight"): ("async", GROUP, 1, r"\1 1;", "still writing"),
    ("dkdv", "gradients in flight"): ("race", GROUP, 2, r"\1 1;", "nothing orders"),
    ("dkdv", "a warp does not free the stage"): ("divergence", ARRIVE, -1, ";", "nothing completes"),
    ("dkdv 64", "keys in registers are not waited for"): ("race", WAIT, 3, NO_WAIT, "nothing orders"),
    ("dkdv 64", "scores in flight"): ("async", GROUP, 0, r"\1 3;", "still writing"),
    ("dkdv 64", "dp in flight"): ("async", GROUP, 1, r"\1 2;", "still writing"),
    ("dkdv 64", "dk of the block before in flight"): ("async", GROUP, 2, r"\1 2;", "still reading"),
    ("dkdv 64", "gradients in flight"): ("async", GROUP, 3, r"\1 1;", "still writing"),
    ("dkdv 64", "a warp does not free the stage"): ("divergence", ARRIVE, -1, ";", "nothing completes"),
    ("dq", "keys of a stage in use"): ("async", WAIT, 0, NO_WAIT, FULL),
    ("dq", "rows set to 0 before they are there"): ("async", WAIT, 1, NO_WAIT, WRITING),
    ("dq", "queries are not waited for"): ("race", WAIT, 2, NO_WAIT, "nothing orders"),
    ("dq", "keys of another phase"): ("async", WAIT, 3, OTHER_PHASE, WRITING),
    ("dq", "no fence of the proxies"): ("async", PROXY, 0, ";", "fence.proxy.async"),
    ("dq", "scores in flight"): ("async", GROUP, 0, r"\1 3;", "still writing"),
    ("dq", "dp in flight"): ("async", GROUP, 1, r"\1 2;", "still writing"),
    ("dq", "dq of the block before in flight"): ("async", GROUP, 2, r"\1 1;", "still reading"),
    ("dq", "gradient in flight"): ("async", GROUP, 3, r"\1 1;", "still writing"),
    ("dq", "a warp does not free the stage"): ("divergence", ARRIVE, -1, ";", "nothing completes"),
}
DAILY = {("fwd", "keys of another phase"), ("fwd", "scores in flight"), ("dq", "no fence of the proxies")}


def planted(name, pattern, which, instead):
    """The PTX of the kernels, with the edit in one. A fault of forward ends the test there."""
    name, d = (*name.split(), "128")[:2]
    text = compiled(name)
    (entry,) = re.finditer(rf"\.entry \w+bfloat16Li{d}ELb0.*?\n}}", text, re.DOTALL)
    found = list(re.finditer(pattern, entry[0]))[which]
    start, end = entry.start() + found.start(), entry.start() + found.end()
    edited = text[:start] + found.expand(instead) + text[end:]
    return edited if name == "fwd" else "\n".join([edited, kernels()])


@pytest.mark.parametrize(
    "name", [pytest.param(n, id=" ".join(n), marks=() if n in DAILY else pytest.mark.long) for n in FAULTS]
)
def test_planted_fault_is_found(name):
    kind, pattern, which, instead, message = FAULTS[name]
    text = planted(name[0], pattern, which, instead)
    # Padding behind the keys of forward and dq, and rows behind the last sequence of dkdv.
    file, d = (*name[0].split(), "128")[:2]
    q, k, v = torch.randn(3, 470, 1, int(d), generator=torch.Generator().manual_seed(0)).bfloat16()
    cu = {"cu_seqlens_q": torch.tensor([0, 460], dtype=torch.int32), "max_seqlen_q": 470}
    options = {**cu, "cu_seqlens_k": cu["cu_seqlens_q"], "max_seqlen_k": 470}
    if file != "dkdv":
        q, k, v, options = q[None, :128], k[None], v[None], {"key_mask": torch.arange(470)[None] < 460}

    def step():
        out = ops.attention(*(x.requires_grad_() for x in (q, k, v)), **options, backend="cuda")
        out.sum().backward()

    with pytest.raises(ptx.KernelFault) as caught, hopper(lambda: text):
        step()
    (finding,) = caught.value.findings
    print(name, finding)
    assert f"attention_{file}_kernel" in finding.kernel
    assert finding.kind == kind
    assert message in finding.message
