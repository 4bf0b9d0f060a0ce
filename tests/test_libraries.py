"""The backends "flash_attn" and "apex" beside stand-ins with the libraries' signatures and meaning."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fastlm import info, ops
from fastlm.ops import _registry


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Its definition: windows at least as long as the keys are no limit; aligned to the last query and key."""
    left, right = (-1 if w >= k.shape[1] else w for w in window_size)
    assert -1 <= left < 2**31
    assert dropout_p == 0.0
    right = 0 if causal else right
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    place = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    hidden = (place > right if right >= 0 else place > k.shape[1] + q.shape[1]) | ((place < -left) & (left >= 0))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **options):
    bounds = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:])
    return torch.cat([flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0] for a, b, c, d in bounds])


def fused_layer_norm(input, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.layer_norm(input, normalized_shape, None, None, eps)


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype == bias.dtype
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def fused_rms_norm(input, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.rms_norm(input, normalized_shape, None, eps)


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.rms_norm(input, normalized_shape, weight, eps)


@pytest.fixture
def libraries(monkeypatch):
    """Both are installed, and run on CPU tensors of any dtype."""
    flash, norms = ModuleType("flash_attn"), ModuleType("apex.normalization.fused_layer_norm")
    flash.flash_attn_func, flash.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    for function in (fused_layer_norm, fused_layer_norm_affine, fused_rms_norm, fused_rms_norm_affine):
        setattr(norms, function.__name__, function)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", norms)
    monkeypatch.setattr(_registry, "_missing", lambda backend, device: None)
    monkeypatch.setattr(_registry, "_FLOATS", {})


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def agrees(function, inputs, backend):
    """Outputs and gradients are those of the reference."""
    got, want = (function(backend=name) for name in (backend, "reference"))
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(sum(x.square().sum() for x in out), inputs) for out in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (3, 5)},
        {"window_size": (2**40, 0)},
        {"softcap": 5.0, "softmax_scale": 0.3},
    ],
    ids=str,
)
def test_flash_attn_padded_and_packed(libraries, options):
    q, k, v = randn(2, 9, 4, 8), randn(2, 12, 2, 8, seed=1), randn(2, 12, 2, 8, seed=2)
    agrees(lambda backend: ops.attention(q, k, v, backend=backend, **options), (q, k, v), "flash_attn")
    q, k = randn(12, 4, 8), randn(12, 2, 8, seed=1)
    lengths = {"cu_seqlens_q": torch.tensor([0, 5, 12], dtype=torch.int32), "max_seqlen_q": 7}
    agrees(lambda backend: ops.attention(q, k, k, backend=backend, **lengths, **options), (q, k), "flash_attn")


def test_flash_attn_refuses_what_it_does_not_have(libraries):
    q = randn(2, 6, 2, 8)
    refused = [
        ({"dropout_p": 0.1}, "dropout bits"),
        ({"return_lse": True}, "no gradient"),
        ({"key_mask": torch.ones(2, 6, dtype=torch.bool)}, "no key_mask; pack the sequences"),
        ({"relative_bias": ops.RelativeBias(randn(8, 2), True, 20)}, "no relative_bias"),
    ]
    for options, reason in refused:
        with pytest.raises(ValueError, match=f'backend="flash_attn" cannot run attention here: .*{reason}'):
            ops.attention(q, q, q, backend="flash_attn", **options)
    with pytest.raises(ValueError, match="head dimensions up to 256"):
        ops.attention(*[randn(1, 2, 1, 264)] * 3, backend="flash_attn")
    k = q[:, :2]
    with pytest.raises(ValueError, match=r"window_size: .* below the number of keys, 2"):
        ops.attention(q, k, k, window_size=(-1, 3), backend="flash_attn")


def test_apex_norms(libraries):
    x, residual, weight, bias = randn(3, 5, 8), randn(3, 5, 8, seed=1), randn(8, seed=2), randn(8, seed=3)
    for given in ((weight, bias), (weight, None), (None, None)):
        used = [x, residual, *(p for p in given if p is not None)]
        options = {"residual": residual, "return_residual": True, "eps": 1e-3}
        agrees(lambda backend: ops.layer_norm(x, *given, backend=backend, **options), used, "apex")  # noqa: B023
    for given in (weight, None):
        used = [x, *([] if given is None else [given])]
        agrees(lambda backend: ops.rms_norm(x, given, backend=backend), used, "apex")  # noqa: B023


def test_apex_refuses_what_it_does_not_have(libraries):
    x = randn(3, 8)
    with pytest.raises(ValueError, match='backend="apex" cannot run layer_norm here: apex has no dropout'):
        ops.layer_norm(x, dropout_p=0.1, backend="apex")
    with pytest.raises(ValueError, match=r"weight and bias in x's dtype, torch.bfloat16, not torch.float32"):
        ops.layer_norm(x.bfloat16(), torch.ones(8), backend="apex")
    with pytest.raises(ValueError, match="no empty input"):
        ops.layer_norm(x[:0], backend="apex")


@pytest.mark.parametrize(("op", "backend"), [("attention", "flash_attn"), ("layer_norm", "apex"), ("rms_norm", "apex")])
def test_they_are_in_info_and_never_chosen(op, backend, monkeypatch):
    assert backend in _registry.backends(op)
    assert all(backend not in _registry.auto(op, device) for device in ("cpu", "cuda"))
    assert backend in info.backends_table("cuda")[0]
    monkeypatch.setattr(_registry, "_installed", lambda module: False)
    assert "not installed" in _registry.reason(op, backend, "cuda", torch.bfloat16)
    monkeypatch.setattr(_registry, "_installed", lambda module: True)
    assert _registry.reason(op, backend, "cuda", torch.bfloat16) is None
    assert "input is on cpu" in _registry.reason(op, backend, "cpu", torch.bfloat16)
