"""Small kernels compiled by nvcc and Triton give the results of NumPy on the interpreter."""

import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy_philox
import ptx
import pytest
import torch

SOURCES = Path(__file__).parent / "ptx" / "sources"
triton = pytest.importorskip("triton")
from ptx.sources import triton_kernels as tk  # noqa: E402


@pytest.fixture(scope="module")
def cuda():
    """launch(entry, grid, block, *args) of a kernel in sources/known.cu."""
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not installed")
    text = ptx.compile_cuda(SOURCES / "known.cu")

    def launch(entry, grid, block, *args, **options):
        return ptx.run(text, entry, grid, block, args, **options)

    return launch


def bf16(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape)).bfloat16()


def softmax_reference(x):
    x = x.double()
    return torch.softmax(x, -1)


def philox_reference(n, seed):
    return np.stack(numpy_philox.words((np.arange(n), 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32)), -1).astype(np.uint32)


def close(out, exact, eps):
    """Within a rounding to `eps` and the last bits of the arithmetic before it."""
    error = (out.double() - exact).abs()
    assert (error <= exact.abs() * eps * 1.01 + 1e-6).all(), error.max()


# ---- CUDA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 33, 300])
def test_cuda_softmax(cuda, cols):
    x = bf16(np.random.default_rng(0), 3, cols)
    y = ptx.uninitialised(torch.empty_like(x))
    cuda("softmax", 3, 128, x, y, cols)
    close(y, softmax_reference(x), 2**-8)


def test_cuda_layer_norm(cuda):
    rng = np.random.default_rng(1)
    x, w, b = bf16(rng, 5, 264) * 2 + 1, torch.randn(264), torch.randn(264)
    y = ptx.uninitialised(torch.empty_like(x))
    cuda("layer_norm", 2, 128, x, w, b, y, 5, 264, 1e-5)
    exact = torch.nn.functional.layer_norm(x.double(), (264,), w.double(), b.double(), 1e-5)
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_cuda_reduction_with_atomics_is_exact(cuda):
    x = np.random.default_rng(2).integers(-1000, 1000, (3, 500), dtype=np.int32)
    sums, total = np.zeros(3, np.int32), np.zeros(1, np.int64)
    cuda("row_sums", (4, 3), 128, x, sums, total, 500)
    np.testing.assert_array_equal(sums, x.sum(1))
    assert total[0] == x.sum()


def test_cuda_last_block_reads_what_fences_publish(cuda):
    x = np.random.default_rng(3).integers(-1000, 1000, 1000, dtype=np.int32)
    partial, arrived, out = ptx.uninitialised(np.empty(8, np.int32)), np.zeros(1, np.uint32), np.zeros(1, np.int32)
    cuda("last_block_sum", 8, 128, x, partial, arrived, out, 1000)
    assert out[0] == x.sum()


def test_cuda_tiles_of_a_warp_and_compare_and_swap(cuda):
    x, out = torch.randn(1000), torch.full((1,), -torch.inf)
    cuda("largest", 8, 128, x, out, 1000)
    assert out == x.max()


def test_cuda_philox_is_exact(cuda):
    out = ptx.uninitialised(np.empty((100, 4), np.uint32))
    cuda("philox", 1, 128, out, 0x123456789ABCDEF, 100)
    np.testing.assert_array_equal(out, philox_reference(100, 0x123456789ABCDEF))


def test_cuda_scan_is_exact(cuda):
    x = np.random.default_rng(4).integers(-(2**31), 2**31, (2, 256)).astype(np.int32)
    y = ptx.uninitialised(np.empty_like(x))
    cuda("scan", 2, 256, x, y)
    np.testing.assert_array_equal(y, np.cumsum(x, 1, dtype=np.int32))


def test_cuda_sort_is_exact(cuda):
    x = np.random.default_rng(5).standard_normal((2, 512)).astype(np.float32)
    y = ptx.uninitialised(np.empty_like(x))
    cuda("sort", 2, 256, x, y)
    np.testing.assert_array_equal(y, np.sort(x, 1))


@pytest.mark.parametrize(
    ("entry", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("tf32", torch.float32)]
)
def test_cuda_matmul_is_exact_on_integers(cuda, entry, dtype):
    rng = np.random.default_rng(6)
    a, b = (torch.from_numpy(rng.integers(-8, 9, shape)).to(dtype) for shape in ((32, 48), (48, 24)))
    c = ptx.uninitialised(torch.empty(32, 24))
    report = cuda(f"matmul_{entry}", (3, 2), 32, a, b, c, 24, 48)
    assert torch.equal(c, a.float() @ b.float())
    assert report.count("mma") == 6 * 48 // (8 if entry == "tf32" else 16)


def test_cuda_int8_matmul_is_exact(cuda):
    a, bt = np.random.default_rng(7).integers(-128, 128, (2, 32, 64)).astype(np.int8)
    c = ptx.uninitialised(np.empty((32, 32), np.int32))
    cuda("matmul_int8", (4, 2), 32, a, bt, c, 32, 64)
    np.testing.assert_array_equal(c, a.astype(np.int32) @ bt.astype(np.int32).T)


def test_cuda_calls_local_memory_switch_and_printf(cuda):
    n = 70
    steps, switched = (ptx.uninitialised(np.empty(n, np.int32)) for _ in range(2))
    values, sines = ptx.uninitialised(np.empty(n)), ptx.uninitialised(np.empty(n, np.float32))
    report = cuda("leftovers", 2, 64, steps, values, switched, sines, n)

    def collatz(m):
        count = 0
        while m != 1:
            m, count = (3 * m + 1 if m % 2 else m // 2), count + 1
        return count

    def horner(x):  # nvcc fuses the product and the sum: one rounding
        y = 0.0
        for c in (1e-3, 3.0, 0.25, -0.5, 1.0):
            y = float(Fraction(y) * Fraction(x) + Fraction(c))
        return y

    i = np.arange(n)
    np.testing.assert_array_equal(steps, [collatz(k + 1) for k in range(n)])
    np.testing.assert_array_equal(values, [horner(k * 0.125) for k in range(n)])
    cases = [
        i * 3,
        i // 3,
        i ^ 0x55,
        [k.bit_count() for k in range(n)],
        [32 - k.bit_length() for k in range(n)],
        -i,
        -i,
    ]
    np.testing.assert_array_equal(switched, [cases[k % 7][k] for k in range(n)])
    np.testing.assert_allclose(sines, np.sin(i.astype(np.float32) * np.float32(1e4), dtype=np.float64), atol=2e-7)
    assert report.printed == f"thread 3 of 64: hello {values[3]:.3f} {1 << 40}%\n"


# ---- Triton --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 300])
def test_triton_softmax(cols):
    x = bf16(np.random.default_rng(0), 3, cols)
    with ptx.triton_on_ptx():
        y = torch.empty_like(x)
        tk.softmax[(3,)](x, y, cols, BLOCK=512)
    close(y, softmax_reference(x), 2**-8)


def test_triton_layer_norm():
    x, w, b = bf16(np.random.default_rng(1), 5, 264) * 2 + 1, torch.randn(264), torch.randn(264)
    with ptx.triton_on_ptx():
        y = torch.empty_like(x)
        tk.layer_norm[(5,)](x, w, b, y, 264, 1e-5, BLOCK=512)
    exact = torch.nn.functional.layer_norm(x.double(), (264,), w.double(), b.double(), 1e-5)
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "tf32"), (torch.float16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee")],
)
def test_triton_matmul_is_exact_on_integers(dtype, precision):
    rng = np.random.default_rng(6)
    m, n, k = 50, 40, 72
    a, b = (torch.from_numpy(rng.integers(-8, 9, shape)).to(dtype) for shape in ((m, k), (k, n)))
    with ptx.triton_on_ptx() as launches:
        c = torch.empty(m, n)
        tk.matmul[(2, 2)](
            a, b, c, m, n, k, k, n, n, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, PRECISION=precision, num_stages=3
        )
    assert torch.equal(c, a.float() @ b.float())
    assert (launches.reports[0][1].count("mma") > 0) == (precision == "tf32")


def test_triton_reduction_with_atomics_is_exact():
    x = np.random.default_rng(2).integers(-1000, 1000, (3, 500), dtype=np.int32)
    x, sums = torch.from_numpy(x), torch.zeros(3, dtype=torch.int32)
    with ptx.triton_on_ptx():
        tk.row_sums[(4, 3)](x, sums, 3, 500, BLOCK=128)
    assert torch.equal(sums.long(), x.sum(1))


def test_triton_philox_is_exact():
    with ptx.triton_on_ptx():
        out = torch.empty(100, 4, dtype=torch.int32)
        tk.philox[(1,)](out, 0x123456789ABCDEF, 100, BLOCK=128)
    np.testing.assert_array_equal(out.numpy().view(np.uint32), philox_reference(100, 0x123456789ABCDEF))


def test_triton_scan_is_exact():
    x = torch.from_numpy(np.random.default_rng(4).integers(-(2**31), 2**31, (2, 256)).astype(np.int32))
    with ptx.triton_on_ptx():
        y = torch.empty_like(x)
        tk.scan[(2,)](x, y, BLOCK=256)
    np.testing.assert_array_equal(y, np.cumsum(x.numpy(), 1, dtype=np.int32))


def test_triton_sort_is_exact():
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 256)).astype(np.float32))
    with ptx.triton_on_ptx():
        y = torch.empty_like(x)
        tk.sort[(2,)](x, y, BLOCK=256)
    assert torch.equal(y, x.sort(1).values)


def attend(q, k, v, causal, **options):
    tokens, heads, d = q.shape
    grid = (triton.cdiv(tokens, 64), heads)
    with ptx.triton_on_ptx(**options) as launches:
        out = torch.empty_like(q)
        start = time.perf_counter()
        tk.attention[grid](
            q, k, v, out, heads * d, d, tokens, d**-0.5, BLOCK_M=64, BLOCK_N=64, D=d, CAUSAL=causal, num_stages=2
        )
        launches.seconds = time.perf_counter() - start
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q, k, v)), is_causal=causal
    )
    return out, exact.transpose(0, 1), launches


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [200, 256])
def test_triton_attention_in_bf16(tokens, causal):
    rng = np.random.default_rng(8)
    out, exact, launches = attend(*(bf16(rng, tokens, 2, 64) for _ in range(3)), causal)
    assert (out.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    report = launches.reports[0][1]
    for opcode in ("mma.sync.aligned.m16n8k16.row.col.f32.bf16", "cp.async", "ldmatrix"):
        assert report.count(opcode)


@pytest.mark.long  # a clock, which other work on the machine slows down
def test_triton_attention_takes_less_than_three_seconds():
    """256 tokens, 2 heads, d 64, every check on; compiled before."""
    inputs = [bf16(np.random.default_rng(9), 256, 2, 64) for _ in range(3)]
    attend(*inputs, False)
    seconds = min(attend(*inputs, False)[2].seconds for _ in range(3))
    print(f"\nbf16 attention forward, 256 tokens, 2 heads, d 64: {seconds:.3f} s")
    assert seconds < 3


def test_triton_launch_specialises_as_the_device_launcher_does():
    """Integers that are 1 become constants, and a callable grid sees the meta-parameters."""
    x, y = bf16(np.random.default_rng(0), 4, 1), torch.zeros(4, 1, dtype=torch.bfloat16)
    with ptx.triton_on_ptx() as launches:
        tk.softmax[lambda meta: (meta["BLOCK"] // 4,)](x, y, 1, BLOCK=16)
    assert (y == 1).all()
    assert launches.kernels() == ["softmax"]
