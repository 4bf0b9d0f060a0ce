"""attention against a preallocated cache: the results of plain attention on the valid keys; bad input."""

import pytest
import torch
from test_attention import cu_seqlens, randn

from fastlm import ops

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


@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_attention_over_the_valid_keys(name, backend):
    """One sequence at a time, for queries fewer and more than the keys, and the same from packed queries."""
    options = {**OPTIONS[name], "return_lse": True}
    k, v, lengths = caches()
    for queries in (1, 3):
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
