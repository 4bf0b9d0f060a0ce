"""csrc/cuda/sm90/cross_entropy.cu without a GPU: the host code runs unchanged, and the PTX of sm_90a is executed.

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

from fastlm import _native, ops
from fastlm.ops import _registry
from fastlm.ops._cross_entropy_auto import MOST
from fastlm.testing import checks
from fastlm.testing.cases import CASES, Variant

pytestmark = test_cuda.pytestmark
CASE = CASES["cross_entropy"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The same in all processes of a run: what they collect must be the same.
SEED = os.environ.get("FASTLM_TEST_SEED") or os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(time.time_ns())
# Parts of several chunks, of which a last one is short and one has nothing; rows that start off 8 bytes.
LONG = (
    Variant({"rows": 2, "vocabulary": 150001, "ignored": 1}, {"inplace": True}),
    Variant({"rows": 2, "vocabulary": 65600, "weight": 1}, {"label_smoothing": 0.1, "softcap": 9.0}),
)


@functools.cache
def kernels() -> str:
    """The PTX of cross_entropy: for sm_80, and of the kernel for sm_90a."""
    compile_cuda = functools.partial(ptx.compile_cuda, includes=test_cuda.INCLUDES)
    cuda = test_cuda.CSRC / "cuda"
    return compile_cuda(cuda / "cross_entropy.cu") + compile_cuda(cuda / "sm90" / "cross_entropy.cu", arch="90a")


@contextmanager
def cluster(text=kernels, **options):
    """What test_cuda.device is for the usual kernel, whatever the row's length."""
    with mock.patch.object(_registry, "kernel", return_value="cluster"), test_cuda.device(text, **options) as remember:
        yield remember


def drawn():
    """Parameters (variant, dtype); all but two are marked long."""
    choices = [(variant, dtype) for variant in (*CASE.tests, *LONG) for dtype in DTYPES]
    daily = random.Random(SEED).sample([choice for choice in choices if choice[0].shape["vocabulary"] < 20000], 2)
    for variant, dtype in choices:
        marks = () if (variant, dtype) in daily else pytest.mark.long
        yield pytest.param(variant, dtype, id=f"{variant}-{str(dtype).removeprefix('torch.')}", marks=marks)


@pytest.mark.parametrize(("variant", "dtype"), list(drawn()))
def test_error_bound(variant, dtype):
    print(f"FASTLM_TEST_SEED={SEED}")
    checks.error_bound(CASE, variant, dtype, "cpu", ["cuda"], range(1), cluster)


def test_a_row_of_several_chunks_a_block():
    """Every block has two of them; the second row starts on an odd column."""
    variant = Variant({"rows": 2, "vocabulary": 8 * 4200 + 1}, {"return_token_accuracy": True, "z_loss": 1e-3})
    checks.error_bound(CASE, variant, torch.float32, "cpu", ["cuda"], range(1), cluster)


@pytest.mark.long
@pytest.mark.parametrize("chip", ["high", "low", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", CASE.kinds(), ids=str)
def test_error_bound_with_a_chips_arithmetic(variant, dtype, chip):
    around = functools.partial(cluster, chip=chip)
    checks.error_bound(CASE, variant, dtype, "cpu", ["cuda"], range(1), around)


@pytest.mark.parametrize("check", [checks.non_contiguous, checks.deterministic], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "variant", [v if k == 3 else pytest.param(v, marks=pytest.mark.long) for k, v in enumerate(CASE.kinds())], ids=str
)
def test_check(check, variant):
    check(CASE, variant, torch.bfloat16, "cpu", "cuda", around=cluster)


@pytest.mark.parametrize(
    ("which", "kind", "message"),
    [
        # Sums that are read before they are there.
        pytest.param(0, "race", "nothing orders the two", marks=pytest.mark.long),
        (1, "race", "nothing keeps that block from exiting before"),
    ],
)
def test_a_missing_barrier_of_the_cluster_is_found(which, kind, message):
    """Of the two arrivals of a row: before the sums are read, and after."""

    def relaxed():
        kernel, count = "barrier.cluster.arrive.release.aligned", 0

        def edit(match):
            nonlocal count
            count += 1
            return match[0].replace("release", "relaxed") if count % 2 == (which + 1) % 2 else match[0]

        return re.sub(re.escape(kernel), edit, kernels())

    variant = Variant({"rows": 2, "vocabulary": 300})
    inputs = CASE.inputs(variant, 0, torch.bfloat16)
    with pytest.raises(ptx.KernelFault) as caught, cluster(text=relaxed):
        CASE.everything(CASE.function, variant, inputs, 0, backend="cuda")
    (finding,) = caught.value.findings
    assert (finding.kind, message in finding.message) == (kind, True), finding
    assert "sm90/cross_entropy.cu" in finding.location


def executed(x, kernel="cluster", **options):
    """(gradient, the kernel's instructions, each of a warp) of rows x."""
    leaf = x.detach().requires_grad_()
    with (
        mock.patch.object(_registry, "kernel", return_value=kernel),
        ptx.cuda_on_ptx(_native.record_cuda, kernels()) as launches,
    ):
        loss = ops.cross_entropy(leaf, torch.arange(len(x)), reduction="sum", backend="cuda", **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
    (report,) = [report for entry, report in launches.reports if re.search("entropy_(fwd_)?kernel", entry)]
    return gradient, sum(report.instructions.values())


def an_element(row, kernel="cluster", **options):
    """Instructions for each element of a chunk in every block: what the second half of a row adds."""
    whole, half = (executed(x, kernel, **options)[1] for x in (row, row[:, : row.shape[1] // 2]))
    return 32 * (whole - half) / (row.numel() // 2)


def test_smoothing_executes_little_more_than_in_the_usual_kernel():
    """Its own mode, without what the figures need: two blocks on a multiprocessor."""
    row = torch.randn(1, 131072, generator=torch.Generator().manual_seed(0)).bfloat16()
    cluster, usual = (an_element(row, kernel, label_smoothing=0.1) for kernel in ("cluster", ""))
    print(cluster, usual)
    assert cluster < 1.1 * usual


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)])
def test_rows_off_8_bytes_are_read_4_bytes_at_a_time(dtype):
    """The same bits at any distance from a boundary; aligned logits are read as such if their gradient is not."""
    rows, columns = 3, 65538 if dtype == torch.bfloat16 else 32769
    unit, wide = 8 // dtype.itemsize, columns + 8 - columns % (8 // dtype.itemsize)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradients, counts = [], []
    for offset, stride in ((0, columns), (0, wide), (1, wide)):
        x = torch.empty(8 + rows * stride, dtype=dtype)[offset:].as_strided((rows, columns), (stride, 1)).copy_(values)
        gradient, count = executed(x)
        gradients.append(gradient)
        counts.append(count)
    print(counts)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    contiguous, sliced, odd = counts
    aligned = 3 * executed(values[:1])[1]
    assert max(contiguous, sliced) < 1.02 * aligned
    assert unit == 2 or odd > 1.05 * aligned  # element by element


def arguments(x, columns):
    """Of the forward's C++ functions, for one row; x is not read."""
    none = dict.fromkeys(("weight", "weight_sum", "parts", "dloss", "z", "accuracy", "dx"))
    none |= {"x": x, "target": torch.zeros(1, dtype=torch.int64), "loss": torch.zeros(1), "rows": 1, "cols": columns}
    none |= {"stride_x": columns, "stride_dx": 0, "ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0}
    return none | {"softcap": 0.0, "dtype": _native.DTYPE_CODES[x.dtype], "place": (0, 0)}


def test_a_row_that_no_cluster_holds_is_refused():
    with (
        cluster(),
        pytest.raises(
            ValueError, match=r"^logits: .* at most 1835008 bytes, .* got rows of 1835012; use backend=\"triton\""
        ),
    ):
        _native.cuda().cross_entropy_fwd_sm90(**arguments(torch.zeros(1, 8), 458753))
    assert MOST == _native.cuda().CLUSTER_ROW_BYTES


def static_shared(text):
    """The bytes of static shared memory of each kernel in PTX."""
    sizes = {}
    for entry, body in re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", text, re.DOTALL):
        variables = re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\];", body)
        sizes[entry] = sum(int(size) for size in variables)
    return sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shared_memory_of_more_than_48_kb_is_requested(dtype):
    """Static and dynamic together: rows with which the dynamic memory alone stays below that, by a few bytes."""
    unasked, most, static, launches = _native.cuda().UNASKED_SHARED, 48 << 10, static_shared(kernels()), []
    assert max(static.values()) > 500
    bytes_ = dtype.itemsize
    for kernel, least, end in (("", 48_700, 49_200), ("cluster", 8 * 48_600, 8 * 49_200)):
        for columns in range(least // bytes_, end // bytes_, (end - least) // bytes_ // 8):
            args = arguments(torch.empty(1, 1, dtype=dtype).expand(1, columns), columns)
            _native.record_cuda(lambda entry, grid, block, shared, params: launches.append((entry, shared)))
            try:
                getattr(_native.cuda(), "cross_entropy_fwd_sm90" if kernel else "cross_entropy_fwd")(**args)
            finally:
                _native.record_cuda(None)
    sums = [dynamic + static[entry] for entry, dynamic in launches]
    assert any(dynamic <= most < both for (_, dynamic), both in zip(launches, sums))  # where it was forgotten
    for (entry, dynamic), both in zip(launches, sums):
        assert dynamic > unasked or both <= most, entry
    assert max(static.values()) <= most - unasked
