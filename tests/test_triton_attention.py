"""attention in Triton beyond its OpCase: dropout's bits against the CPU's, all kinds of tiles, what the GPU gets."""

import itertools
import random

import ptx
import pytest
import torch
from test_attention import BAD, RNG, cu_seqlens, gradients, randn, random_variant

from fastlm import ops
from fastlm.testing import checks
from fastlm.testing.cases import CASES, Variant

pytest.importorskip("triton", reason="triton is not installed")

from fastlm.kernels import attention as kernels
from fastlm.testing.ahead_of_time import compile_for

CASE = CASES["attention"]


def error_bound(variant, dtype):
    checks.error_bound(CASE, variant, dtype, "cpu", ["triton"], range(1), ptx.triton_on_ptx)


def patterns(layout, backend, causal):
    """What is dropped, as the output and each gradient show it: (H, Sq, Sk) bool of every sequence, by tensor.

    Scores are 0. The output shows it where v is the identity, dv where dout is. Where v and dout are constant and lse's
    gradient makes delta 0, ds is 0 where dropped; dq shows it where k is the identity, dk where q is.
    """
    heads, d, lengths = 2, 48, (20, 0, 37)
    eye = torch.cat([torch.eye(n, d) for n in lengths])[:, None].expand(-1, heads, -1)
    zero, one = torch.zeros_like(eye), torch.ones_like(eye) / d
    options = {"dropout_p": 0.3, "rng": RNG, "stream": 9, "backend": backend, "causal": causal}
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


@pytest.mark.parametrize(("layout", "causal"), [("packed", False), ("packed", True), ("right", False), ("left", True)])
def test_dropout_bits_are_the_cpus(layout, causal):
    """Forward and both backward passes, in layouts where blocks of sixteen keys start anywhere in a tile."""
    want = patterns(layout, "cpu", causal)
    with ptx.triton_on_ptx():
        got = patterns(layout, "triton", causal)
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
)  # fmt: skip


@pytest.mark.parametrize("variant", LONG, ids=str)
def test_blocks_without_a_mask(variant):
    error_bound(variant, torch.bfloat16)


@pytest.mark.parametrize(
    ("d", "buckets", "dtype"),
    [*((d, 0, torch.bfloat16) for d in (1, 96, 160)), (256, 8, torch.bfloat16), (256, 0, torch.float32)],
)
def test_head_dims(d, buckets, dtype):
    """Both sides of the OpCase's; 256 with the bias's gradient too, whose tiles are smaller there."""
    error_bound(
        Variant({"h": 1, "d": d, "lengths": (20, 40), "buckets": buckets}, {"max_distance": 9} if buckets else {}),
        dtype,
    )


def test_combinations():
    """Random combinations of features; the plain blocks and most of the OpCase's shapes are above."""
    draw = random.Random(5)
    for _ in range(2):
        error_bound(random_variant(draw), torch.float16)


def test_padding_has_no_influence():
    """NaN in a masked row of k and v changes nothing and gets no gradient; a query without keys gives 0."""
    q, k, v, dout = (randn(3, 150, 1, 16, seed=s).bfloat16() for s in range(4))
    mask = torch.ones(3, 150, dtype=torch.bool)
    mask[0, :13] = mask[0, 140:] = mask[1] = False
    mask[2, 20:23] = False
    results = []
    for fill in (0.0, float("nan")):
        inputs = [q.clone(), *(torch.where(mask[..., None, None], x, fill) for x in (k, v))]
        inputs = [x.requires_grad_() for x in inputs]
        with ptx.triton_on_ptx():
            out, lse = ops.attention(*inputs, key_mask=mask, return_lse=True, backend="triton")
            results.append([out, lse, *gradients(out, dout, *inputs)])
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *results):
        assert torch.equal(a, b), name
    out, lse, dq, dk, dv = results[1]
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()
    assert not dq[1].any()
    assert not dk[~mask].any()
    assert not dv[~mask].any()


def test_limits():
    q = torch.zeros(1, 4, 1, 257, dtype=torch.bfloat16)
    with ptx.triton_on_ptx(), pytest.raises(ValueError, match="head dimensions up to 256, not 257"):
        ops.attention(q, q, q, backend="triton")


@pytest.mark.parametrize("message", BAD)
def test_bad_input_raises_before_any_launch(message):
    q, options = BAD[message]
    with ptx.triton_on_ptx() as launches, pytest.raises(ValueError) as error:
        ops.attention(q, **{"k": q, "v": q, "backend": "triton", **options})
    assert str(error.value).startswith(message)
    assert launches.kernels() == []


@pytest.mark.parametrize(("width", "copied"), [(16, False), (17, True)])
def test_slices_of_one_tensor(width, copied, monkeypatch):
    """q, k and v as a fused projection leaves them are not copied, but where rows begin off 16 bytes. The same bits."""
    seen, launch = [], kernels.attention_fwd

    def attention_fwd(*args, **options):
        seen.append([x.data_ptr() for x in args[:3]])
        launch(*args, **options)

    monkeypatch.setattr(kernels, "attention_fwd", attention_fwd)
    views = randn(1, 40, 3, 2, width).bfloat16()[..., :16].unbind(2)
    dout = randn(1, 40, 2, 16, seed=1).bfloat16()
    results = []
    for inputs in (views, [x.clone(memory_format=torch.contiguous_format) for x in views]):
        inputs = [x.detach().requires_grad_() for x in inputs]
        with ptx.triton_on_ptx():
            out = ops.attention(*inputs, backend="triton")
            results.append([out, *gradients(out, dout, *inputs)])
    assert all(map(torch.equal, *results))
    assert (seen[0] != [x.data_ptr() for x in views]) == copied


def test_float32_products_follow_torchs_switch():
    assert kernels._precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert kernels._precision(torch.float32) == "tf32"
        assert kernels._precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("packed", [False, True])
def test_a_philox_call_serves_sixteen_keys(packed):
    """No thread repeats another's work: of a call's twenty high products, no more than the tile needs.

    Two loops. Where blocks of sixteen keys may start anywhere three calls serve thirty-two keys: in all loops of packed
    input but those of a query tile over blocks without a mask.
    """
    variant = CASE.production[1 if packed else 0]  # BERT's: the static report compiles them too
    with compile_for(90) as compiled:
        CASE.everything(CASE.function, variant, CASE.inputs(variant, 0, torch.bfloat16), 0, backend="triton")
        for name in ("fwd", "dkdv", "dq"):
            c = kernels.config(name, 64, 2)
            calls = c.block_m * c.block_n // 16 // (32 * c.num_warps)
            calls *= (1 if name != "dkdv" else 1.5) + 1.5 if packed else 2
            text = next(kernel.ptx for kernel in compiled if kernel.name == f"_{name}")
            assert text.count("mul.wide.u32") <= 20 * (calls + 1) + 10, name  # the call's key, and a few addresses
