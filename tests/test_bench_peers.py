"""fastlm/bench/peers: a peer computes what the op does, and refuses what it lacks, without its library installed."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fastlm.bench.op_runner import OpRunner, disagreement, reason
from fastlm.bench.peers import PEERS, STEPS, Unsupported, transformer_engine
from fastlm.testing.cases import CASES, Variant

IN_PLAIN_TORCH = ("eager", "chunked", "sdpa", "sdpa-flash", "sdpa-cudnn", "transformers")


def test_every_op_has_peers():
    assert PEERS.keys() == CASES.keys()
    assert all(next(iter(peers)) == "eager" for peers in PEERS.values())
    assert all(name.startswith("transformers") for name in STEPS)


@pytest.mark.parametrize("lengths", [(), (5, 9, 1)], ids=["padded", "packed"])
def test_attention_peers_agree_with_the_op(lengths):
    """The peers' form of the inputs, padded with a mask where the op's are packed, gives the op's results."""
    case = CASES["attention"]
    shape = {"h": 2, "d": 8, "lengths": lengths} if lengths else {"b": 2, "s": 11, "h": 2, "d": 8}
    options = {} if lengths else {"causal": True}
    sets = [case.inputs(Variant(shape), 0, torch.float32)]
    want = OpRunner(case.reference, sets, options, outputs=1).results()
    for name in ("eager", "sdpa"):
        got = OpRunner.of(PEERS["attention"][name], sets, options).results()
        assert {"output 0", "dq", "dk", "dv"} <= got.keys() & want.keys()
        assert disagreement(got, want, 1e-5) is None


def test_a_peer_that_cannot_run_says_why():
    sets = [CASES["attention"].inputs(Variant({"b": 2, "s": 9, "h": 2, "d": 8}), 0, torch.float32)]
    masked = [{**sets[0], "key_mask": torch.ones(2, 9, dtype=torch.bool)}]
    table = [{**sets[0], "table": torch.randn(8, 2)}]
    expected = {
        ("flash_attn", "installed"): (sets, "flash_attn is not installed"),
        ("te", "installed"): (sets, "transformer_engine is not installed"),
        ("sdpa-flash", "mask"): (masked, "takes no mask for padding and no bias"),
        ("flash_attn", "mask"): (masked, "takes no key_mask"),
        ("flash_attn", "bias"): (table, "takes no relative_bias"),
        ("te", "mask"): (masked, "takes no key_mask"),
    }
    for (name, _), (given, why) in expected.items():
        with pytest.raises((Unsupported, ImportError)) as caught:
            OpRunner.of(PEERS["attention"][name], given, {})
        assert reason(caught.value) == why


# ---- stand-ins for the libraries' modules, with their signatures, computed by torch


def _norm_reference(h, weight, bias, eps, rms):
    shape = h.shape[-1:]
    return F.rms_norm(h, shape, weight, eps) if rms else F.layer_norm(h, shape, weight, bias, eps)


def _prenorm(rms):
    def norm(
        x,
        weight,
        bias,
        residual=None,
        x1=None,
        weight1=None,
        bias1=None,
        eps=1e-6,
        dropout_p=0.0,
        rowscale=None,
        prenorm=False,
        residual_in_fp32=False,
    ):
        h = x if residual is None else residual + x
        y = _norm_reference(h, weight, bias, eps, rms)
        return (y, h) if prenorm else y

    return norm


def _flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"is_causal": causal, "scale": softmax_scale, "enable_gqa": True}
    return F.scaled_dot_product_attention(q, k, v, None, dropout_p, **options).transpose(1, 2)


def _flash_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    parts = zip(*(x.split(cu_seqlens_q.diff().tolist()) for x in (q, k, v)))
    outs = [_flash(*(x[None] for x in part), dropout_p, softmax_scale, causal)[0] for part in parts]
    return torch.cat(outs)


class _TENorm(torch.nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, device=device, dtype=dtype))
        if not self.rms:
            self.bias = torch.nn.Parameter(torch.zeros(normalized_shape, device=device, dtype=dtype))

    def forward(self, x):
        return _norm_reference(x, self.weight, None if self.rms else self.bias, self.eps, self.rms)


class _TEAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        softmax_scale=None,
    ):
        super().__init__()
        self.format, self.mask, self.scale = qkv_format, attn_mask_type, softmax_scale

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
    ):
        q, k, v, causal = query_layer, key_layer, value_layer, "causal" in self.mask
        if self.format == "thd":
            assert self.mask.startswith("padding")
            lengths = cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv
            return _flash_varlen(q, k, v, *lengths, 0.0, self.scale, causal).flatten(-2)
        if core_attention_bias_type == "no_bias":
            return _flash(q, k, v, 0.0, self.scale, causal).flatten(-2)
        assert core_attention_bias_type == "post_scale_bias"
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, core_attention_bias, scale=self.scale)
        return out.transpose(1, 2).flatten(-2)


def _losses(logits, labels, smoothing, z_loss=0.0, ignore_index=-100):
    return F.cross_entropy(
        logits.float(), labels, reduction="none", label_smoothing=smoothing, ignore_index=ignore_index
    )


class _Xentropy:
    @staticmethod
    def apply(logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        assert half_to_float == (logits.dtype != torch.float32)
        return _losses(logits, labels, smoothing, ignore_index=padding_idx)


def _liger_ce(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    lse_square_scale=0.0,
):
    return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)


def _liger_flce(
    input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
):
    return F.cross_entropy(
        F.linear(input, weight, bias), target, ce_weight, reduction=reduction, label_smoothing=label_smoothing
    )


def _flash_ce(
    logits,
    labels,
    precomputed_lse=None,
    label_smoothing=0.0,
    logit_scale=1.0,
    lse_square_scale=0.0,
    ignore_index=-100,
    inplace_backward=False,
):
    return _losses(logits, labels, label_smoothing, ignore_index=ignore_index), None


def _te_ce(inp, target, label_smoothing=0.0, reduce_loss=False, dist_process_group=None, ignore_idx=-100):
    assert inp.ndim == 3
    assert inp.shape[:2] == target.shape
    losses = _losses(inp[0], target[0], label_smoothing, ignore_index=ignore_idx)
    return losses.sum() / (target != ignore_idx).sum() if reduce_loss else losses[None]


def _quack_ce(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean", inplace_backward=False):
    return F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction)


def _quack_lce(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True):
    return F.cross_entropy(F.linear(x, weight), target, ignore_index=ignore_index, reduction=reduction)


def _quack_rms(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False):
    h = x if residual is None else x + residual
    y = _norm_reference(h, weight, bias, eps, True)
    return (y, h) if prenorm else y


def _quack_ln(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert weight.dtype == bias.dtype == torch.float32
    assert return_rstd
    assert return_mean
    y = _norm_reference(x.float(), weight, bias, eps, False).to(x.dtype)
    return y, y.new_zeros(len(x)), y.new_zeros(len(x))


FAKES = {
    "liger_kernel.transformers.functional": {
        "liger_layer_norm": lambda X, W, B, eps: _norm_reference(X, W, B, eps, False),
        "liger_rms_norm": lambda X, W, eps, offset=0.0, casting_mode="llama", in_place=True: _norm_reference(
            X, W, None, eps, True
        ),
        "liger_fused_add_rms_norm": lambda X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True: (
            _norm_reference(X + R, W, None, eps, True),
            X + R,
        ),
        "liger_cross_entropy": _liger_ce,
        "liger_fused_linear_cross_entropy": _liger_flce,
        "liger_geglu": lambda a, b: F.gelu(a, approximate="tanh") * b,
    },
    "flash_attn": {"flash_attn_func": _flash, "flash_attn_varlen_func": _flash_varlen},
    "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": _prenorm(False), "rms_norm_fn": _prenorm(True)},
    "flash_attn.ops.triton.cross_entropy": {"cross_entropy_loss": _flash_ce},
    "apex.normalization.fused_layer_norm": {
        "fused_layer_norm_affine": lambda input, weight, bias, normalized_shape, eps=1e-6: F.layer_norm(
            input, normalized_shape, weight, bias, eps
        ),
        "fused_rms_norm_affine": lambda input, weight, normalized_shape, eps=1e-6: F.rms_norm(
            input, normalized_shape, weight, eps
        ),
    },
    "apex.contrib.layer_norm.layer_norm": {
        "FastLayerNormFN": types.SimpleNamespace(
            apply=lambda x, gamma, beta, epsilon, memory_efficient: _norm_reference(x, gamma, beta, epsilon, False)
        )
    },
    "apex.contrib.xentropy": {"SoftmaxCrossEntropyLoss": _Xentropy},
    "transformer_engine.pytorch": {
        "LayerNorm": type("LayerNorm", (_TENorm,), {"rms": False}),
        "RMSNorm": type("RMSNorm", (_TENorm,), {"rms": True}),
        "DotProductAttention": _TEAttention,
        "parallel_cross_entropy": _te_ce,
        "ops": types.SimpleNamespace(GELU=lambda: torch.nn.GELU("tanh")),
    },
    "quack.rmsnorm": {"rmsnorm": _quack_rms, "layernorm_fwd": _quack_ln},
    "quack.cross_entropy": {"cross_entropy": _quack_ce},
    "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": _quack_lce},
}
# Small shapes with what the libraries differ in, and which library refuses them, with a word of the reason.
LIBRARY_SHAPES = [
    ("layer_norm", {"rows": 6, "cols": 32}, {}, {}),
    ("layer_norm", {"rows": 6, "cols": 32, "residual": 1}, {}, {"quack": "residual"}),
    ("rms_norm", {"rows": 6, "cols": 32, "bias": 0}, {}, {}),
    ("rms_norm", {"rows": 6, "cols": 32, "bias": 0, "residual": 1}, {}, {}),
    ("cross_entropy", {"rows": 6, "vocabulary": 40, "ignored": 1}, {}, {}),
    ("cross_entropy", {"rows": 6, "vocabulary": 40, "ignored": 1}, {"inplace": True, "reduction": "sum"}, {}),
    ("cross_entropy", {"rows": 6, "vocabulary": 40}, {"label_smoothing": 0.1}, {"quack": "label_smoothing"}),
    ("linear_cross_entropy", {"rows": 6, "features": 8, "vocabulary": 40}, {}, {}),
    ("linear_cross_entropy", {"rows": 6, "features": 8, "vocabulary": 40, "bias": 1}, {}, {"quack": "bias"}),
    ("gelu", {"rows": 6, "cols": 32, "bias": 0, "gate": 1}, {"approximate": "tanh"}, {"te": "one tensor"}),
    ("gelu", {"rows": 6, "cols": 32}, {"approximate": "tanh"}, {"liger": "gated"}),
    ("attention", {"b": 2, "s": 11, "h": 4, "kv": 2, "d": 8}, {"causal": True}, {}),
    ("attention", {"h": 2, "d": 8, "lengths": (5, 9, 1)}, {"causal": True}, {}),
    ("attention", {"b": 2, "s": 11, "h": 2, "d": 8, "buckets": 8}, {"softmax_scale": 1.0}, {"flash_attn": "bias"}),
]


@pytest.fixture
def fakes(monkeypatch):
    for name, members in FAKES.items():
        parents = [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]
        for parent in parents:
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        for member, value in members.items():
            monkeypatch.setattr(sys.modules[name], member, value, raising=False)
    yield
    transformer_engine._gelu_module.cache_clear()
    transformer_engine._attention_module.cache_clear()


@pytest.mark.parametrize(("op", "shape", "options", "refused"), LIBRARY_SHAPES)
def test_libraries_agree_with_the_op(fakes, op, shape, options, refused):
    """Outputs and gradients of every library, through modules with the signatures of its own."""
    case = CASES[op]
    sets = [case.inputs(Variant(shape), 0, torch.float32)]
    eager = PEERS[op]["eager"]
    packed = "lengths" in shape
    want = OpRunner.of(eager, sets, options).results()
    if packed:
        want = OpRunner(case.reference, sets, options, outputs=1).results()
    ran, refusals = set(), {}
    libraries = {name: peer for name, peer in PEERS[op].items() if name not in IN_PLAIN_TORCH}
    for name, peer in libraries.items():
        try:
            got = OpRunner.of(peer, sets, options).results()
        except Unsupported as error:
            refusals[name] = str(error)
            continue
        ran.add(name)
        forward_alone = op == "layer_norm" and name == "quack"
        assert got.keys() == ({"output 0", "output 1"} if forward_alone else want.keys())
        assert disagreement(got, want, 1e-5) is None, name
    assert ran == libraries.keys() - refused.keys()
    assert all(word in refusals[name] for name, word in refused.items())


def test_transformers_collator_masks_as_the_op_does():
    """Its tokenizer tells the special tokens; a packed row is a row; whole words are refused."""
    pytest.importorskip("transformers")
    mask = PEERS["mlm_mask"]["transformers"].function
    options = {"mask_token_id": 4, "vocab_size": 97, "special_ids": (0, 1, 2, 3), "seed": 0}
    ids = torch.randint(97, (40, 500))
    masked, labels = mask(ids, **options)
    selected = labels != -100
    assert torch.equal(labels[selected], ids[selected])
    assert torch.equal(masked[~selected], ids[~selected])
    assert not selected[ids < 5].any()
    assert selected[ids >= 5].float().mean() == pytest.approx(0.15, abs=0.02)
    assert (masked[selected] == 4).float().mean() == pytest.approx(0.8, abs=0.05)
    assert mask(ids.flatten(), **options)[0].shape == (20000,)
    with pytest.raises(Unsupported, match="takes no word_starts"):
        mask(ids, word_starts=ids > 50, **options)
