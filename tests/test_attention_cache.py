"""attention against a preallocated cache beyond its OpCase: the results of plain attention on the valid keys, what is
not among them, lengths that are wrong, bad input."""

from contextlib import nullcontext
from importlib.util import find_spec
from unittest import mock

import ptx
import pytest
import torch
from test_attention import cu_seqlens, randn
from test_cuda import device as cuda_on_ptx

from fastlm import _native, ops
from fastlm.ops import _registry
from fastlm.testing import checks
from fastlm.testing.cases import CASES

LENGTHS, ROWS, HEADS, KV, D = (0, 1, 70, 33), 70, 4, 2, 16


def caches(dtype=torch.float32):
    """k and v (4, ROWS, KV, D) and their lengths; NaN past the valid keys."""
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    unwritten = (torch.arange(ROWS) >= lengths[:, None])[..., None, None]
    k, v = (torch.where(unwritten, torch.nan, randn(4, ROWS, KV, D, seed=seed)).to(dtype) for seed in (1, 2))
    return k, v, lengths


OPTIONS = {
    "bare": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (9, -1), "softcap": 2.0},
    "bias": {"causal": True, "relative_bias": ops.RelativeBias(randn(8, HEADS, seed=3), False, 20)},
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_attention_over_the_valid_keys(name, backend):
    """One sequence at a time, for queries fewer and more than the keys, and the same from packed queries."""
    options = {**OPTIONS[name], "return_lse": True}
    k, v, lengths = caches()
    for queries in (1, 3, 20):  # few rows, and tiles of them
        q = randn(4, queries, HEADS, D)
        out, lse = ops.attention(q, k, v, cache_seqlens=lengths, backend=backend, **options)
        for b, n in enumerate(LENGTHS):
            one = (x[b : b + 1] for x in (q, k[:, :n], v[:, :n]))
            want, want_lse = ops.attention(*one, backend="reference", **options)
            torch.testing.assert_close(out[b : b + 1], want, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(lse[b : b + 1], want_lse, rtol=1e-5, atol=1e-6)
        assert not out[0].any()
        assert (lse[0] == -torch.inf).all()
        packed = {"cu_seqlens_q": cu_seqlens((queries,) * 4), "max_seqlen_q": queries + 1}
        rows, rows_lse = ops.attention(
            q.flatten(0, 1), k, v, cache_seqlens=lengths, backend=backend, **packed, **options
        )
        torch.testing.assert_close(rows.view_as(out), out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows_lse.view(HEADS, 4, queries).transpose(0, 1), lse, rtol=1e-5, atol=1e-6)


CASE = CASES["attention"]
PACKED_VARIANT, DECODE = (variant for variant in CASE.tests if variant.inference)
NO_CUDA = pytest.mark.skipif(_native.cuda() is None or ptx.nvcc() is None, reason="no fastlm._cuda, or no nvcc")
NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
ON_GPUS = [pytest.param("triton", marks=NO_TRITON), pytest.param("cuda", marks=NO_CUDA)]
AROUND = {"cpu": nullcontext, "triton": ptx.triton_on_ptx, "cuda": cuda_on_ptx}


def run_unchecked(variant, inputs, backend):
    """out and lse, as on a device, where nothing looks at the values of lengths."""
    column = _registry.column("attention", backend)
    with mock.patch.object(column, "check_cached"), AROUND[backend]():
        return CASE.run(CASE.function, variant, inputs, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", *ON_GPUS])
def test_rows_that_are_not_written_have_no_effect_and_a_wrong_length_is_nan(backend):
    """NaN past the valid keys changes no bit, in one sequence the whole cache. The other sequence keeps its results."""
    inputs = CASE.inputs(DECODE, 0, torch.bfloat16)
    out, lse = run_unchecked(DECODE, inputs, backend)
    assert out[0].all()
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()
    unwritten = (torch.arange(320) >= inputs["cache_seqlens"][:, None])[..., None, None]
    k, v = (inputs[name].masked_fill(unwritten, torch.nan) for name in ("k", "v"))
    got = run_unchecked(DECODE, {**inputs, "k": k, "v": v}, backend)
    assert torch.equal(got[0], out)
    assert torch.equal(got[1], lse)
    if backend == "cpu":  # whose values are checked
        return
    for wrong in (321, 2**31 - 1, -1, -(2**31)):
        lengths = torch.tensor([300, wrong], dtype=torch.int32)
        got = run_unchecked(DECODE, {**inputs, "cache_seqlens": lengths}, backend)
        assert torch.equal(got[0][0], out[0])
        assert got[0][1].isnan().all()
        assert got[1][1].isnan().all()


@pytest.mark.parametrize("backend", ON_GPUS)
def test_wrong_cu_seqlens(backend):
    """On a device: NaN everywhere if they fall or leave the tensors, and where a row has no sequence."""
    inputs = CASE.inputs(PACKED_VARIANT, 0, torch.bfloat16)
    want, _ = run_unchecked(PACKED_VARIANT, inputs, backend)
    for cu in ([0, 9, 5, 8, 12], [0, 1, 1, 10, 40], [-3, 1, 1, 10, 12]):
        wrong = {**inputs, "cu_seqlens_q": torch.tensor(cu, dtype=torch.int32)}
        out, lse = run_unchecked(PACKED_VARIANT, wrong, backend)
        assert out.isnan().all()
        assert lse.isnan().all()
    fewer = {**inputs, "cu_seqlens_q": torch.tensor([0, 1, 1, 10, 10], dtype=torch.int32)}
    out, lse = run_unchecked(PACKED_VARIANT, fewer, backend)
    assert torch.equal(out[:10], want[:10])
    assert out[10:].isnan().all()
    assert lse[:, 10:].isnan().all()
    out, _ = run_unchecked(PACKED_VARIANT, {**inputs, "max_seqlen_q": 8}, backend)
    assert out[1:10].isnan().all()
    assert torch.equal(out[:1], want[:1])


def test_one_graph():
    checks.compiles(CASE, DECODE, torch.float32, "cpu", "cpu")


Q, CACHE = torch.zeros(2, 1, 4, 8), torch.zeros(2, 6, 2, 8)
CACHED = {"k": CACHE, "v": CACHE, "cache_seqlens": torch.tensor([6, 0], dtype=torch.int32)}
BAD = {
    "cache_seqlens: expected torch.int32": {"cache_seqlens": torch.tensor([6, 0])},
    "cache_seqlens: expected shape (2,), got (1,)": {"cache_seqlens": torch.ones(1, dtype=torch.int32)},
    "cache_seqlens: expected a tensor, got list": {"cache_seqlens": [1, 2]},
    "cache_seqlens: expected numbers of keys in [0, 6]": {"cache_seqlens": torch.tensor([7, 0], dtype=torch.int32)},
    "cache_seqlens: expected numbers": {"cache_seqlens": torch.tensor([-1, 0], dtype=torch.int32)},
    "k: expected shape (2, *, *, 8), got (3, 6, 2, 8)": {"k": torch.zeros(3, 6, 2, 8)},
    "v: expected shape (2, 6, 2, 8), got (2, 5, 2, 8)": {"v": CACHE[:, :5]},
    "cu_seqlens_k: expected None with cache_seqlens": {"cu_seqlens_k": cu_seqlens((6, 0))},
    "key_mask: expected None with cache_seqlens": {"key_mask": torch.ones(2, 6, dtype=torch.bool)},
    "dropout_p: expected 0 with cache_seqlens": {"dropout_p": 0.5},
    "relative_bias: expected a RelativeBias": {"relative_bias": torch.zeros(8, 4)},
    "q: expected no gradient to be needed with cache_seqlens": {"q": torch.zeros(2, 1, 4, 8, requires_grad=True)},
    "relative_bias.table: expected no gradient": {
        "relative_bias": ops.RelativeBias(torch.zeros(8, 4, requires_grad=True))
    },
    "max_seqlen_q: expected with cu_seqlens_q": {"q": Q[:, 0], "cu_seqlens_q": cu_seqlens((1, 1))},
    "k: expected shape (1, *, *, 8)": {"q": Q[:, 0], "cu_seqlens_q": cu_seqlens((2,)), "max_seqlen_q": 2},
    "max_seqlen_q: expected at least": {"q": Q[:, 0], "cu_seqlens_q": cu_seqlens((2, 0)), "max_seqlen_q": 1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError) as error:
        ops.attention(**{"q": Q, **CACHED, **BAD[message]})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("backend", ["sdpa"])
def test_backends_without_a_cache_say_so(backend):
    with pytest.raises(ValueError, match="takes no cache_seqlens"):
        ops.attention(Q, **CACHED, backend=backend)


def test_a_tensor_that_requires_a_gradient_is_taken_where_none_is_recorded():
    q = torch.zeros(2, 1, 4, 8, requires_grad=True)
    with torch.no_grad():
        assert ops.attention(q, **CACHED).shape == q.shape
