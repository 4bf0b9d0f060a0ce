"""Shared by the tests of attention's GPU kernels: dropout bits read back, sequences that reach all loops, offsets that
are wrong."""

import itertools
from unittest import mock

import torch
from test_attention import RNG, cu_seqlens, gradients, randn

from fastlm import ops
from fastlm.ops import _registry
from fastlm.ops._heads import split_heads
from fastlm.testing.cases import Variant


def patterns(layout, backend, causal):
    """What is dropped, as the output and each gradient show it: (H, Sq, Sk) bool of every sequence, by tensor.

    Scores are 0. The output shows it where v is the identity, dv where dout is. Where v and dout are constant and lse's
    gradient makes delta 0, ds is 0 where dropped; dq shows it where k is the identity, dk where q is.
    """
    heads, d, lengths = 2, 48, (20, 0, 37)
    eye = torch.cat([torch.eye(n, d) for n in lengths])[:, None].expand(-1, heads, -1)
    zero, one = torch.zeros_like(eye), torch.ones_like(eye) / d
    options = {"dropout_p": 0.3, "rng": RNG, "site": 9, "backend": backend, "causal": causal}
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    if layout == "packed":
        options |= {"cu_seqlens_q": cu_seqlens(lengths), "max_seqlen_q": max(lengths)}
    else:
        mask = mask.flip(1) if layout == "left" else mask
        options["key_mask"] = mask

    def place(x):
        if layout != "packed":
            padded = torch.zeros(len(lengths), max(lengths), *x.shape[1:])
            padded[mask] = x
            x = padded
        return x.clone().requires_grad_()

    def run(q, k, v, dout):
        q, k, v, dout = map(place, (q, k, v, dout))
        out, lse = ops.attention(q, k, v, return_lse=True, **options)
        dlse = (out * dout).detach().sum(-1).transpose(-1, -2)
        results = (out, *torch.autograd.grad((out, lse), (q, k, v), (dout.detach(), dlse)))
        return [x if layout == "packed" else x[mask] for x in results]

    out, _, _, dv = run(zero, zero, eye, eye)
    _, dq, _, _ = run(zero, eye, one, one)
    _, _, dk, _ = run(eye, zero, one, one)
    kept = {"out": out != 0, "dq": dq > 1e-5, "dk": dk > 1e-5, "dv": dv != 0}  # kept: 2e-4 at least
    starts = cu_seqlens(lengths).tolist()
    return {
        name: [
            x[start:end, :, : end - start].permute(*((1, 0, 2) if name in ("out", "dq") else (1, 2, 0)))
            for start, end in itertools.pairwise(starts)
        ]
        for name, x in kept.items()
    }


LAYOUTS = (("packed", False), ("packed", True), ("right", False), ("left", True))


def dropout_bits_are_the_cpus(layout, causal, backend, around):
    """Forward and both backward passes, in layouts where blocks of sixteen keys start anywhere in a tile."""
    want = patterns(layout, "cpu", causal)
    with around():
        got = patterns(layout, backend, causal)
    for sequence, reference in enumerate(want["out"]):
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(want[name][sequence], reference), f"the cpu's {name}"
            assert torch.equal(got[name][sequence], reference), f"{name}, sequence {sequence}"
    assert want["out"][2].any()


# A sequence long enough for blocks without a mask, in every kernel: alone in its tiles, at a start that is no multiple
# of 16, and, with a bias, far from the diagonal on either side.
LONG = (
    Variant({"h": 1, "d": 16, "lengths": (30, 300)}, {"dropout_p": 0.1}),
    Variant({"h": 1, "d": 16, "lengths": (30, 300)}, {"causal": True}),
    Variant({"h": 1, "d": 16, "lengths": (30, 300), "buckets": 8}, {"max_distance": 8, "dropout_p": 0.1}),
    Variant({"b": 1, "s": 300, "h": 1, "d": 16, "padding": "both", "buckets": 8}, {"max_distance": 8}),
    Variant(
        {"b": 1, "s": 300, "h": 1, "d": 16, "buckets": 8}, {"max_distance": 8, "causal": True, "bidirectional": False}
    ),
    Variant({"b": 1, "s": 300, "h": 1, "d": 16, "padding": "left"}, {"window_size": (200, 30), "dropout_p": 0.1}),
    Variant({"b": 1, "s": 300, "sk": 200, "h": 1, "d": 8}, {"softmax_scale": -0.3}),
    Variant({"b": 1, "s": 70, "h": 1, "d": 8}, {"softmax_scale": 0.0, "causal": True}),
)


def padding_has_no_influence(backend, around):
    """NaN in a masked row of k and v changes nothing and gets no gradient; a query without keys gives 0."""
    q, k, v, dout = (randn(3, 150, 1, 16, seed=s).bfloat16() for s in range(4))
    mask = torch.ones(3, 150, dtype=torch.bool)
    mask[0, :13] = mask[0, 140:] = mask[1] = False
    mask[2, 20:23] = False
    results = []
    for fill in (0.0, float("nan")):
        inputs = [q.clone(), *(torch.where(mask[..., None, None], x, fill) for x in (k, v))]
        inputs = [x.requires_grad_() for x in inputs]
        with around():
            out, lse = ops.attention(*inputs, key_mask=mask, return_lse=True, backend=backend)
            results.append([out, lse, *gradients(out, dout, *inputs)])
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *results):
        assert torch.equal(a, b), name
    out, lse, dq, dk, dv = results[1]
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()
    assert not dq[1].any()
    assert not dk[~mask].any()
    assert not dv[~mask].any()


# cu_seqlens of 12 tokens that no device can refuse; each once for queries and keys, then for one of both.
WRONG = {
    "falls": ([0, 9, 5, 12], None),
    "falls from the end": ([0, 12, 5, 12], None),
    "falls at last": ([0, 12, 5], None),
    "beyond": ([0, 8, 20], None),
    "beyond, then inside": ([0, 30, 12], None),
    "negative": ([-3, 5, 12], None),
    "far off": ([-(2**31), 2**31 - 1, 12], None),
    "tail": ([0, 5, 9], None),
    "head": ([2, 5, 12], None),
    "no sequence holds any": ([0, 0, 0], None),
    "keys fall": ([0, 5, 8, 12], [0, 9, 5, 12]),
    "keys beyond": ([0, 5, 12], [0, 5, 4096]),
    "tail of keys": ([0, 5, 12], [0, 4, 9]),
}


def lost_rows(tokens, cu, other):
    """Which rows must not have a plausible number: (tokens,) bool. cu, other: (offsets, tokens)."""
    for offsets, size in (cu, other):
        if offsets[0] < 0 or offsets[-1] > size or any(a > b for a, b in itertools.pairwise(offsets)):
            return torch.ones(tokens, dtype=torch.bool)
    row = torch.arange(tokens)
    return (row < cu[0][0]) | (row >= cu[0][-1])


def wrong_offsets(backend, around, offsets_q, offsets_k, tokens_q=12, tokens_k=12, *, table=False, **options):
    """Without the checks, which are for the CPU. The interpreter raises for an access outside of a tensor."""
    q, k, v = (randn(n, 2, 16, seed=i).bfloat16() for i, n in enumerate((tokens_q, tokens_k, tokens_k)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    if table:
        inputs.append(torch.linspace(-1, 1, 16).view(8, 2).requires_grad_())
        options["relative_bias"] = ops.RelativeBias(inputs[3], max_distance=9)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (offsets_q, offsets_k))
    options |= {"max_seqlen_q": tokens_q, "max_seqlen_k": tokens_k, "rng": RNG, "backend": backend}
    column = _registry.column("attention", backend)
    with mock.patch.object(column, "check_cu_seqlens", create=True), around():
        out, lse = ops.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options)
        dq, dk, dv, *dtable = torch.autograd.grad(out.square().sum() + lse.exp().sum(), inputs)
    judge_wrong_offsets(offsets_q, offsets_k, tokens_q, tokens_k, out, lse, dq, dk, dv, *dtable)


def judge_wrong_offsets(offsets_q, offsets_k, tokens_q, tokens_k, out, lse, dq, dk, dv, *dtable):
    """NaN or 0 in the rows in question, and only there."""
    queries, keys = (offsets_q, tokens_q), (offsets_k, tokens_k)
    lost_q, lost_k = lost_rows(tokens_q, queries, keys), lost_rows(tokens_k, keys, queries)
    for name, x, lost in (("out", out, lost_q), ("lse", lse.t(), lost_q)):
        assert x[lost].isnan().all(), name
        assert not x[~lost].isnan().any(), name
    for name, x, lost in (("dq", dq, lost_q), ("dk", dk, lost_k), ("dv", dv, lost_k)):
        assert bool((x[lost].isnan() | (x[lost] == 0)).all()), name
        assert x[~lost].isfinite().all(), name
    for x in dtable if lost_q.all() else ():
        assert bool((x.isnan() | (x == 0)).all())


def random_offsets(draw, tokens):
    """Three to six offsets, right ones with one or two replaced by any number."""
    offsets = [0, *sorted(draw.choices(range(tokens + 1), k=draw.randrange(1, 5))), tokens]
    for _ in range(draw.randrange(3)):
        offsets[draw.randrange(len(offsets))] = draw.choice((-(2**31), -1, 0, 7, tokens // 2, tokens + 1, 2**31 - 1))
    return offsets


def any_wrong_offsets(backend, around, draw):
    """wrong_offsets of several tiles, with any options."""
    tokens_q, tokens_k = draw.randrange(1, 300), draw.randrange(1, 300)
    offsets_q, offsets_k = random_offsets(draw, tokens_q), random_offsets(draw, tokens_k)
    offsets_k = (offsets_k + [offsets_k[-1]] * 5)[: len(offsets_q)]
    options = {"causal": draw.random() < 0.3, "table": draw.random() < 0.3, "dropout_p": draw.choice((0.0, 0.1))}
    if draw.random() < 0.3:
        options["window_size"] = (draw.choice((-1, 0, 20)), draw.choice((-1, 0, 20)))
    wrong_offsets(backend, around, offsets_q, offsets_k, tokens_q, tokens_k, **options)


def gradients_of_one_product(backend, around):
    """q, k and v of one product get the gradients of separate tensors, to the bit, in one tensor and without a copy."""
    draw = torch.Generator().manual_seed(0)
    cu, heads, d = torch.tensor([0, 25, 40], dtype=torch.int32), 2, 64
    qkv = torch.randn(40, 3 * heads * d, generator=draw).bfloat16().requires_grad_()
    apart = [x.detach().clone().requires_grad_() for x in qkv.detach().unflatten(-1, (3, heads, d)).unbind(-3)]
    dout = torch.randn(40, heads, d, generator=draw).bfloat16()
    options = {"cu_seqlens_q": cu, "max_seqlen_q": 25, "backend": backend}
    bases, split = [], split_heads(qkv, heads)
    split[0].register_hook(lambda dq: bases.append(dq._base))
    with around():
        expected = torch.autograd.grad(ops.attention(*apart, **options), apart, dout)
        (got,) = torch.autograd.grad(ops.attention(*split, **options), qkv, dout)
    assert torch.equal(got.unflatten(-1, (3, heads, d)), torch.stack(expected, -3))
    assert got.data_ptr() == bases[0].data_ptr()
