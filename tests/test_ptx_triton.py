"""The features of Triton that the kernels use give the same results on the interpreter as in NumPy and torch.

Under triton_on_ptx: CPU tensors, outputs from torch.empty, arguments of every kind that a launcher passes.
"""

import numpy as np
import ptx
import pytest
import torch

triton = pytest.importorskip("triton")
from ptx.sources import triton_features as tf  # noqa: E402


@pytest.fixture(autouse=True)
def launches():
    with ptx.triton_on_ptx() as out:
        yield out


def rng(seed=0):
    return np.random.default_rng(seed)


def ints(*shape, low=-(2**31), high=2**31, dtype=np.int32):
    return torch.from_numpy(rng(1).integers(low, high, shape).astype(dtype))


# ---- along an axis -------------------------------------------------------------------------------------------------


def moments(**options):
    x = torch.from_numpy(rng().standard_normal((4, 100)).astype(np.float32)) + 3
    mean, var, arg = torch.empty(4), torch.empty(4), torch.empty(4, dtype=torch.int32)
    tf.reduce_with[(1,)](x, mean, var, arg, 100, BLOCK_M=4, BLOCK_N=128, **options)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var(1, unbiased=False), rtol=1e-5, atol=0)
    assert torch.equal(arg.long(), x.argmax(1))


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8, 16])
def test_reduce_with_a_combine_function(num_warps):
    moments(num_warps=num_warps, enable_fp_fusion=False)


def test_reduce_that_is_not_commutative_to_the_bit_is_a_race():
    """Fused, a combine function gives its two lanes different bits, and Triton lets both store the one result."""
    with pytest.raises(ptx.KernelFault, match="race"):
        moments(num_warps=1)


@pytest.mark.parametrize("num_warps", [1, 4])
def test_associative_scan_is_exact_on_integers(num_warps):
    a, b = ints(4, 64), ints(4, 64).flip(1).contiguous()
    y, sums, products = (torch.empty_like(a) for _ in range(3))
    tf.scans[(1,)](a, b, y, sums, products, BLOCK_M=4, BLOCK_N=64, num_warps=num_warps)
    with np.errstate(over="ignore"):
        expected = [b.numpy()[:, 0]]
        for t in range(1, 64):
            expected.append(a.numpy()[:, t] * expected[-1] + b.numpy()[:, t])
        np.testing.assert_array_equal(y, np.stack(expected, 1))
        np.testing.assert_array_equal(sums, b.numpy()[:, ::-1].cumsum(1, dtype=np.int32)[:, ::-1])
        np.testing.assert_array_equal(products, a.numpy().cumprod(0, dtype=np.int32))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.int64])
def test_sort_of_rows(dtype, descending):
    x = ints(8, 64, low=-1000, high=1000).to(dtype)
    y = torch.empty_like(x)
    tf.sort_rows[(1,)](x, y, BLOCK_M=8, BLOCK_N=64, DESCENDING=descending)
    assert torch.equal(y, x.sort(1, descending=descending).values)


def test_histogram():
    x = ints(200, low=0, high=16)
    out = torch.empty(16, dtype=torch.int32)
    tf.histogram[(1,)](x, out, 200, BLOCK=256, BINS=16)
    assert torch.equal(out.long(), torch.bincount(x, minlength=16))


def test_gather():
    x, index = ints(32, 16), ints(32, 16, low=0, high=32)
    y = torch.empty_like(x)
    tf.gather[(1,)](x, index, y, ROWS=32, COLS=16)
    assert torch.equal(y, x.gather(0, index.long()))


def test_split_join_transpose_and_flip():
    x = ints(256)
    y = torch.empty_like(x)
    tf.rearrange[(1,)](x, y, BLOCK=256)
    assert torch.equal(y, x.view(-1, 2).flip(1).reshape(4, 64).T.reshape(-1).flip(0))


# ---- atomics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_atomics(dtype):
    x = ints(300, low=-4, high=5).to(dtype)  # sums are exact in every type
    sums, largest = torch.zeros(4, dtype=dtype), torch.full((1,), -torch.inf)
    bits, last = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    tf.atomics[(3,)](x, sums, largest, bits, last, 300, BLOCK=128)
    assert torch.equal(sums, torch.stack([x[k::4].double().sum() for k in range(4)]).to(dtype))
    assert largest == x.max()
    assert (bits.item(), last.tolist()) == (7, [2, 3])


def test_lock_orders_blocks():
    """One element a thread: of the rest Triton would make copies, which read what the first of them writes back."""
    x, lock, total = ints(5, 64), torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    tf.locked_sum[(5,)](x, lock, total, BLOCK=64, num_warps=2)
    assert torch.equal(total, x.sum(0, dtype=torch.int32))


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def test_functions_of_libdevice():
    n = 100
    x = torch.linspace(0.01, 7.9, n)
    y = torch.empty(13, n)
    tf.functions[(1,)](x, y, n, BLOCK=128)
    v = x.double()
    exact = [
        v.erf(),
        (-v).exp(),
        v.exp2(),
        v.rsqrt(),
        v.tanh(),
        v.log(),
        v.log1p(),
        v.sin(),
        v.sigmoid(),
        v**1.5,
        1 / v,
        v.sqrt(),
        torch.erfinv(v / 8),
    ]
    for k, expected in enumerate(exact):
        torch.testing.assert_close(y[k].double(), expected, rtol=4e-7, atol=4e-7, msg=lambda m, k=k: f"row {k}: {m}")
    assert torch.equal(y[10], 1 / x)  # correctly rounded
    np.testing.assert_array_equal(y[11], np.sqrt(x.numpy()))  # and so is NumPy's, unlike torch's


@pytest.mark.parametrize("divisor", [7, -3, 16])
def test_integers(divisor):
    n = 200
    x = ints(n)
    x[:4] = torch.tensor([0, -1, 2**31 - 1, -(2**31) + 1])
    y, hi = torch.empty(3, n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    hi64 = torch.empty(n, dtype=torch.int64)
    tf.integers[(1,)](x, y, hi, hi64, n, divisor, BLOCK=256)
    assert torch.equal(y[0], torch.div(x, divisor, rounding_mode="trunc"))
    assert torch.equal(y[1], torch.fmod(x, divisor))
    assert torch.equal(y[2], x.abs() >> 3)
    words = x.numpy().view(np.uint32).astype(np.uint64)
    np.testing.assert_array_equal(hi.numpy().view(np.uint32), words * np.uint64(0xD2511F53) >> np.uint64(32))
    wide = [(v % 2**64) ** 2 >> 64 for v in x.tolist()]
    np.testing.assert_array_equal(hi64.numpy().view(np.uint64), np.array(wide, np.uint64))


def test_casts():
    x = torch.from_numpy(rng(2).standard_normal(256).astype(np.float32)) * 40
    out = [
        torch.empty(256, dtype=d)
        for d in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float32, torch.int32)
    ]
    tf.casts[(1,)](x, *out, BLOCK=256)
    expected = [
        x.half(),
        x.bfloat16(),
        x.double() / 3,
        x.to(torch.int8),
        x.to(torch.float8_e5m2).float(),
        x.view(torch.int32),
    ]
    for got, want in zip(out, expected):
        assert torch.equal(got, want), want.dtype


@pytest.mark.parametrize(
    ("dtype", "precision", "out"),
    [
        (torch.bfloat16, "tf32", torch.float32),
        (torch.float16, "tf32", torch.float16),
        (torch.float32, "tf32x3", torch.float32),
        (torch.float32, "ieee", torch.float32),
        (torch.float32, "bf16x3", torch.float32),
        (torch.float64, "ieee", torch.float64),
    ],
)
def test_batched_dot_is_exact_on_integers(dtype, precision, out):
    a, b = (x.to(dtype) for x in ints(2, 2, 16, 16, low=-8, high=9))
    c = torch.empty(2, 16, 16, dtype=out)
    tf.batched_dot[(1,)](a, b, c, PRECISION=precision, OUT=getattr(tf.tl, str(out)[6:]))
    assert torch.equal(c.double(), a.double() @ b.double())


def test_selection():
    x = torch.from_numpy(rng(3).standard_normal(50).astype(np.float32)) / 8
    top, place, y = torch.empty(4), torch.empty(1, dtype=torch.int32), torch.empty(50)
    tf.selection[(1,)](x, top, place, y, 50, BLOCK=64, debug=True)
    assert torch.equal(top, x.topk(4).values)
    assert place == x.argmax()
    assert torch.equal(y, x.clamp(-1, 1))


def test_int8_dot_is_exact():
    a, b = ints(32, 64, low=-128, high=128, dtype=np.int8), ints(64, 16, low=-128, high=128, dtype=np.int8)
    c = torch.empty(32, 16, dtype=torch.int32)
    tf.dot_int8[(1,)](a, b, c, M=32, N=16, K=64)
    assert torch.equal(c, a.int() @ b.int())


# ---- addresses, loops and launches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_pipelined_loop(stages):
    x = ints(9, 256, low=-50, high=50).float()
    y = torch.empty(256)
    tf.pipelined_sum[(2,)](x, y, 9, 256, BLOCK=128, STAGES=stages)
    assert torch.equal(y, x.sum(0))


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.parametrize("num_warps", [1, 4, 8, 16])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_block_pointers_in_a_pipelined_matmul(launches, stages, num_warps):
    m, n, k = 50, 40, 96
    a, b = (ints(*shape, low=-8, high=9).bfloat16() for shape in ((m, k), (k, n)))
    c = torch.empty(m, n)
    tf.pipelined_matmul[(1, 2)](
        a, b, c, m, n, k, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, STAGES=stages, num_warps=num_warps
    )
    assert torch.equal(c, a.float() @ b.float())
    assert (launches.reports[0][1].count("cp.async") > 0) == (stages > 1)


def test_tensor_descriptors():
    x, y = torch.randn(40, 32), torch.empty(40, 32)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    tf.descriptors[(3,)](x, y, 40, 32, BLOCK_M=16, BLOCK_N=32)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("grid", [(3,), (3, 2), (3, 2, 4), (1, 1, 2)])
def test_grid(grid):
    y = torch.empty((*grid, 1, 1)[:3][::-1], dtype=torch.int32)
    tf.grid_of_three[grid](y)
    z, y_, x = np.indices(y.shape)
    np.testing.assert_array_equal(y, x + 10 * y_ + 100 * z)


def test_empty_grid_launches_nothing(launches):
    tf.grid_of_three[(0,)](torch.empty(1, dtype=torch.int32))
    assert launches.kernels() == []


def test_offsets_past_32_bits():
    x, y = ints(64), torch.empty(64, dtype=torch.int32)
    tf.far_offsets[(1,)](x, y, 1 << 40, 1 << 40, BLOCK=64)
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["narrow", "wide"])
def test_arguments_of_every_kind(kind, bias):
    n = 50
    y, keep = torch.empty(n), torch.arange(n) % 3 == 0
    bias = torch.randn(n) if bias else None
    for start in (1, 16, 17):  # no variants of the kernel for these
        before = keep.clone()
        tf.arguments[(1,)](
            y, keep, bias, n, start, 5 << 40, 0xF << 60, start == 16, 0.5, 1e-3, KIND=kind, BLOCK=64, num_warps=2
        )
        expected = torch.arange(n) * np.float32(0.5) + np.float32(1e-3) + start
        expected = expected + (bias if bias is not None else 0) + (20 if kind == "wide" else 0)
        expected = torch.where(before, -expected if start == 16 else expected, 0)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(keep, torch.arange(n) % 2 == 0)


def test_arguments_that_are_strided_views_parameters_and_reinterpreted():
    base = torch.empty(64, 2, dtype=torch.int32)
    x, y = torch.nn.Parameter(ints(64).float()), base[:, 1]
    with pytest.raises(ptx.KernelFault, match="bounds"):  # the kernel's unit stride leaves the view's elements
        tf.far_offsets[(1,)](x, y, 1 << 40, 1 << 40, BLOCK=64)
    out = torch.empty(64)
    tf.far_offsets[(1,)](x, out, 1 << 40, 1 << 40, BLOCK=64)
    assert torch.equal(out, x + 1)
    words = torch.empty(64, dtype=torch.float32)
    tf.far_offsets[(1,)](
        triton.reinterpret(x, tf.tl.int32), triton.reinterpret(words, tf.tl.int32), 1 << 40, 1 << 40, BLOCK=64
    )
    assert torch.equal(words.view(torch.int32), x.view(torch.int32) + 1)


def test_memory_from_torch_empty_is_unwritten_until_the_host_or_a_kernel_writes_it():
    view = torch.empty(64, 2, dtype=torch.uint8).T[0]  # the tensor itself is gone
    y = torch.empty(64, dtype=torch.uint8)
    for n in (0, 1):
        with pytest.raises(ptx.KernelFault, match="uninitialised"):
            tf.copy[(1,)](view, y, 64, 2, BLOCK=64)
        if n == 0:
            view[:40] = torch.randint(0, 256, (40,))
            tf.copy[(1,)](view, y, 40, 2, BLOCK=64)
            assert torch.equal(y[:40], view[:40])
    view.fill_(255)  # as unwritten memory also looks, in places
    tf.copy[(1,)](view, y, 64, 2, BLOCK=64)
    assert (y == 255).all()
    order = torch.empty_permuted((4, 16), (1, 0), dtype=torch.uint8)
    with pytest.raises(ptx.KernelFault, match="uninitialised"):
        tf.copy[(1,)](order, y, 64, 1, BLOCK=64)


def test_device_print(launches):
    tf.prints[(1,)](torch.arange(32, dtype=torch.int32), BLOCK=32, num_warps=1)
    lines = launches.reports[0][1].printed.splitlines()
    assert lines == [f"pid (0, 0, 0) idx ({k:2}) x is: {k}" for k in range(32)]
