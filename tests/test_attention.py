"""attention beyond its OpCase: layouts that must agree, masks and dropout bits read back, bad input."""

import functools
import itertools
import random

import numpy as np
import numpy_philox
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm import ops
from fastlm.ops import _registry
from fastlm.ops._relative_bias import bucket_starts, relative_buckets
from fastlm.testing import checks
from fastlm.testing.cases import CASES, Variant
from fastlm.testing.compare import Comparison

LENGTHS = (70, 1, 0, 130, 33)
RNG = torch.tensor([-(2**62) + 12345, 2**40 + 7])


def cu_seqlens(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def gradients(out, cotangent, *inputs):
    return torch.autograd.grad(out, inputs, cotangent)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_packed_is_padded_is_one_by_one(causal, dropout_p):
    """The same bits, forward and backward. One by one without dropout, which knows the number of the sequence."""
    heads, kv, d, longest = 4, 2, 16, max(LENGTHS)
    options = {"causal": causal, "dropout_p": dropout_p, "rng": RNG, "site": 5, "backend": "cpu"}
    cu = cu_seqlens(LENGTHS)
    total = int(cu[-1])
    q, dout = randn(2, total, heads, d).unbind()
    k, v = randn(2, total, kv, d, seed=1).unbind()
    packed = [x.requires_grad_() for x in (q, k, v)]
    out = ops.attention(*packed, cu_seqlens_q=cu, max_seqlen_q=longest, **options)
    want = [out, *gradients(out, dout, *packed)]

    def pad(x):
        rows = [x.detach()[start:end] for start, end in itertools.pairwise(cu.tolist())]
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, 0, 0, longest - len(row))) for row in rows])

    real = torch.arange(longest) < cu.diff()[:, None]
    padded = [pad(x).requires_grad_() for x in (q, k, v)]
    out = ops.attention(*padded, key_mask=real, **options)
    for name, a, b in zip(("out", "dq", "dk", "dv"), want, [out, *gradients(out, pad(dout), *padded)]):
        assert torch.equal(a, b[real]), f"padded {name}"

    if dropout_p == 0.0:
        for start, end in itertools.pairwise(cu.tolist()):
            one = [x.detach()[None, start:end].requires_grad_() for x in (q, k, v)]
            out = ops.attention(*one, **options)
            for name, a, b in zip(("out", "dq", "dk", "dv"), want, [out, *gradients(out, dout[None, start:end], *one)]):
                assert torch.equal(a[start:end], b[0]), f"one by one {name}, rows {start} to {end}"


def test_padding_at_the_end_of_cu_seqlens():
    """Repeating the total adds empty sequences and changes no bit, dropout's included."""
    q, k, v = randn(3, 104, 2, 8).unbind()
    options = {"max_seqlen_q": 70, "dropout_p": 0.3, "rng": RNG, "backend": "cpu"}
    a = ops.attention(q, k, v, cu_seqlens_q=cu_seqlens((70, 34)), **options)
    b = ops.attention(q, k, v, cu_seqlens_q=cu_seqlens((70, 34, 0, 0, 0)), **options)
    assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_has_no_influence(backend, causal):
    """NaN in a masked row of k and v changes nothing and gets no gradient; a query without keys gives 0."""
    q, k, v, dout = (randn(3, 80, 2, 16, seed=s) for s in range(4))
    mask = torch.ones(3, 80, dtype=torch.bool)
    mask[0, :13] = mask[0, 50:] = mask[1] = False
    mask[2, 20:23] = False
    results = []
    for fill in (0.0, float("nan")):
        inputs = [q.clone(), *(torch.where(mask[..., None, None], x, fill) for x in (k, v))]
        inputs = [x.requires_grad_() for x in inputs]
        out = ops.attention(*inputs, key_mask=mask, causal=causal, backend=backend)
        results.append([out, *gradients(out, dout, *inputs)])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results):
        assert torch.equal(a, b), name
    out, dq, dk, dv = results[1]
    assert not out[1].any()
    assert not dq[1].any()
    assert not dk[~mask].any()
    assert not dv[~mask].any()
    if causal:
        assert not out[0, :13].any()
        assert out[0, 13:].all()


@pytest.mark.parametrize("backend", ["cpu", "reference", "sdpa"])
def test_causal_is_aligned_bottom_right(backend):
    """The last queries of a square causal attention are those of a shorter q; windows move with them."""
    q, k, v = (randn(2, 90, 2, 8, seed=s) for s in range(3))
    for options in ({"causal": True}, {"window_size": (5, 3)}):
        whole = ops.attention(q, k, v, backend=backend, **options)
        part = ops.attention(q[:, 77:], k, v, backend=backend, **options)
        torch.testing.assert_close(whole[:, 77:], part, rtol=1e-5, atol=1e-6)
    more_queries = ops.attention(q, k[:, :40], v[:, :40], causal=True, backend=backend)
    assert not more_queries[:, :50].any()
    assert torch.equal(more_queries[:, 50], v[:, 0])


def numpy_bytes(seed, step, site, sequence_head, query, keys):
    """Dropout's bytes of one row of probabilities, from the definition, in NumPy."""

    step = int(step) % 2**64
    k0, k1, _, _ = numpy_philox.words((step, step >> 32, site, 0), numpy_philox.domain_key(int(seed), 0x504F5244))
    words = numpy_philox.words((np.arange(-(-keys // 16)), query, sequence_head, 0), (int(k0), int(k1)))
    return np.stack(words, -1).astype("<u4").view("u1").reshape(-1)[:keys]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dropout_bits(backend):
    """With equal scores and v the identity, the output is the mask: it equals the definition's, bit for bit."""
    heads, lengths, p, site = 2, (40, 0, 67), 0.3, 9
    cu, d = cu_seqlens(lengths), 80
    total = int(cu[-1])
    q = torch.zeros(total, heads, d)
    v = torch.cat([torch.eye(n, d) for n in lengths])[:, None].expand(-1, heads, -1)
    options = {"dropout_p": p, "rng": RNG, "site": site, "backend": backend}
    out = ops.attention(q, q, v, cu_seqlens_q=cu, max_seqlen_q=max(lengths), **options)
    threshold = round(256 * p)
    for sequence, (start, n) in enumerate(zip(cu.tolist(), lengths)):
        for head in range(heads):
            for query in range(n):
                drawn = numpy_bytes(*RNG.tolist(), site, sequence * heads + head, query, n)
                want = torch.from_numpy(np.where(drawn < threshold, 0.0, 256 / (256 - threshold) / n)).float()
                got = out[start + query, head, :n]
                assert torch.equal(got != 0, want != 0), (sequence, head, query)
                torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dropout_of_everything_and_default_rng(backend):
    q, k, v, dout = (randn(1, 20, 2, 8, seed=s).requires_grad_() for s in range(4))
    out = ops.attention(q, k, v, dropout_p=1.0, rng=RNG, backend=backend)
    assert not out.any()
    assert not any(g.any() for g in gradients(out, dout.detach(), q, k, v))
    draws = [ops.attention(q, k, v, dropout_p=0.5, backend=backend) for _ in range(2)]
    assert not torch.equal(*draws)


@pytest.mark.parametrize(
    ("bidirectional", "buckets", "max_distance"),
    [(True, 32, 128), (False, 32, 128), (True, 10, 24), (False, 7, 100)],
)
def test_buckets_are_those_of_t5(bidirectional, buckets, max_distance):
    """Against the float32 logarithm of Mesh TensorFlow's and Transformers' T5."""
    relative = torch.arange(-600, 600)
    n = buckets // 2 if bidirectional else buckets
    distance = relative.abs() if bidirectional else (-relative).clamp(min=0)
    exact = n // 2
    large = torch.log(distance.float() / exact) / np.log(max_distance / exact) * (n - exact)
    want = torch.where(distance < exact, distance, (exact + large.clamp(min=0).long()).clamp(max=n - 1))
    want = want + (n if bidirectional else 0) * (relative > 0)
    assert torch.equal(relative_buckets(relative, buckets, bidirectional, max_distance), want)
    assert len(bucket_starts(buckets, bidirectional, max_distance)) == n


def test_relative_bias_is_a_bias():
    """Scores of zero leave the bias alone: the output is its softmax, position by position."""
    table = randn(8, 2)
    q, eye = torch.zeros(1, 20, 2, 24), torch.eye(30, 24)[None, :, None].expand(-1, -1, 2, -1)
    k = torch.zeros(1, 30, 2, 24)
    out = ops.attention(q, k, eye, relative_bias=ops.RelativeBias(table, True, 16), backend="cpu")
    relative = torch.arange(30) - torch.arange(20)[:, None] - 10
    bias = table[relative_buckets(relative, 8, True, 16)]
    torch.testing.assert_close(out[0], bias.softmax(1)[:, :24].movedim(-1, 1), rtol=1e-5, atol=1e-7)


def random_variant(draw):
    """Any combination of features."""
    kv, group, d = draw.choice((1, 2)), draw.choice((1, 1, 3)), draw.choice((1, 4, 8, 20, 64, 96))
    shape = {"h": kv * group, "kv": kv, "d": d, "buckets": draw.choice((0, 0, 8))}
    if draw.random() < 0.5:
        shape["lengths"] = tuple(draw.choice((0, 1, 17, 64, 100, 130)) for _ in range(3)) + (3,)
        if draw.random() < 0.5:
            shape["lengths_k"] = tuple(draw.choice((0, 5, 96, 97, 140)) for _ in range(3)) + (2,)
    else:
        shape |= {"b": 2, "s": draw.choice((1, 50, 128)), "sk": draw.choice((-1, 7, 150))}
        shape["padding"] = draw.choice(("", "left", "right", "both", "holes"))
    options = {"dropout_p": draw.choice((0.0, 0.25)), "causal": draw.random() < 0.4}
    if draw.random() < 0.4:
        options["window_size"] = (draw.choice((-1, 0, 3, 40)), draw.choice((-1, 0, 2, 70)))
    if shape["buckets"]:
        options |= {"bidirectional": draw.random() < 0.5, "max_distance": 30}
    return Variant(shape, options)


def test_combinations():
    """Forty random combinations of features, judged together by the error bound."""
    case, comparison, draw = CASES["attention"], Comparison(), random.Random(3)
    for seed in range(40):
        variant = random_variant(draw)
        results = {}
        for name in ("ours", "eager", "exact"):
            inputs = case.inputs(variant, seed, torch.float32)
            inputs = case.exact(inputs) if name == "exact" else inputs
            function, extra = (case.function, {"backend": "cpu"}) if name == "ours" else (case.reference, {})
            outputs = case.run(function, variant, inputs, **extra)
            grads = case.run_backward(inputs, outputs, seed)
            results[name] = {"out": outputs[0], "lse": outputs[1], **{f"d{n}": g for n, g in grads.items()}}
        for name, ours in results["ours"].items():
            own = Comparison(factor=100.0)  # a wrong tile cannot hide among the others
            for c in (comparison, own):
                c.add(name, ours, results["eager"][name], results["exact"][name])
            assert not own.failures(), f"{variant}: {own.failures()}"
    assert not comparison.failures(), "; ".join(comparison.failures())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_large_scores(backend):
    """Scores of ±2000 neither overflow nor lose their gradient."""
    q, k, v = (randn(1, 100, 1, 32, seed=s) for s in range(3))
    q = (q * 300).requires_grad_()
    out, lse = ops.attention(q, k, v, return_lse=True, backend=backend)
    want = torch.softmax((q.double()[0, :, 0] @ k.double()[0, :, 0].T) * 32**-0.5, -1) @ v.double()[0, :, 0]
    torch.testing.assert_close(out[0, :, 0].double(), want, rtol=1e-4, atol=1e-4)
    assert lse.abs().max() > 1000
    assert gradients(out, torch.ones_like(out), q)[0].isfinite().all()


@pytest.mark.parametrize(("keys", "scale", "offset"), [(1024, 1, 0), (1023, 1, 0), (1024, 3, 3)])
def test_errors_of_long_sums_stay_near_eagers(keys, scale, offset):
    """A thousand keys and queries, float32: RMS errors are at most 1.5 times eager's.

    With an offset in the values dp and delta nearly cancel: those errors are within the bound of all ops.
    """
    comparison = Comparison(factor=2.0 if offset else 1.5)
    q, dout = randn(1, 1024, 2, 32) * scale, randn(1, 1024, 2, 32, seed=1)
    k, v = randn(1, keys, 2, 32, seed=2), randn(1, keys, 2, 32, seed=3) + offset
    results = {}
    for name, dtype in (("ours", torch.float32), ("eager", torch.float32), ("exact", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        attend = functools.partial(ops.attention, return_lse=True, backend="cpu")
        out, _ = (attend if name == "ours" else ops.attention_reference)(*inputs, causal=True)
        results[name] = [out, *gradients(out, dout.to(dtype), *inputs)]
    for name, *tensors in zip(("out", "dq", "dk", "dv"), *results.values()):
        comparison.add(name, *tensors)
        if not offset:
            assert comparison.ours[name].rms <= 1.5 * comparison.eager[name].rms, name
    assert not comparison.failures(), comparison.failures()


def test_softcap_with_a_bias_and_its_limits():
    """The bias is added after the softcap, and its table's gradient does not have the softcap's slope."""
    case = CASES["attention"]
    variant = Variant({"b": 2, "s": 90, "h": 2, "d": 16, "buckets": 8}, {"softcap": 2.0, "max_distance": 9})
    checks.error_bound(case, variant, torch.float32, "cpu", ["cpu"], range(1))
    q = randn(1, 30, 2, 16)
    # A softcap far above the scores changes them by their cube; one far below makes the softmax flat.
    assert torch.equal(ops.attention(q, q, q, backend="cpu"), ops.attention(q, q, q, softcap=0.0, backend="cpu"))
    wide, plain = ops.attention(q, q, q, softcap=1e4, backend="cpu"), ops.attention(q, q, q, backend="cpu")
    torch.testing.assert_close(wide, plain, rtol=1e-4, atol=1e-5)
    flat = ops.attention(q, q, q, softcap=1e-6, backend="cpu")
    torch.testing.assert_close(flat, q.mean(1, keepdim=True).expand_as(q), rtol=1e-4, atol=1e-5)


FULL_ROWS = {"packed": False, "dropout": False, "bias": False, "masked": False, "gradient": False}


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "changed", "chosen"),
    [
        ((2, 512, 4, 64), torch.bfloat16, 90, {}, "sdpa"),
        ((2, 4096, 4, 128), torch.float16, 90, {}, "sdpa"),
        ((2, 511, 4, 64), torch.bfloat16, 90, {}, "triton"),
        ((2, 512, 4, 96), torch.bfloat16, 90, {}, "triton"),
        ((2, 512, 4, 64), torch.float32, 90, {}, "triton"),
        ((2, 512, 4, 64), torch.bfloat16, 80, {}, "triton"),
        *(((2, 512, 4, 64), torch.bfloat16, 90, {name: True}, "triton") for name in (*FULL_ROWS, "softcap")),
        ((2, 512, 4, 64), torch.bfloat16, 90, {"return_lse": True}, "triton"),
    ],
)
def test_auto_takes_cudnns_where_it_was_faster(shape, dtype, capability, changed, chosen, monkeypatch):
    """On a fake tensor of a GPU: full rows without a gradient on Hopper; the rest stays with fastlm's kernels."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("fastlm.ops._preferences._capability", lambda index: capability)
    with FakeTensorMode():
        q = torch.empty(shape, dtype=dtype, device="cuda:0")
    assert _registry.choose("attention", "auto", q, **{**FULL_ROWS, **changed}) == chosen


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, False),
        ({"causal": True}, False),
        ({"window_size": (3, -1)}, True),
        ({"key_mask": torch.ones(1, 8, dtype=torch.bool)}, True),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_what_auto_is_told(options, masked, gradient, monkeypatch):
    told = []
    choose = _registry.choose
    monkeypatch.setattr(
        _registry, "choose", lambda *args, **features: told.append(features) or choose(*args, **features)
    )
    q = torch.randn(1, 8, 2, 16, requires_grad=gradient)
    ops.attention(q, q, q, **options)
    with torch.no_grad():
        ops.attention(q, q, q, **options)
    assert [(f["masked"], f["gradient"]) for f in told] == [(masked, gradient), (masked, False)]


def test_sdpa_agrees_and_refuses():
    q, v = randn(2, 30, 4, 16), randn(2, 40, 2, 16, seed=1)
    table = randn(8, 4)
    mask = torch.arange(40) < torch.tensor([[40], [25]])
    bias = ops.RelativeBias(table, True, 20)
    for options in ({}, {"causal": True}, {"key_mask": mask, "relative_bias": bias}, {"window_size": (3, 9)}):
        want = ops.attention(q, v, v, backend="reference", **options)
        torch.testing.assert_close(ops.attention(q, v, v, backend="sdpa", **options), want, rtol=1e-4, atol=1e-5)
    refused = [
        ({"dropout_p": 0.1}, "dropout bits"),
        ({"return_lse": True}, "no lse"),
        ({"softcap": 50.0}, "no softcap"),
        ({"relative_bias": ops.RelativeBias(table.requires_grad_(), True, 20)}, "gradient for the table"),
    ]
    for options, reason in refused:
        with pytest.raises(ValueError, match=reason):
            ops.attention(q, v, v, backend="sdpa", **options)
    with pytest.raises(ValueError, match="cu_seqlens"):
        ops.attention(
            q[0],
            v[0],
            v[0],
            cu_seqlens_q=cu_seqlens((30,)),
            max_seqlen_q=30,
            cu_seqlens_k=cu_seqlens((40,)),
            max_seqlen_k=40,
            backend="sdpa",
        )


def test_dtypes_and_autocast():
    """float64 and float16 have their backends on the CPU too; autocast lowers float32."""
    q = randn(1, 9, 2, 8)
    want = ops.attention(q, q, q)
    for dtype in (torch.float64, torch.float16):
        out, lse = ops.attention(*[q.to(dtype)] * 3, return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="float64"):
        ops.attention(*[q.double()] * 3, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(q, q, q).dtype == torch.bfloat16


Q = torch.zeros(2, 6, 4, 8)
PACKED = torch.zeros(12, 4, 8)
CU = cu_seqlens((6, 6))
BAD = {
    "q: expected a floating-point": (Q.long(), {}),
    "q: expected shape": (PACKED, {}),
    "q: expected shape (T, H, D)": (Q, {"cu_seqlens_q": CU, "max_seqlen_q": 6}),
    "q: expected at least one head": (Q[..., :0], {}),
    "k: expected torch.float32, q's dtype, got torch.bfloat16; cast it, or use autocast": (Q, {"k": Q.bfloat16()}),
    "k: expected shape": (Q, {"k": Q[..., :4]}),
    "k: expected shape (2, ": (Q, {"k": Q[:1]}),
    "v: expected shape": (Q, {"v": Q[:, :3]}),
    "k: expected a number of heads": (Q, {"k": Q[:, :, :3], "v": Q[:, :, :3]}),
    "window_size": (Q, {"window_size": (-2, 0)}),
    "key_mask: expected torch.bool": (Q, {"key_mask": torch.ones(2, 6)}),
    "key_mask: expected shape (2, 6)": (Q, {"key_mask": torch.ones(2, 5, dtype=torch.bool)}),
    "key_mask: packed": (PACKED, {"cu_seqlens_q": CU, "max_seqlen_q": 6, "key_mask": torch.ones(2, 6).bool()}),
    "cu_seqlens_q: expected with": (Q, {"max_seqlen_q": 6}),
    "cu_seqlens_q: expected torch.int32": (PACKED, {"cu_seqlens_q": CU.long(), "max_seqlen_q": 6}),
    "max_seqlen_q: expected with": (PACKED, {"cu_seqlens_q": CU}),
    "max_seqlen_k: expected with": (PACKED, {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 6}),
    "max_seqlen_q: expected at least": (PACKED, {"cu_seqlens_q": CU, "max_seqlen_q": 5}),
    "cu_seqlens_q: expected a sequence": (PACKED.to("meta"), {"cu_seqlens_q": CU[:1].to("meta"), "max_seqlen_q": 6}),
    "cu_seqlens_q: expected to start": (PACKED, {"cu_seqlens_q": CU + 1, "max_seqlen_q": 9}),
    "cu_seqlens_q: expected to start at 0, never": (PACKED, {"cu_seqlens_q": CU[[0, 2, 1, 2]], "max_seqlen_q": 12}),
    "cu_seqlens_q: expected to start at 0, never to fall": (PACKED, {"cu_seqlens_q": CU[:2], "max_seqlen_q": 6}),
    "cu_seqlens_k: expected one more": (
        PACKED,
        {"cu_seqlens_q": CU, "cu_seqlens_k": cu_seqlens((12,)), "max_seqlen_q": 6, "max_seqlen_k": 12},
    ),
    "relative_bias: expected a RelativeBias": (Q, {"relative_bias": torch.zeros(32, 4)}),
    "relative_bias.table: expected shape": (Q, {"relative_bias": ops.RelativeBias(torch.zeros(32, 3))}),
    "relative_bias.table: expected at least 4": (Q, {"relative_bias": ops.RelativeBias(torch.zeros(2, 4))}),
    "relative_bias.max_distance": (Q, {"relative_bias": ops.RelativeBias(torch.zeros(32, 4), True, 8)}),
    "dropout_p: expected a probability": (Q, {"dropout_p": 1.5}),
    "dropout_p: attention drops in steps": (Q, {"dropout_p": 0.001}),
    "rng: expected torch.int64": (Q, {"dropout_p": 0.5, "rng": torch.zeros(2)}),
    "site": (Q, {"site": -1}),
    'backend="cuda"': (Q, {"backend": "cuda"}),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(message, backend):
    q, options = BAD[message]
    options = {"k": q, "v": q, "backend": backend, **options}
    with pytest.raises(ValueError) as error:
        ops.attention(q, **options)
    assert str(error.value).startswith(message)


def test_raw_op_checks_cu_seqlens():
    """The raw op reads memory by cu_seqlens, so it looks at them itself."""
    cu = torch.tensor([0, 6, 40], dtype=torch.int32)
    arguments = (cu, cu, None, None, None, 40, 40, -1, -1, 1.0, True, 0, 0.0, 0, 0.0)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        torch.ops.fastlm.attention_fwd(PACKED, PACKED, PACKED, *arguments, "cpu")


def test_a_window_wider_than_any_sequence_is_none():
    q = torch.randn(1, 5, 2, 8)
    wide = ops.attention(q, q, q, window_size=(2**63 - 1, 2**63 - 1), backend="cpu")
    assert torch.equal(wide, ops.attention(q, q, q, backend="cpu"))
