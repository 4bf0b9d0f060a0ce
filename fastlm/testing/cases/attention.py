"""attention."""

import itertools
import math

import torch

from fastlm import ops
from fastlm.testing.cases._case import OpCase, Variant, draw_rng


def _cu_seqlens(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _make(
    generator, b=0, s=0, h=1, d=8, kv=0, sk=-1, lengths=(), lengths_k=(), cache=(), padding="", buckets=0, offset=0
):
    """b sequences of s queries and sk keys (default s), h heads, kv of them for keys and values (default h).

    lengths: packed input with these sequences (lengths_k: of the keys).
    cache: k and v are caches of sk rows, with so many keys of each sequence; of b sequences, or of packed ones.
    padding: a key_mask with padding on the "left", the "right", or on "both" sides, where also the last sequence has
    no key at all; "holes": any key may be masked.
    buckets: a bias table. offset: added to all scores, by the first feature of q and k.
    """

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    kv, sk = kv or h, s if sk < 0 else sk
    lengths_k = lengths_k or lengths
    rows_q, rows_k = ((sum(lengths),), (sum(lengths_k),)) if lengths else ((b, s), (b, sk))
    rows_k = (len(cache), sk) if cache else rows_k
    key_mask = None
    if padding == "holes":
        key_mask = torch.rand(b, sk, generator=generator) < 0.5
    elif padding:
        pad = torch.randint(0, sk // 3 + 1, (2, b, 1), generator=generator)
        first = pad[0] if padding in ("left", "both") else torch.zeros_like(pad[0])
        last = sk - (pad[1] if padding in ("right", "both") else torch.zeros_like(pad[1]))
        key_mask = (torch.arange(sk) >= first) & (torch.arange(sk) < last)
        if padding == "both":
            key_mask[-1] = False
    packed = {"cu_seqlens_q": _cu_seqlens(lengths), "max_seqlen_q": max(lengths)} if lengths else {}
    if cache:
        packed["cache_seqlens"] = torch.tensor(cache, dtype=torch.int32)
    elif lengths:
        packed |= {"cu_seqlens_k": _cu_seqlens(lengths_k), "max_seqlen_k": max(lengths_k)}
    q, k = randn(*rows_q, h, d), randn(*rows_k, kv, d)
    if offset:  # the default softmax_scale is 1/sqrt(d)
        q[..., 0], k[..., 0] = abs(offset) ** 0.5 * d**0.25, math.copysign(abs(offset) ** 0.5 * d**0.25, offset)
    return {
        "q": q,
        "k": k,
        "v": randn(*rows_k, kv, d),
        "table": randn(buckets, h) if buckets else None,
        "key_mask": key_mask,
        "rng": draw_rng(generator),
        **packed,
    }


def _bind(function):
    """The function with `table` and its flags for a RelativeBias, so that the table is an input like any other."""

    def call(table=None, bidirectional=True, max_distance=128, **arguments):
        bias = None if table is None else ops.RelativeBias(table, bidirectional, max_distance)
        return function(relative_bias=bias, **arguments)

    return call


def _return_lse(function):
    def call(*, backend, **arguments):
        return function(**arguments, return_lse=True, backend=backend)

    return call


def _pairs(shape, options):
    """Query-key pairs that the textbook counts: all of a sequence's, half of them where causal; all of a cache's."""
    lengths = shape.get("lengths") or (shape["s"],) * shape["b"]
    if "cache" in shape:
        return sum(q * k for q, k in zip(lengths, shape["cache"]))
    lengths_k = shape.get("lengths_k") or (shape.get("sk", shape["s"]),) * shape["b"] if "b" in shape else lengths
    return sum(q * k for q, k in zip(lengths, lengths_k)) / (2 if options.get("causal") else 1)


def _flops(shape, options, backward):
    forward = 4 * _pairs(shape, options) * shape["h"] * shape["d"]
    return int(forward * 2.5 if backward else forward)


def _bytes(shape, options, itemsize, backward):
    lengths = shape.get("lengths") or (shape["s"],) * shape["b"]
    keys = sum(shape.get("lengths_k") or lengths) if "b" not in shape else shape["b"] * shape.get("sk", shape["s"])
    keys = sum(shape.get("cache", ())) or keys
    queries, h, d = sum(lengths), shape["h"], shape["d"]
    tensors = 2 * queries * h + 2 * keys * shape.get("kv", h)  # q, out; k, v
    if backward:  # q, out, dout, dq; k, v, dk, dv
        tensors *= 2
    return itemsize * tensors * d + 4 * queries * h  # and lse


_TESTS = (
    Variant({"b": 2, "s": 37, "h": 2, "d": 8}),
    Variant({"b": 1, "s": 130, "h": 2, "d": 64}, {"dropout_p": 0.1, "site": 3}),
    Variant({"b": 2, "s": 70, "h": 2, "d": 33}, {"causal": True, "dropout_p": 0.5}),
    Variant({"b": 2, "s": 9, "sk": 75, "h": 4, "kv": 2, "d": 128}, {"causal": True}),
    Variant({"b": 2, "s": 75, "sk": 20, "h": 2, "d": 8}, {"causal": True}),  # queries that see no key
    Variant({"b": 1, "s": 150, "h": 1, "d": 128}, {"window_size": (20, 5)}),
    Variant({"b": 1, "s": 150, "sk": 140, "h": 4, "d": 8}, {"window_size": (16, -1), "causal": True}),
    Variant({"b": 3, "s": 70, "h": 2, "d": 16, "padding": "both"}, {"dropout_p": 0.1}),
    Variant({"b": 3, "s": 40, "h": 2, "d": 16, "padding": "left"}, {"causal": True}),
    Variant({"b": 2, "s": 66, "h": 1, "d": 16, "padding": "holes"}),
    Variant({"b": 2, "s": 70, "h": 2, "d": 16, "padding": "both"}, {"softcap": 1.5, "dropout_p": 0.1}),
    Variant({"b": 1, "s": 150, "h": 4, "kv": 2, "d": 64}, {"softcap": 50.0, "causal": True, "softmax_scale": 1.0}),
    Variant({"b": 1, "s": 70, "h": 2, "d": 16, "offset": 300}, {"causal": True}),
    Variant({"b": 2, "s": 40, "sk": 70, "h": 1, "d": 33, "offset": -100}, {"dropout_p": 0.1}),
    Variant({"h": 4, "kv": 1, "d": 16, "lengths": (5, 0, 70, 1, 0)}, {"dropout_p": 0.1}),
    Variant({"h": 2, "d": 16, "lengths": (3, 70, 0, 9), "lengths_k": (65, 7, 4, 0)}, {"causal": True}),
    Variant(
        {"h": 4, "kv": 2, "d": 16, "lengths": (1, 0, 9, 2), "cache": (40, 7, 70, 0), "sk": 72, "buckets": 8},
        {"causal": True, "bidirectional": False, "max_distance": 20, "window_size": (30, -1), "softcap": 2.0},
        inference=True,
    ),
    Variant({"b": 2, "s": 1, "h": 4, "kv": 1, "d": 16, "cache": (300, 0), "sk": 320}, {"causal": True}, inference=True),
    Variant({"b": 2, "s": 150, "h": 2, "d": 16, "buckets": 32}, {"max_distance": 50, "softmax_scale": 0.5}, ("table",)),
    Variant(
        {"h": 2, "d": 16, "lengths": (70, 0, 30), "buckets": 8},
        {"causal": True, "bidirectional": False, "max_distance": 20, "dropout_p": 0.1},
    ),
    Variant({"b": 2, "s": 0, "h": 2, "d": 8}),
    Variant({"b": 2, "s": 3, "sk": 0, "h": 2, "d": 8}),
)

# Real lengths of documents cut at 512: many short ones, every fifth or so as long as it may be.
_LENGTHS = (512, 61, 187, 512, 23, 240, 34, 512, 96, 310, 512, 142, 57, 398, 512, 88)

# What bfloat16 models launch: BERT padded and packed, GPT-2, T5's encoder, and heads of 128 with fewer for keys.
_PRODUCTION = (
    Variant({"b": 1, "s": 16, "h": 12, "d": 64, "padding": "right"}, {"dropout_p": 0.1}),
    Variant({"h": 12, "d": 64, "lengths": (16,)}, {"dropout_p": 0.1}),
    Variant({"h": 12, "d": 64, "lengths": (16,)}, {"causal": True}),
    Variant({"h": 8, "d": 64, "lengths": (16,), "buckets": 32}, {"softmax_scale": 1.0, "dropout_p": 0.1}),
    Variant({"h": 32, "kv": 8, "d": 128, "lengths": (16,)}, {"causal": True}),
    # Decode steps of GPT-2, and of twelve heads on two key heads, whose keys are split.
    Variant({"b": 1, "s": 1, "h": 12, "d": 64, "cache": (16,), "sk": 1024}, inference=True),
    Variant({"b": 1, "s": 1, "h": 12, "kv": 2, "d": 128, "cache": (16,), "sk": 1024}, inference=True),
)

_BENCHMARKS = (
    Variant({"b": 8, "s": 512, "h": 12, "d": 64}),
    Variant({"b": 8, "s": 512, "h": 12, "d": 64}, {"dropout_p": 0.1}),
    Variant({"h": 12, "d": 64, "lengths": _LENGTHS}, {"dropout_p": 0.1}),
    Variant({"b": 4, "s": 1024, "h": 12, "d": 64}, {"causal": True}),
    Variant({"b": 8, "s": 512, "h": 8, "d": 64, "buckets": 32}, {"softmax_scale": 1.0}),
    Variant({"b": 1, "s": 1, "h": 12, "d": 64, "cache": (1024,), "sk": 1088}, inference=True),
    Variant({"b": 8, "s": 1, "h": 12, "d": 64, "cache": (4096,) * 8, "sk": 4160}, inference=True),
)

# BERT-base packed and as it is, GPT-2, T5-base; BERT-large; a decoder of 4096, and long rows. Of these few heads, since
# eager's scores have to fit beside everything else.
_CUDA = (
    Variant({"h": 12, "d": 64, "lengths": 4 * _LENGTHS}, {"dropout_p": 0.1}),
    Variant({"b": 32, "s": 512, "h": 12, "d": 64}),
    Variant({"b": 16, "s": 1024, "h": 12, "d": 64}, {"causal": True}),
    Variant({"b": 32, "s": 512, "h": 12, "d": 64, "buckets": 32}, {"softmax_scale": 1.0}),
    Variant({"b": 32, "s": 512, "h": 12, "d": 64}, {"dropout_p": 0.1}),
    Variant({"b": 1, "s": 16384, "h": 4, "d": 128}, {"causal": True}),
    Variant({"b": 1, "s": 16384, "h": 4, "d": 64}),
    Variant({"b": 1, "s": 4096, "h": 32, "kv": 8, "d": 128}, {"causal": True}),
    Variant({"b": 32, "s": 512, "h": 16, "d": 64}, {"dropout_p": 0.1}),
    Variant({"b": 1, "s": 1, "h": 32, "kv": 8, "d": 128, "cache": (8192,), "sk": 16384}, inference=True),
    Variant({"b": 32, "s": 1, "h": 12, "d": 64, "cache": (1024,) * 32, "sk": 1088}, inference=True),
)

_Q = torch.ones(1, 4, 2, 16)

ATTENTION = OpCase(
    op="attention",
    function=_return_lse(_bind(ops.attention)),
    reference=_bind(ops.attention_reference),
    make=_make,
    gradients=("q", "k", "v", "table"),
    tests=_TESTS,
    benchmarks=_BENCHMARKS,
    benchmarks_cuda=_CUDA,
    production=_PRODUCTION,
    bytes=_bytes,
    flops=_flops,
    gradcheck=(
        Variant(
            {"b": 2, "s": 4, "sk": 3, "h": 2, "kv": 1, "d": 3, "padding": "left", "buckets": 4},
            {"dropout_p": 0.2, "max_distance": 3},
        ),
        Variant(
            {"h": 1, "d": 3, "lengths": (2, 0, 3), "buckets": 4},
            {"causal": True, "bidirectional": False, "max_distance": 4},
        ),
        Variant({"b": 1, "s": 3, "sk": 4, "h": 1, "d": 3}, {"softcap": 0.7, "causal": True}),
    ),
    accepted={"q": _Q, "k": _Q, "v": _Q},
    refused=(
        ({"q": torch.ones(4, 2, 16)}, "q: expected shape (B, S, H, D), or (T, H, D) with cu_seqlens_q"),
        ({"k": torch.ones(1, 4, 2, 8)}, "k: expected shape (1, *, *, 16), got (1, 4, 2, 8)"),
        ({"v": torch.ones(1, 3, 2, 16)}, "v: expected shape (1, 4, 2, 16), got (1, 3, 2, 16)"),
        ({"key_mask": torch.ones(1, 3, dtype=torch.bool)}, "key_mask: expected shape (1, 4), got (1, 3)"),
        ({"softcap": -1.0}, "softcap: expected a positive finite number in float32, or 0 for no cap, got -1.0"),
        ({"dropout_p": -0.1}, "dropout_p: expected a probability in [0, 1], got -0.1"),
    ),
)
