"""Every OpCase on backend="cuda" without a GPU: the host code runs unchanged, and its launches are executed.

fastlm._cuda passes every launch to a recorder (csrc/cuda/launch.h). tests/ptx compiles the same sources for sm_80,
executes them, and checks memory, races and barriers.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import ptx
import pytest
import torch
from variants import of_its_kind, on_chips, seeds, sweep

from fastlm import _native, ops
from fastlm.ops import _registry
from fastlm.testing import checks
from fastlm.testing.cases import CASES

CSRC = Path(__file__).parent.parent / "csrc"
INCLUDES = (str(CSRC), str(CSRC / "common"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAVE = [case for case in CASES.values() if "cuda" in _registry.backends(case.op)]

pytestmark = pytest.mark.skipif(
    _native.cuda() is None or ptx.nvcc() is None, reason="fastlm._cuda is not built, or there is no nvcc"
)


@functools.cache
def kernels() -> str:
    """The PTX of all kernels."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = sorted(CSRC.glob("cuda/*.cu"), key=lambda file: -file.stat().st_size)
        return "\n".join(pool.map(functools.partial(ptx.compile_cuda, includes=INCLUDES), files))


@contextmanager
def device(text=kernels, **options):
    """CPU tensors are taken by the cuda backend, and its kernels are executed. text(): PTX. options: of ptx.run.

    A kernel may touch the tensors that were arguments of a call into fastlm._cuda, and what the yielded function is
    told of.
    """
    tensors = []

    def remember(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                remember(item)

    class Module:
        """fastlm._cuda, that remembers what its functions are called with."""

        def __getattr__(self, name):
            found = getattr(module, name)
            if not callable(found):
                return found

            def call(*args, **named):
                remember([*args, *named.values()])
                return found(*args, **named)

            return call

    module = _native.cuda()
    with (
        mock.patch.object(_native, "cuda", Module),
        ptx.cuda_on_ptx(_native.record_cuda, text(), lambda: tensors, **options),
    ):
        yield remember


def daily(case, variant, dtype):
    """Every variant in float32 and bfloat16, the kinds in float16, which differs from bfloat16 in few instructions."""
    return dtype != torch.float16 or of_its_kind(case, variant)


@pytest.mark.parametrize(("case", "variant", "dtype"), sweep(HAVE, DTYPES, daily))
def test_error_bound(case, variant, dtype, pytestconfig):
    if dtype not in case.dtypes and dtype != torch.float16:
        pytest.skip(f"{case.op} is tested in {case.dtypes}")
    checks.error_bound(case, variant, dtype, "cpu", ["cuda"], seeds(pytestconfig, dtype), device)


@pytest.mark.parametrize(("case", "variant", "dtype", "chip"), on_chips(HAVE, DTYPES))
def test_error_bound_with_a_chips_arithmetic(case, variant, dtype, chip, pytestconfig):
    around = functools.partial(device, chip=chip)
    checks.error_bound(case, variant, dtype, "cpu", ["cuda"], seeds(pytestconfig, dtype), around)


@pytest.mark.parametrize(
    "check", [checks.non_contiguous, checks.deterministic, checks.opcheck], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("case", "variant"), sweep(HAVE))
def test_check(check, case, variant):
    check(case, variant, torch.bfloat16, "cpu", "cuda", around=device)


@pytest.mark.parametrize("case", HAVE, ids=lambda case: case.op)
def test_compile(case):
    checks.compiles(case, case.tests[0], torch.bfloat16, "cpu", "cuda", around=device)


# Packs of 8 columns: 1 and 2 a thread, of a warp, of 128 and of 512 threads. All but 400 leave threads without columns.
@pytest.mark.parametrize("cols", [64, 1600, 5120, *(pytest.param(n, marks=pytest.mark.long) for n in (400, 3000))])
def test_layer_norm_backward_of_rows_copied_ahead(cols):
    """More rows than are copied ahead, of each width; dh and dropout too. "cpu" is held to eager by its own tests."""
    generator = torch.Generator().manual_seed(cols)
    x, residual, dy, dh = torch.randn(4, 8 if cols > 512 else 33, cols, generator=generator).bfloat16()
    weight, bias, rng = torch.randn(cols, generator=generator), torch.zeros(cols), torch.tensor([3, 4])
    found = {}
    for backend in ("cpu", "cuda"):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        with device() if backend == "cuda" else nullcontext():
            options = {"residual": leaves[1], "dropout_p": 0.1, "rng": rng, "return_residual": True}
            outputs = ops.layer_norm(leaves[0], *leaves[2:], **options, backend=backend)
            found[backend] = torch.autograd.grad(outputs, leaves, (dy, dh))
    for ours, theirs in zip(found["cuda"], found["cpu"]):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-4)  # bfloat16 may be rounded the other way


def test_mlm_mask_says_how_many_ranges_of_special_ids_it_takes():
    assert _registry.column("mlm_mask", "cuda").MOST_RANGES == _native.cuda().MASK_RANGES
    ids = torch.arange(3000).view(2, 1500)
    options = {"mask_token_id": 4, "vocab_size": 3000, "seed": 1}
    with device():
        most = ops.mlm_mask(ids, special_ids=range(4, 4 + 2 * 64, 2), backend="cuda", **options)
        with pytest.raises(ValueError, match="at most 64 ranges of special ids, and there are 65"):
            ops.mlm_mask(ids, special_ids=range(4, 4 + 2 * 65, 2), backend="cuda", **options)
    for got, want in zip(most, ops.mlm_mask(ids, special_ids=range(4, 4 + 2 * 64, 2), **options)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("cols", [31, 1030])
def test_mlm_mask_of_ids_off_16_bytes(offset, cols):
    """A view that begins between two 16-byte boundaries, and an odd number of tokens: the same bits."""
    ids = torch.randint(5, 90, (3 * cols + 1,), generator=torch.Generator().manual_seed(0))[offset:][: 3 * cols]
    assert (ids.data_ptr() % 16 == 0) == (offset == 0)
    options = {"mask_token_id": 4, "vocab_size": 97, "special_ids": (0,), "seed": 1}
    with device():
        got = ops.mlm_mask(ids.view(3, cols), backend="cuda", **options)
    for theirs, want in zip(got, ops.mlm_mask(ids.view(3, cols), backend="cpu", **options)):
        assert torch.equal(theirs, want)


def test_a_grid_past_what_a_device_takes_is_an_error():
    """2^31 long rows, a block each, that lie nowhere: the error is the host's, before the launch."""
    launched = []
    _native.record_cuda(lambda *_: launched.append(_))
    try:
        with pytest.raises(ValueError, match=r"at most 2\^31 - 1 blocks of a CUDA kernel, got one of 2147483648"):
            _native.cuda().layer_norm_fwd(
                **dict.fromkeys(("x", "residual", "weight", "bias", "h", "y", "mean", "rstd", "dropout")),
                rows=2**31,
                cols=1 << 16,
                stride_x=1 << 16,
                stride_residual=0,
                eps=1e-5,
                weight_is_float=True,
                bias_is_float=True,
                dtype=0,
                place=(0, 0),
            )
    finally:
        _native.record_cuda(None)
    assert not launched
