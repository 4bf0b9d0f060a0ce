"""Shared by the tests of attention's GPU kernels: reads back dropout bits, makes sequences that reach all loops."""

import itertools

import torch
from test_attention import RNG, cu_seqlens, gradients, randn

from fastlm import ops
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
