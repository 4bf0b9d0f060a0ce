"""cross_entropy and linear_cross_entropy beyond their OpCases: torch's semantics, every kernel, errors, memory."""

import itertools
import math
import os
import subprocess
import sys
from contextlib import nullcontext

import ptx
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_head import VOCABULARY, make_head
from test_cuda import device as cuda_on_ptx
from test_cuda import pytestmark as cuda_is_built

from fastlm import ops
from fastlm.ops import _chunks, _products, _registry
from fastlm.ops._chunks import chunk_rows
from fastlm.ops.cross_entropy import LossArgs
from fastlm.ops.linear_cross_entropy import Inputs, Wanted
from fastlm.testing.ahead_of_time import compile_for
from fastlm.testing.compare import Comparison

CUDA = pytest.param("cuda", marks=cuda_is_built)


def running(backend, **options):
    """Where the backend runs on this machine."""
    return {"triton": ptx.triton_on_ptx, "cuda": cuda_on_ptx}.get(backend, nullcontext)(**options)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def head(generator):
    return make_head(generator)


@pytest.mark.parametrize("backend", ["cpu", "triton", CUDA, "reference"])
def test_torch_semantics(head, generator, backend):
    """Loss and gradient of every combination of options, against torch in float64 and the z term written out."""
    hidden, matrix, target = head
    weights = torch.rand(VOCABULARY, generator=generator) + 0.1
    logits = (hidden @ matrix.detach().t()).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    for weight, smoothing, z_loss, reduction, ignore_index in itertools.product(
        (None, weights), (0.0, 0.1, 1.0), (0.0, 0.02), ("none", "mean", "sum"), (-100, VOCABULARY - 1)
    ):
        inplace = z_loss > 0.0 and smoothing < 1.0
        options = {"label_smoothing": smoothing, "reduction": reduction, "ignore_index": ignore_index}
        t = target if ignore_index == -100 else target.clamp_min(0)
        w = None if weight is None else weight.double()
        want = F.cross_entropy(exact, t, weight=w, **options)
        z = z_loss * exact.logsumexp(-1).square() * (t != ignore_index)
        if reduction == "none":
            want = want + z
        elif reduction == "sum":
            want = want + z.sum()
        else:
            kept = t[t != ignore_index]
            want = want + z.sum() / (len(kept) if w is None else w[kept].sum())
        x = logits + 0.0 if inplace else logits
        cotangent = torch.rand(want.shape, generator=generator)
        with running(backend):
            got = ops.cross_entropy(x, t, weight=weight, z_loss=z_loss, inplace=inplace, backend=backend, **options)
            (got_dx,) = torch.autograd.grad(got, logits, cotangent)
        (want_dx,) = torch.autograd.grad(want, exact, cotangent.double())
        # Sums of at most six rows: a few roundings of the largest value.
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(got_dx.double(), want_dx, rtol=2e-6, atol=2e-6)


def test_classes_are_last(generator):
    logits = torch.randn(2, 3, VOCABULARY, generator=generator)
    target = torch.randint(0, VOCABULARY, (2, 3), generator=generator)
    for reduction in ("none", "mean", "sum"):
        want = F.cross_entropy(logits.movedim(-1, 1), target, reduction=reduction)
        torch.testing.assert_close(ops.cross_entropy(logits, target, reduction=reduction), want)
    one = ops.cross_entropy(logits[0, 0], target[0, 0])
    torch.testing.assert_close(one, F.cross_entropy(logits[0, 0], target[0, 0]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_to_predict(smoothing, generator):
    """As torch: the mean over no rows is NaN, its gradient zero; the sum is zero."""
    logits = torch.randn(3, VOCABULARY, generator=generator).requires_grad_()
    target = torch.full((3,), -100)
    loss = ops.cross_entropy(logits, target, label_smoothing=smoothing)
    assert loss.isnan()
    assert F.cross_entropy(logits, target, label_smoothing=smoothing).isnan()
    assert torch.autograd.grad(loss, logits)[0].count_nonzero() == 0
    assert ops.cross_entropy(logits, target, label_smoothing=smoothing, reduction="sum") == 0
    assert ops.cross_entropy(logits[:0], target[:0]).isnan()


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 16501])
@pytest.mark.parametrize("backend", ["cpu", "triton", CUDA])
def test_infinities_and_nan(backend, vocabulary, generator):
    """Rows with NaN, +inf, only -inf, or -inf at the target fare as in torch."""
    logits = torch.randn(6, vocabulary, generator=generator)
    logits[0, 3], logits[1, 3], logits[2], logits[3, 0], logits[4, 1] = math.nan, math.inf, -math.inf, -math.inf, -1e30
    logits.requires_grad_()
    target = torch.zeros(6, dtype=torch.int64)
    for smoothing in (0.0, 0.1):
        want = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        with running(backend):
            got = ops.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing, backend=backend)
            (got_dx,) = torch.autograd.grad(got.sum(), logits)
        torch.testing.assert_close(got, want, equal_nan=True)
        assert got[3] == math.inf
        finite = [3, 4, 5]
        got_dx = got_dx[finite]
        torch.testing.assert_close(got_dx, torch.autograd.grad(want.sum(), logits)[0][finite])


@pytest.mark.parametrize("value", [VOCABULARY, -1, 2**40])
@pytest.mark.parametrize("backend", ["triton", CUDA, "reference"])
def test_label_outside_on_a_device(backend, value, generator):
    """Where nothing can be raised: NaN in the loss and in the gradient of the row."""
    logits = torch.randn(3, VOCABULARY, generator=generator).requires_grad_()
    weight = torch.rand(VOCABULARY, generator=generator)
    bad, good = torch.tensor([1, value, -100]), torch.tensor([1, 2, -100])
    for reduction in ("none", "mean", "sum"):
        options = {"reduction": reduction, "weight": weight, "label_smoothing": 0.1, "z_loss": 0.1}
        if backend == "reference":
            loss, other = (ops.cross_entropy_reference(logits, t, **options) for t in (bad, good))
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
        else:
            with running(backend):
                loss, other = (ops.cross_entropy(logits, t, backend=backend, **options) for t in (bad, good))
                (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert gradient[[0, 2]].isfinite().all()  # a NaN loss, and the reference, spread it to every row
        assert torch.equal(loss.isnan(), torch.tensor([False, True, False] if reduction == "none" else True))
        assert gradient[1].isnan().all()
        assert other.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_linear_label_outside_on_a_device(backend, head):
    hidden, weight, _ = head
    target = torch.tensor([1, 2, VOCABULARY, 3, 4, -100])
    with running(backend):
        loss = ops.linear_cross_entropy(hidden.requires_grad_(), weight, target, backend=backend)
        dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isnan()
    assert dhidden[2].isnan().all()
    assert dweight.isnan().all()


@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_logits_aligned_in_any_way_give_the_same_bits(backend, generator):
    """Rows begin anywhere between 16-byte boundaries, in a slice elsewhere than in its copy."""
    shapes = [(torch.bfloat16, 16501), (torch.float32, 16502), (torch.float16, 77)]
    if backend == "cuda":  # more than lies in shared memory at once
        shapes += [(torch.bfloat16, 66003)]
    for dtype, vocabulary in shapes:
        logits = torch.randn(4, vocabulary + 3, generator=generator).to(dtype)
        target = torch.randint(0, vocabulary, (3,), generator=generator)
        for view in (logits[1:, :vocabulary], logits.view(-1)[1 : 1 + 3 * vocabulary].view(3, vocabulary)):
            results = []
            for x in (view.clone().requires_grad_(), view.requires_grad_()):
                with running(backend):
                    loss = ops.cross_entropy(x, target, label_smoothing=0.1, backend=backend)
                    results += [(loss, *torch.autograd.grad(loss, x))]
            assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("rows", [0, 1, 4097, 300_001])
def test_sums_over_many_rows(rows, generator):
    """The denominator and the loss of the Triton kernels, in one program and in several."""
    from fastlm.kernels import cross_entropy as kernels

    target = torch.randint(-2, 9, (rows,), generator=generator)
    weight, loss = torch.rand(7, generator=generator) + 0.1, torch.rand(rows, generator=generator)
    counts = (target >= 0) & (target < 7) & (target != 3)
    with running("triton"):
        number = kernels.count_targets(target, None, 7, 3)
        parts = kernels.count_targets(target, weight, 7, 3)
        total, mean = kernels.sum_losses(loss, None), kernels.sum_losses(loss, parts)
    denominator = weight.double()[target[counts]].sum()
    assert number.sum() == counts.sum()
    torch.testing.assert_close(parts.double().sum(), denominator, rtol=2e-7, atol=0)
    torch.testing.assert_close(total.double(), loss.double().sum(), rtol=2e-7, atol=0)
    torch.testing.assert_close(mean.double(), loss.double().sum() / denominator, rtol=4e-7, atol=0, equal_nan=True)


@cuda_is_built
@pytest.mark.parametrize("rows", [0, 1, 4097, 20_000])
def test_cuda_sums_over_many_rows(rows, generator):
    """The same of the CUDA kernels."""
    target = torch.randint(-2, 9, (rows,), generator=generator)
    weight, loss = torch.rand(7, generator=generator) + 0.1, torch.rand(rows, generator=generator)
    counts = (target >= 0) & (target < 7) & (target != 3)
    with running("cuda"):
        losses_of = _registry.column("cross_entropy", "cuda").Losses
        number = losses_of(LossArgs(target, None, 3, 0.0, 0.0, 0.0, "mean", False), 7).parts.sum()
        losses = losses_of(LossArgs(target, weight, 3, 0.0, 0.0, 0.0, "mean", False), 7)
        losses.each.copy_(loss)
        mean = losses.loss()
        losses.parts = None
        total = losses.loss()
    denominator = weight.double()[target[counts]].sum()
    assert number == counts.sum()
    torch.testing.assert_close(total.double(), loss.double().sum(), rtol=2e-7, atol=0)
    torch.testing.assert_close(mean.double(), loss.double().sum() / denominator, rtol=4e-7, atol=0, equal_nan=True)


@cuda_is_built
@pytest.mark.parametrize("vocabulary", [512, 513, 4096, 4097, 16385, 32768, 32769, 49161])
def test_cuda_rows_of_any_length(vocabulary, generator):
    """Either side of where a float32 row takes more threads, more chunks, or more than lie in shared memory at once:
    in place, strided, and into a gradient that is aligned otherwise."""
    logits = torch.randn(2, vocabulary + 1, generator=generator)[:, 1:]
    weight = torch.rand(vocabulary, generator=generator) + 0.1
    target = torch.tensor([vocabulary - 1, vocabulary // 2])
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    exact = logits.double().requires_grad_()
    want = ops.cross_entropy(exact, target, weight=weight, backend="reference", **options)
    (want_dx,) = torch.autograd.grad(want, exact)
    bits = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        strided = (torch.nn.functional.pad(leaf, (1, 0)) + 0.0)[:, 1:]
        assert strided.data_ptr() % 16 == 4
        with running("cuda"):
            loss = ops.cross_entropy(strided, target, weight=weight, inplace=inplace, backend="cuda", **options)
            bits += [(loss, *torch.autograd.grad(loss, leaf))]
        torch.testing.assert_close(bits[-1][0].double(), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(bits[-1][1].double(), want_dx, rtol=4e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(*bits))


@cuda_is_built
def test_cuda_offsets_past_32_bits(generator):
    """Rows further apart than 2^31 elements. Only their own pages of the memory are ever touched."""
    memory = torch.empty(2**31 + 200, dtype=torch.bfloat16)
    target = torch.tensor([3, 40])
    values = torch.randn(2, 50, generator=generator).bfloat16()
    logits = memory.as_strided((2, 50), (2**31 + 5, 1), 7).copy_(values)
    module = torch.ops.fastlm
    results = []
    with running("cuda", workers=1) as remember:  # more of them would copy the memory first
        remember(memory)  # whole, so that no state is kept of each of its bytes
        for x in (values.clone(), logits):
            loss = module.cross_entropy_fwd_(x, target, None, -100, 0.1, 0.0, 0.0, "sum", False, "cuda")
            module.cross_entropy_bwd_(x, torch.tensor(0.5), "cuda")
            results.append((loss, x))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("elements", [2**20 + 1, 2**31 + 1])
def test_backward_loads_16_bytes(elements):
    """Also where the number of elements is no int32. Nothing runs: the memory is never touched."""
    from fastlm.kernels import cross_entropy as kernels

    dlogits = torch.empty(1, elements, dtype=torch.bfloat16)
    with compile_for(90) as compiled:
        kernels.cross_entropy_bwd(dlogits, torch.ones(()), dlogits)
    assert compiled[0].load_bytes() == {2: 1, 4: 1, 16: 4}


@pytest.mark.parametrize("vocabulary", [37, 40, 64])
def test_a_device_adds_the_bias_in_the_product(vocabulary, monkeypatch):
    """torch's addmm uses cuBLASLt's bias only where the logits are contiguous and the bias is one row of them."""
    calls, addmm = [], torch.addmm

    def recorded(bias, x, w, *, out, **options):
        calls.append((bias, out))
        return addmm(bias, x, w, out=out, **options)

    class Losses:
        def add(self, x, dx, dloss):
            assert x.shape == dx.shape == (6, vocabulary)

    monkeypatch.setattr(torch, "addmm", recorded)
    monkeypatch.setattr(_products, "adds_bias", lambda x: False)  # a CPU's way
    hidden, weight, bias = (
        torch.ones(*size, dtype=torch.bfloat16) for size in ((6, 5), (vocabulary, 5), (vocabulary,))
    )
    wanted = Wanted(True, False, False)
    inputs = Inputs(hidden, weight, bias, None)
    gradients = _chunks._chunks(inputs, Losses(), None, wanted, row_bytes=128)
    ((added, logits),) = calls
    assert all((added.dim() == 1, added.is_contiguous(), logits.is_contiguous(), logits.shape[1] * 2 % 16 == 0))
    assert (logits[:, vocabulary:] == 0).all()
    assert torch.equal(gradients.dhidden, torch.full((6, 5), 6.0 * vocabulary, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("rows", "float32", "bfloat16"),
    [(0, 0, 0), (7, 7, 7), (511, 511, 511), (512, 256, 256), (1000, 500, 334), (1024, 512, 256), (65536, 512, 512)],
)
def test_chunk_rows_on_a_cpu(rows, float32, bfloat16):
    """Half of the rows, a quarter in bfloat16, between 256 and 512."""
    assert chunk_rows(rows, torch.float32, "cpu") == float32
    assert chunk_rows(rows, torch.bfloat16, "cpu") == bfloat16


@pytest.mark.parametrize(
    ("rows", "chunk"), [(0, 0), (7, 7), (1024, 1024), (2047, 2047), (2048, 1024), (5000, 1280), (65536, 4096)]
)
def test_chunk_rows_on_a_gpu(rows, chunk):
    """A quarter of the rows between 1024 and 4096, in multiples of 128."""
    assert chunk_rows(rows, torch.bfloat16, "cuda") == chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes(dtype, autocast, head):
    """Loss and gradients in the dtypes of torch's functions, in and outside of autocast."""
    hidden, weight, target = (t.detach() if t.dtype == torch.int64 else t.detach().to(dtype) for t in head)
    logits = (hidden @ weight.t()).requires_grad_()
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pairs = [
            (ops.cross_entropy(logits, target), F.cross_entropy(logits, target), logits),
            (
                ops.linear_cross_entropy(hidden, weight, target),
                F.cross_entropy(F.linear(hidden, weight), target),
                hidden,
            ),
        ]
    for ours, theirs, x in pairs:
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
        assert torch.autograd.grad(ours, x)[0].dtype == dtype


def outside(value):
    return torch.tensor([1, 2, value, 3, 4, value])


def test_weight_gradient_of_bfloat16(generator):
    """On a CPU, in three chunks of rows and two slices of classes: as good as eager's, and float32 under autocast."""
    hidden, weight, bias = (torch.randn(*size, generator=generator) for size in ((800, 16), (2100, 16), (2100,)))
    target = torch.randint(2100, (800,), generator=generator)
    inputs = [t.requires_grad_() for t in (hidden.bfloat16(), weight, bias)]
    assert chunk_rows(800, torch.bfloat16, "cpu") < 800
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(ops.linear_cross_entropy(*inputs[:2], target, bias), inputs)
        eager = torch.autograd.grad(F.cross_entropy(F.linear(*inputs), target), inputs)
    exact = [t.detach().bfloat16().double().requires_grad_() for t in inputs]
    want = torch.autograd.grad(F.cross_entropy(F.linear(*exact), target), exact)
    comparison = Comparison()
    for name, *triple in zip(("hidden", "weight", "bias"), ours, eager, want):
        comparison.add(name, *triple)
    assert comparison.failures() == []
    assert ours[1].dtype == torch.float32
    assert not torch.equal(ours[1], ours[1].bfloat16().float())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [VOCABULARY, -1, 2**40])
def test_label_outside(head, backend, value):
    """The target, the value, its position and the vocabulary are named, and nothing was written."""
    hidden, weight, _ = head
    logits = hidden @ weight.t()
    before = logits.detach().clone()
    message = rf"target: .*\[0, {VOCABULARY}\).* got {value} at position 2"
    for inplace in (False, True):
        with pytest.raises(ValueError, match=message):
            ops.cross_entropy(logits, outside(value), inplace=inplace, backend=backend)
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(hidden, weight, outside(value), backend=backend)
    assert torch.equal(logits.detach(), before)


LOGITS, TARGET = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)

BAD = {
    "logits: expected a floating": lambda: ops.cross_entropy(LOGITS.int(), TARGET),
    "logits: expected .*V ≥ 1": lambda: ops.cross_entropy(LOGITS[:, :0], TARGET),
    r"target: expected shape \(3,\)": lambda: ops.cross_entropy(LOGITS, TARGET[:2]),
    "target: expected torch.int64, got torch.int32": lambda: ops.cross_entropy(LOGITS, TARGET.int()),
    "target: .*class probabilities": lambda: ops.cross_entropy(LOGITS, LOGITS),
    r"weight: expected shape \(4,\), got \(3,\)": lambda: ops.cross_entropy(LOGITS, TARGET, weight=torch.ones(3)),
    "weight: expected constants": lambda: ops.cross_entropy(LOGITS, TARGET, weight=torch.ones(4, requires_grad=True)),
    "target: expected on meta": lambda: ops.cross_entropy(LOGITS.to("meta"), TARGET),
    "label_smoothing: expected a probability": lambda: ops.cross_entropy(LOGITS, TARGET, label_smoothing=1.1),
    "reduction: expected one of 'none', 'mean', 'sum'": lambda: ops.cross_entropy(LOGITS, TARGET, reduction="avg"),
    "ignore_index: expected an integer": lambda: ops.cross_entropy(LOGITS, TARGET, ignore_index=None),
    "ignore_index: expected an integer of 64 bits": lambda: ops.cross_entropy(LOGITS, TARGET, ignore_index=2**63),
    'backend="cpu" cannot run cross_entropy': lambda: ops.cross_entropy(LOGITS.double(), TARGET, backend="cpu"),
    "hidden: expected .*D ≥ 1": lambda: ops.linear_cross_entropy(LOGITS[:, :0], LOGITS[:, :0], TARGET),
    r"weight: expected shape \(\*, 4\)": lambda: ops.linear_cross_entropy(LOGITS, LOGITS.t(), TARGET),
    "weight: expected .*V ≥ 1": lambda: ops.linear_cross_entropy(LOGITS, LOGITS[:0], TARGET),
    r"bias: expected shape \(3,\)": lambda: ops.linear_cross_entropy(LOGITS, LOGITS, TARGET, torch.ones(4)),
    "weight: expected torch.float32, hidden's": lambda: ops.linear_cross_entropy(LOGITS, LOGITS.bfloat16(), TARGET),
    r"class_weight: expected shape \(3,\)": lambda: ops.linear_cross_entropy(
        LOGITS, LOGITS, TARGET, class_weight=torch.ones(4)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


PEAK = """
import sys, torch
from fastlm import ops
from fastlm.bench import memory
torch.set_num_threads(2)
dtype, reduction, backend = getattr(torch, sys.argv[1]), *sys.argv[2:]
vocabulary, features = 30522, 32
def step(rows):
    hidden = torch.randn(rows, features).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, features).to(dtype).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,))
    def call():
        (ops.linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend).sum() * 2).backward()
    return int(memory.peak_of_call(call, hidden.device) * 2**20) - weight.nbytes - hidden.nbytes
step(70)  # the BLAS and the threads take their own memory once
print(step(1024))
"""


def peak_memory(*arguments):
    """Bytes of a forward and backward beyond the gradients."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed goes back at once, or it would count
    command = [sys.executable, "-c", PEAK, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [("float32", "mean"), pytest.param("float32", "none", marks=pytest.mark.long), ("bfloat16", "mean")],
)
def test_linear_peak_memory(dtype, reduction):
    """A quarter of what eager takes, in bfloat16 a third: oneDNN's float32 copy of the chunk is in it."""
    ours, eager = (peak_memory(dtype, reduction, backend) for backend in ("cpu", "reference"))
    assert 0.05 < ours / eager <= (0.25 if dtype == "float32" else 0.34)


def test_linear_mean_of_no_rows_is_nan():
    loss = ops.linear_cross_entropy(torch.randn(0, 4), torch.randn(3, 4), torch.zeros(0, dtype=torch.long))
    assert loss.isnan()
