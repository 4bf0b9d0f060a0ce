"""fastlm.nn against torch.nn: state_dict, initialisation, results and gradients; and the arguments beyond torch's."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import fastlm.nn as nn
from fastlm import ops
from fastlm.nn import _masks
from fastlm.ops import _random
from fastlm.testing.compare import ModelComparison

CU = [0, 5, 5, 12, 14]  # packed sequences of 5, 0, 7 and 2 tokens


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturb(module):
    """Every parameter drawn anew, so that none hides behind its initial 0 or 1."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * randn(*parameter.shape, seed=100 + i).to(parameter))
    return module


def evaluate(module, call, inputs, dtype, device):
    """The output of call(module, *inputs) and the gradients of a fixed projection of it, by name."""
    module = copy.deepcopy(module).to(device, dtype)
    inputs = [x.detach().to(device, dtype).requires_grad_() if x.is_floating_point() else x.to(device) for x in inputs]
    out = call(module, *inputs)
    out.backward(randn(*out.shape, seed=7).to(device, dtype))
    grads = {f"d{name}": parameter.grad for name, parameter in module.named_parameters()}
    grads |= {f"dinput {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    return {"output": out.detach(), **grads}


def assert_equal_to_torch(ours, theirs, call, inputs, device, call_theirs=None):
    """ours and theirs, modules with one state_dict; `inputs` in float64. Output and every gradient in the bound."""
    ours.load_state_dict(perturb(theirs).state_dict())
    call_theirs = call_theirs or call
    exact = evaluate(theirs, call_theirs, inputs, torch.float64, "cpu")
    eager = evaluate(theirs, call_theirs, inputs, torch.float32, device)
    got = evaluate(ours, call, inputs, torch.float32, device)
    comparison = ModelComparison()
    for name in exact:
        comparison.add(name, got[name], eager[name], exact[name])
    assert not comparison.failures(), "; ".join(comparison.failures())


# ---- norms


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("LayerNorm", {"normalized_shape": 24}, (6, 5, 24)),
        ("LayerNorm", {"normalized_shape": [5, 24], "eps": 1e-3}, (6, 5, 24)),
        ("LayerNorm", {"normalized_shape": 24, "bias": False}, (6, 24)),
        ("LayerNorm", {"normalized_shape": 24, "elementwise_affine": False}, (24,)),
        ("RMSNorm", {"normalized_shape": 24}, (6, 5, 24)),
        ("RMSNorm", {"normalized_shape": [5, 24], "eps": 1e-3}, (6, 5, 24)),
        ("RMSNorm", {"normalized_shape": 24, "elementwise_affine": False}, (6, 24)),
    ],
)
def test_norm(name, arguments, shape, device):
    ours, theirs = getattr(nn, name)(**arguments), getattr(torch.nn, name)(**arguments)
    assert repr(ours) == repr(theirs)
    assert_equal_to_torch(ours, theirs, lambda m, x: m(x), [randn(*shape)], device)
    residual = [randn(*shape), randn(*shape, seed=1)]
    assert_equal_to_torch(ours, theirs, lambda m, x, r: m(x, r), residual, device, lambda m, x, r: m(x + r))


def test_rms_norm_default_eps():
    """torch's: that of the type the statistics are computed in."""
    x = randn(4, 8) * 1e-4
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        ours, theirs = nn.RMSNorm(8, dtype=dtype)(x.to(dtype)), torch.nn.RMSNorm(8, dtype=dtype)(x.to(dtype))
        torch.testing.assert_close(ours, theirs)


def test_norm_return_residual_and_dropout():
    norm, x, residual, rng = nn.LayerNorm(8), randn(4, 8).float(), randn(4, 8, seed=1).float(), torch.tensor([3, 4])
    y, h = norm(x, residual, dropout_p=0.5, rng=rng, site=2, return_residual=True)
    dropped = h - residual
    assert 0 < (dropped == 0).sum() < dropped.numel()
    torch.testing.assert_close(y, F.layer_norm(h, (8,)))
    grid = nn.LayerNorm([2, 8])(x.view(2, 2, 8), residual.view(2, 2, 8), return_residual=True)
    torch.testing.assert_close(grid[1], (x + residual).view(2, 2, 8))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norm_autocast(name, device):
    """torch's result dtype, or with keep_dtype the input's."""
    x = torch.zeros(4, 8, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert getattr(nn, name)(8, device=device)(x).dtype == getattr(torch.nn, name)(8, device=device)(x).dtype
        kept = getattr(nn, name)(8, device=device, keep_dtype=True)(x, torch.zeros_like(x))
    assert kept.dtype == torch.bfloat16


def test_norm_shape_error():
    with pytest.raises(ValueError, match=r"input: expected the last dimensions \(8,\).*got \(4, 6\)"):
        nn.LayerNorm(8)(torch.zeros(4, 6))


# ---- attention


def mha_pair(**arguments):
    torch.manual_seed(1)
    ours = nn.MultiheadAttention(24, 4, **arguments)
    torch.manual_seed(1)
    theirs = torch.nn.MultiheadAttention(24, 4, **arguments)
    for name, tensor in theirs.state_dict().items():  # the same names, order and initial values
        assert torch.equal(ours.state_dict()[name], tensor)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return ours, theirs


PADDING = torch.tensor([[0] * 9, [1] * 4 + [0] * 5, [0] * 7 + [1] * 2]).bool()
FLOAT_PADDING = torch.zeros(3, 9).double().masked_fill(PADDING, -torch.inf)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, PADDING, FLOAT_PADDING], ids=["none", "bool", "float"])
def test_self_attention(batch_first, mask, device):
    ours, theirs = mha_pair(batch_first=batch_first)
    x = randn(3, 9, 24) if batch_first else randn(9, 3, 24)

    def call(m, x):
        key_padding_mask = None if mask is None else mask.to(x.device)
        key_padding_mask = key_padding_mask.to(x) if mask is FLOAT_PADDING else key_padding_mask
        return m(x, x, x, key_padding_mask=key_padding_mask, need_weights=False)[0]

    assert_equal_to_torch(ours, theirs, call, [x], device)


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"kdim": 16, "vdim": 20}], ids=["", "no-bias", "kdim"])
def test_cross_attention(arguments, device):
    ours, theirs = mha_pair(batch_first=True, **arguments)
    inputs = [randn(3, 5, 24), randn(3, 9, ours.kdim, seed=1), randn(3, 9, ours.vdim, seed=2)]

    def call(m, q, k, v):
        return m(q, k, v, key_padding_mask=PADDING.to(q.device), need_weights=False)[0]

    assert_equal_to_torch(ours, theirs, call, inputs, device)


@pytest.mark.parametrize("shape", [(9, 24), (9, 3, 24)], ids=["unbatched", "batched"])
def test_causal_attention(shape, device):
    ours, theirs = mha_pair()

    def call(m, x):
        causal = torch.nn.Transformer.generate_square_subsequent_mask(9, device=x.device, dtype=x.dtype)
        return m(x, x, x, need_weights=False, attn_mask=causal, is_causal=True)[0]

    assert_equal_to_torch(ours, theirs, call, [randn(*shape)], device)


def test_packed_attention(device):
    """Each packed sequence is what it is alone."""
    m = perturb(nn.MultiheadAttention(24, 4, dtype=torch.float64)).to(device)
    x, cu = randn(14, 24).to(device), torch.tensor(CU, dtype=torch.int32, device=device)
    packed, _ = m(x, x, x, need_weights=False, cu_seqlens=cu, max_seqlen=7)
    alone = torch.cat([m(s, s, s, need_weights=False)[0] for s in x.split(cu.diff().tolist()) if len(s)])
    torch.testing.assert_close(packed, alone)


def test_attention_dropout():
    m, x = nn.MultiheadAttention(24, 4, dropout=0.5, site=3), randn(6, 2, 24).float()

    def run(step):
        return m(x, x, x, need_weights=False, rng=torch.tensor([1, step]))[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    m.eval()
    assert torch.equal(run(0), run(1))


def band(sq, sk, left, right):
    """bool (sq, sk), True = masked: the keys outside the window, aligned bottom right."""
    relative = torch.arange(sk) - torch.arange(sq)[:, None] - (sk - sq)
    masked = torch.zeros(sq, sk, dtype=torch.bool)
    masked |= relative < -left if left >= 0 else False
    return masked | (relative > right if right >= 0 else torch.tensor(False))


HEADS, COLUMN = 4, torch.arange(9) < 2
# Mask (L, S) or (N * heads, L, S) -> the window and whether keys are masked; None for what the op cannot do.
MASKS = {
    "nothing": (band(9, 9, -1, -1), ((-1, -1), False)),
    "causal": (band(9, 9, -1, 0), ((-1, 0), False)),
    "anticausal": (band(9, 9, 0, -1), ((0, -1), False)),
    "window": (band(9, 9, 3, 2), ((3, 2), False)),
    "diagonal": (band(9, 9, 0, 0), ((0, 0), False)),
    "keys": (COLUMN.expand(9, 9), ((-1, -1), True)),
    "padding": (PADDING[:, None, None].expand(3, HEADS, 9, 9).flatten(0, 1), ((-1, -1), True)),
    "causal-padding": ((PADDING[:, None] | band(9, 9, -1, 0)).repeat_interleave(HEADS, 0), ((-1, 0), True)),
    "window-keys": (band(9, 9, 3, 2) | COLUMN, ((3, 2), True)),
    "causal-of-each-head": (band(9, 9, -1, 0).expand(3 * HEADS, 9, 9), ((-1, 0), False)),
    "above": (~band(9, 9, -1, 0), None),
    "one-pair": (
        torch.zeros(9, 9, dtype=torch.bool).index_put((torch.tensor(4), torch.tensor(5)), torch.tensor(True)),
        None,
    ),
    "one-head": (torch.cat([band(9, 9, -1, -1)[None], band(9, 9, -1, 0).expand(11, 9, 9)]), None),
    "everything": (torch.ones(9, 9, dtype=torch.bool), ((-1, -1), True)),
}


@pytest.mark.parametrize("kind", [torch.bool, torch.float64], ids=["bool", "float"])
@pytest.mark.parametrize("name", MASKS)
def test_attention_masks(name, kind, device, monkeypatch):
    """The op runs the masks that it can do; the others are right too, and give a warning."""
    masked, want = MASKS[name]
    found = _masks.recognise(
        _masks.as_four_dims(masked if kind == torch.bool else float_mask(masked), 3, HEADS, (9, 9))
    )
    assert (None if found is None else (found.window_size, found.key_mask is not None)) == want
    calls = []
    monkeypatch.setattr(ops, "attention", lambda *a, original=ops.attention, **o: calls.append(o) or original(*a, **o))
    warned = []
    monkeypatch.setattr(_masks, "warn_once", warned.append)
    ours, theirs = mha_pair(batch_first=True)

    def call(m, x):
        mask = (masked if kind == torch.bool else float_mask(masked)).to(x.device)
        out = m(x, x, x, attn_mask=mask if kind == torch.bool else mask.to(x), need_weights=False)[0]
        return torch.where(seen(masked).to(x.device), out, 0.0)  # a query without keys is NaN in torch

    if name == "everything":
        assert torch.equal(
            ours(*3 * (randn(3, 9, 24).float(),), attn_mask=masked, need_weights=False)[0][0, 0], ours.out_proj.bias
        )
    else:
        assert_equal_to_torch(ours, theirs, call, [randn(3, 9, 24)], device)
    assert bool(calls) == (want is not None)
    assert bool(warned) == (want is None)


def float_mask(masked):
    return torch.zeros(masked.shape, dtype=torch.float64).masked_fill(masked, -torch.inf)


def seen(masked):
    """bool (N or 1, L, 1): the queries that see a key in every head."""
    some = (~masked).any(-1)
    return some[None, :, None] if some.dim() == 1 else some.view(3, HEADS, 9).all(1)[..., None]


def test_a_bias_per_pair_is_added(device):
    ours, theirs = mha_pair(batch_first=True)
    bias = randn(3 * HEADS, 9, 9, seed=4)

    def call(m, x):
        mask = bias.to(x).masked_fill(band(9, 9, -1, 4).to(x.device), -torch.inf)
        return m(
            x, x, x, key_padding_mask=(PADDING[2:].expand(3, -1).to(x.device)), attn_mask=mask, need_weights=False
        )[0]

    assert_equal_to_torch(ours, theirs, call, [randn(3, 9, 24)], device)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", [None, "causal", "above"])
@pytest.mark.parametrize("shape", [(9, 24), (3, 9, 24)], ids=["unbatched", "batched"])
def test_attention_weights(shape, mask, average, device):
    """Weights and output, with torch's default arguments."""
    ours, theirs = mha_pair(batch_first=True)
    padding = PADDING[2:].expand(3, -1) if len(shape) == 3 else PADDING[2]

    def call(m, x):
        attn_mask = None if mask is None else MASKS[mask][0].to(x.device)
        arguments = {"attn_mask": attn_mask, "average_attn_weights": average}
        if mask != "above":
            arguments["key_padding_mask"] = padding.to(x.device)
        out, weights = m(x, x, x, **arguments)
        if mask == "above":  # its last query sees no key
            out, weights = out[..., :-1, :], weights[..., :-1, :]
        return torch.cat([out.flatten(), weights.flatten()])

    assert_equal_to_torch(ours, theirs, call, [randn(*shape)], device)


def test_each_attention_warning_is_given_once():
    def call(**arguments):
        for _ in range(2):
            m(X, X, X, **arguments)

    _masks._warn.cache_clear()
    m = nn.MultiheadAttention(24, 4)
    with pytest.warns(UserWarning, match="need_weights=False") as warned:
        call()
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="neither causal") as warned:
        call(attn_mask=~band(5, 5, -1, 0), need_weights=False)
    assert len(warned) == 1


def test_attention_weights_have_the_ops_dropout():
    """The same bits as without the weights."""
    rng = torch.tensor([1, 2])
    m, x = nn.MultiheadAttention(24, 4, dropout=0.5, site=3), randn(6, 2, 24).float()
    fused, _ = m(x, x, x, need_weights=False, rng=rng)
    out, weights = m(x, x, x, rng=rng, average_attn_weights=False)
    torch.testing.assert_close(out, fused)
    assert 0.3 < (weights == 0).float().mean() < 0.7
    other = torch.eye(6).bool()
    outs = [m(x, x, x, attn_mask=other, need_weights=need, rng=rng)[0] for need in (True, False)]
    torch.testing.assert_close(*outs)


def test_encoder_layer_masks(device):
    ours, theirs = layer_pair(batch_first=True)
    for masked, _ in (MASKS["causal"], MASKS["nothing"], MASKS["window"], MASKS["one-pair"]):
        call = lambda m, x, masked=masked: m(x, src_mask=masked.to(x.device))  # noqa: E731
        assert_equal_to_torch(ours, theirs, call, [randn(3, 9, 24)], device)


X, TWO = torch.zeros(5, 2, 24), torch.zeros(5, 24)
OFFSETS = torch.tensor([0, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        (
            (X, X, X),
            {"attn_mask": torch.zeros(4, 5)},
            r"attn_mask: expected shape \(5, 5\) or \(8, 5, 5\), got \(4, 5\)",
        ),
        ((X, X, X), {"attn_mask": torch.zeros(5, 5).int()}, "attn_mask: expected bool .*use mask.bool"),
        (
            (TWO, TWO, TWO),
            {"cu_seqlens": OFFSETS, "max_seqlen": 5, "need_weights": True},
            "need_weights: expected False.*pass need_weights=False",
        ),
        (
            (TWO, TWO, TWO),
            {"cu_seqlens": OFFSETS, "max_seqlen": 5, "attn_mask": torch.zeros(5, 5)},
            "attn_mask: .*is_causal=True",
        ),
        ((X, X, X), {"key_padding_mask": torch.zeros(3, 5).bool()}, r"key_padding_mask: expected shape \(2, 5\)"),
        ((X, X, X), {"key_padding_mask": torch.zeros(2, 5).long()}, "key_padding_mask: expected bool"),
        ((X, X, X), {"key_padding_mask": torch.ones(2, 5)}, "key_padding_mask: expected 0"),
        ((X, X[:3], X[:3]), {"is_causal": True}, "is_causal: .*got 5 and 3"),
        ((X, X, X[:3]), {}, r"value: expected as many vectors as key \(5, 2, 24\), got \(3, 2, 24\)"),
        ((X[..., :20], X, X), {}, r"query: expected .*got \(5, 2, 20\)"),
        ((X, TWO, TWO), {}, "key: expected"),
        ((TWO, TWO, TWO), {"cu_seqlens": OFFSETS}, "max_seqlen: expected an integer"),
        ((X, X, X), {"cu_seqlens": OFFSETS, "max_seqlen": 5}, r"query: expected \(T, 24\)"),
        (
            (TWO, TWO, TWO),
            {"cu_seqlens": OFFSETS, "max_seqlen": 5, "key_padding_mask": torch.zeros(5).bool()},
            "key_padding_mask: expected None with cu_seqlens",
        ),
        (
            (TWO, TWO, TWO),
            {"cu_seqlens": OFFSETS, "cu_seqlens_k": OFFSETS, "max_seqlen": 5, "max_seqlen_k": 5, "is_causal": True},
            "is_causal: expected False",
        ),
    ],
)
def test_attention_errors(inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        nn.MultiheadAttention(24, 4)(*inputs, **{"need_weights": False, **arguments})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_attention_error():
    nested = torch.nested.nested_tensor([TWO])
    with pytest.raises(ValueError, match=r"query: expected a plain tensor.*cu_seqlens"):
        nn.MultiheadAttention(24, 4)(nested, nested, nested, need_weights=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"add_bias_kv": True}, "add_bias_kv: expected False"),
        ({"add_zero_attn": True}, "add_zero_attn: expected False"),
        ({"num_heads": 5}, "embed_dim: expected a multiple of num_heads=5"),
    ],
)
def test_attention_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        nn.MultiheadAttention(**{"embed_dim": 24, "num_heads": 4, **arguments})


# ---- encoder layer


def layer_pair(dropout=0.0, **arguments):
    torch.manual_seed(1)
    ours = nn.TransformerEncoderLayer(24, 4, 40, dropout, **arguments)
    torch.manual_seed(1)
    theirs = torch.nn.TransformerEncoderLayer(24, 4, 40, dropout, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    return ours, theirs


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"activation": "gelu", "batch_first": True, "layer_norm_eps": 1e-3},
        {"activation": torch.nn.GELU("tanh"), "bias": False},
        {"activation": F.silu},
    ],
    ids=["relu", "gelu", "gelu-tanh", "silu"],
)
def test_encoder_layer(norm_first, arguments, device):
    ours, theirs = layer_pair(norm_first=norm_first, **arguments)
    x = randn(3, 9, 24) if arguments.get("batch_first") else randn(9, 3, 24)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        assert_equal_to_torch(ours, theirs, lambda m, x: m(x, src_key_padding_mask=PADDING.to(x.device)), [x], device)


@pytest.mark.parametrize("causal", [False, True])
def test_inside_torchs_encoder(causal, device):
    """torch.nn.TransformerEncoder over copies of our layer, training and evaluation, where it would go nested."""
    ours, theirs = (
        torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for layer in layer_pair(dropout=0.1, batch_first=True)
    )

    def call(m, x):
        m.eval()
        mask = torch.nn.Transformer.generate_square_subsequent_mask(9, device=x.device).bool() if causal else None
        # right padding alone: a causal query before any real key is NaN in torch
        return m(x, mask=mask, src_key_padding_mask=PADDING[2:].expand(3, -1).to(x.device))

    assert_equal_to_torch(ours, theirs, call, [randn(3, 9, 24)], device)
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        ours = torch.nn.TransformerEncoder(layer_pair(batch_first=True)[0], 2).eval()
    with torch.no_grad():
        assert ours(torch.zeros(3, 9, 24), src_key_padding_mask=PADDING).shape == (3, 9, 24)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_packed_encoder_layer(norm_first, device):
    layer = perturb(layer_pair(norm_first=norm_first, activation="gelu")[0].double()).to(device)
    x, cu = randn(14, 24).to(device), torch.tensor(CU, dtype=torch.int32, device=device)
    alone = torch.cat([layer(s) for s in x.split(cu.diff().tolist()) if len(s)])
    torch.testing.assert_close(layer(x, cu_seqlens=cu, max_seqlen=7), alone)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_encoder_layer_dropout(norm_first):
    """With rng the same bits from (seed, step); without, from torch's generator; none in evaluation."""
    layer = nn.TransformerEncoderLayer(24, 4, 40, 0.5, norm_first=norm_first, site=4)
    sites = {layer.self_attn.site, layer.dropout.site, layer.dropout1.site, layer.dropout2.site}
    assert sites == {4, 5, 6, 7}
    x = randn(9, 3, 24).float()
    first, again, other = (layer(x, rng=torch.tensor([1, step])) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(layer(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    layer.eval()
    assert torch.equal(layer(x, rng=torch.tensor([1, 0])), layer(x))


@pytest.mark.parametrize("shape", [(7, 10), (2, 3, 5), (9,)])
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_dropout_bits(p, shape, device):
    """With rng: what is dropped is the ops' own choice, and the rest is scaled, forward and backward."""
    rng = torch.tensor([5, 6], device=device)
    x = (randn(*shape).float() + 4).to(device).requires_grad_()
    dropout = nn.Dropout(p, site=9)
    dropped, want = dropout(x, rng), _random.dropout_rows(x, p, rng, 9)
    assert torch.equal(dropped, want)
    grads = [torch.autograd.grad(y, x, 2 * torch.ones_like(y))[0] for y in (dropped, want)]
    assert torch.equal(*grads)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert dropout(x, rng).dtype == torch.float32
        assert dropout(x.bfloat16(), rng).dtype == torch.bfloat16
    assert dropout(x[:0], rng).shape == x[:0].shape


def test_encoder_layer_errors():
    with pytest.raises(ValueError, match='activation: expected "relu", "gelu" or a callable'):
        nn.TransformerEncoderLayer(24, 4, activation="swish")
    with pytest.raises(ValueError, match="attn_mask"):
        nn.TransformerEncoderLayer(24, 4)(X, src_mask=torch.zeros(5, 4))


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_encoder_layer_bf16_autocast_and_compile(norm_first):
    """Autocast keeps float32 parameters; one graph covers the layer, forward and backward."""
    layer = nn.TransformerEncoderLayer(24, 4, 40, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    x, rng = randn(3, 9, 24).float(), torch.tensor([1, 2])
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert (low.float() - plain).abs().max() < 0.1
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x, src_key_padding_mask=PADDING, rng=rng)
    want = layer(x, src_key_padding_mask=PADDING, rng=rng)
    torch.testing.assert_close(out, want)
    assert len(torch.autograd.grad(out.sum(), list(layer.parameters()))) == len(list(layer.parameters()))


# ---- MLP


class PlainMLP(torch.nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.linear1, self.linear2 = copy.deepcopy(ours.linear1), copy.deepcopy(ours.linear2)
        self.gated, self.activation, self.approximate = ours.gated, ours.activation, ours.approximate

    def forward(self, x):
        h = self.linear1(x)
        h, gate = h.chunk(2, -1) if self.gated else (h, 1)
        plain = {"relu": F.relu, "silu": F.silu, "gelu": functools.partial(F.gelu, approximate=self.approximate)}
        h = plain[self.activation](h)
        return self.linear2(h * gate)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"approximate": "tanh", "out_features": 10},
        {"gated": True},
        {"bias": False},
        {"activation": "relu"},
        {"activation": "relu", "gated": True, "bias": False},
        {"activation": "silu"},
        {"activation": "silu", "gated": True, "bias": False},
    ],
    ids=["", "tanh", "gated", "no-bias", "relu", "gated-relu", "silu", "gated-silu"],
)
def test_mlp(arguments, device):
    ours = nn.MLP(24, 40, **arguments)
    assert_equal_to_torch(ours, PlainMLP(ours), lambda m, x: m(x), [randn(3, 9, 24)], device)


def test_mlp_dropout():
    """Before linear2, with the bits of its site number; none in evaluation."""
    mlp, x, rng = nn.MLP(24, 40, activation="relu", dropout=0.5, site=3), randn(6, 24).float(), torch.tensor([1, 2])
    seen = []
    mlp.linear2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mlp(x, rng)
    mlp.eval()(x, rng)
    assert torch.equal(seen[0], nn.Dropout(0.5, site=3)(seen[1], rng))
    assert torch.equal(seen[1], F.relu(mlp.linear1(x)))
    with pytest.raises(ValueError, match="activation: expected one of 'gelu', 'relu', 'silu', got 'elu'"):
        nn.MLP(24, 40, activation="elu")


# ---- losses and masking

TARGET = torch.tensor([3, 0, -100, 10, 5, -100, 7])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"reduction": "none", "weight": randn(11, seed=3).abs(), "ignore_index": 5},
    ],
    ids=["mean", "sum", "none"],
)
def test_cross_entropy_loss(arguments, device):
    ours, theirs = nn.CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
    target = TARGET.where(TARGET >= 0, 5) if "ignore_index" in arguments else TARGET
    for x, t in ((randn(7, 11), target), (randn(2, 11, 7), target.expand(2, 7)), (randn(11), target[0])):
        assert_equal_to_torch(ours, theirs, lambda m, x, t: m(x, t), [x, t], device)


def test_cross_entropy_loss_beyond_torch():
    x = randn(7, 11).float().requires_grad_()
    z = nn.CrossEntropyLoss(z_loss=0.1)(x, TARGET) - nn.CrossEntropyLoss()(x, TARGET)
    torch.testing.assert_close(z, 0.1 * x.logsumexp(-1)[TARGET >= 0].square().mean())
    (want,) = torch.autograd.grad(F.cross_entropy(x * 1, TARGET), x)
    (got,) = torch.autograd.grad(nn.CrossEntropyLoss(inplace=True)(x * 1, TARGET), x)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="inplace: expected input"):
        nn.CrossEntropyLoss(inplace=True)(torch.zeros(2, 11, 7), TARGET.expand(2, 7))
    with pytest.raises(ValueError, match="target: expected class indices"):
        nn.CrossEntropyLoss()(x, torch.zeros(7, 11))


class PlainLinearCrossEntropy(torch.nn.Module):
    """torch.nn.LinearCrossEntropyLoss, for a torch that does not have it."""

    def __init__(self, in_features, classes, bias=False, **arguments):
        super().__init__()
        self.linear, self.arguments = torch.nn.Linear(in_features, classes, bias=bias), arguments

    def forward(self, x, target):
        return F.cross_entropy(self.linear(x), target, **self.arguments)


@pytest.mark.parametrize(
    "arguments", [{}, {"bias": True, "reduction": "sum", "label_smoothing": 0.1}], ids=["mean", "sum"]
)
def test_linear_cross_entropy_loss(arguments, device):
    ours = nn.LinearCrossEntropyLoss(8, 11, **arguments)
    inputs = [randn(7, 8), TARGET]
    assert_equal_to_torch(ours, PlainLinearCrossEntropy(8, 11, **arguments), lambda m, x, t: m(x, t), inputs, device)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(8, 11, **arguments)
        assert_equal_to_torch(ours, theirs, lambda m, x, t: m(x, t), inputs, device)
    with pytest.raises(ValueError, match=r"out_features: expected \(\)"):
        nn.LinearCrossEntropyLoss(8, 11, out_features=(2,))
    with pytest.raises(ValueError, match="options: expected None"):
        nn.LinearCrossEntropyLoss(8, 11, options=object())


def test_mlm_masking():
    arguments = {"mask_token_id": 3, "vocab_size": 50, "special_ids": [0, 1, 3], "seed": 11, "mlm_probability": 0.4}
    ids = torch.arange(40).view(4, 10)
    module = nn.MLMMasking(**arguments)
    for ours, theirs in zip(module(ids, epoch=2), ops.mlm_mask(ids, epoch=2, **arguments)):
        assert torch.equal(ours, theirs)
    assert not module.state_dict()
    assert "seed=11" in repr(module)
