"""attention in CUDA C++ beyond its OpCase: dropout's bits against the CPU's, all kinds of tiles, what the GPU gets."""

import random
import re
import subprocess
from functools import partial

import pytest
import torch
from attention_checks import LAYOUTS, LONG, dropout_bits_are_the_cpus, padding_has_no_influence
from test_attention import random_variant
from test_cuda import device, pytestmark  # noqa: F401

from fastlm import _native, ops
from fastlm.testing import checks
from fastlm.testing.cases import CASES, Variant

CASE = CASES["attention"]


def error_bound(variant, dtype):
    checks.error_bound(CASE, variant, dtype, "cpu", ["cuda"], range(1), device)


@pytest.mark.parametrize(("layout", "causal"), LAYOUTS)
def test_dropout_bits_are_the_cpus(layout, causal):
    dropout_bits_are_the_cpus(layout, causal, "cuda", device)


@pytest.mark.parametrize("variant", LONG, ids=str)
def test_blocks_without_a_mask(variant):
    error_bound(variant, torch.bfloat16)


@pytest.mark.parametrize(
    ("d", "dtype"), [*((d, torch.bfloat16) for d in (1, 24, 96, 160, 256)), (160, torch.float16), (256, torch.float32)]
)
def test_head_dims(d, dtype):
    error_bound(
        Variant({"h": 1, "d": d, "lengths": (20, 40), "buckets": 8}, {"max_distance": 9, "dropout_p": 0.1}), dtype
    )


def test_combinations():
    """Random combinations of features; the plain blocks and most of the OpCase's shapes are above."""
    draw = random.Random(5)
    for _ in range(8):
        error_bound(random_variant(draw), torch.float16)


def test_padding_has_no_influence():
    padding_has_no_influence("cuda", device)


def test_more_buckets_than_a_launch_takes():
    error_bound(Variant({"b": 1, "s": 40, "h": 2, "d": 8, "buckets": 140}, {"max_distance": 100}), torch.bfloat16)


def test_limits():
    q = torch.zeros(1, 4, 1, 257, dtype=torch.bfloat16)
    with device(), pytest.raises(ValueError, match="head dimensions up to 256, not 257"):
        ops.attention(q, q, q, backend="cuda")
