"""attention in Triton beyond its OpCase: dropout bits equal to the CPU's, all kinds of tiles, launches for a GPU."""

import functools
import os
import random
import re
import subprocess
import sys

import ptx
import pytest
import torch
from attention_checks import (
    LAYOUTS,
    LONG,
    WRONG,
    any_wrong_offsets,
    dropout_bits_are_the_cpus,
    gradients_of_one_product,
    padding_has_no_influence,
    wrong_offsets,
)
from test_attention import BAD, gradients, randn, random_variant

from fastlm import ops
from fastlm.testing import checks
from fastlm.testing.cases import CASES, Variant

pytest.importorskip("triton", reason="triton is not installed")

from fastlm.kernels import attention as kernels
from fastlm.testing.ahead_of_time import compile_for

CASE = CASES["attention"]


def error_bound(variant, dtype):
    checks.error_bound(CASE, variant, dtype, "cpu", ["triton"], range(1), ptx.triton_on_ptx)


@pytest.mark.parametrize(("layout", "causal"), LAYOUTS)
def test_dropout_bits_are_the_cpus(layout, causal):
    dropout_bits_are_the_cpus(layout, causal, "triton", ptx.triton_on_ptx)


def test_gradients_of_one_product():
    gradients_of_one_product("triton", ptx.triton_on_ptx)


# Of the two that are for --all, dropout and a scale are with other features in the rest.
@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, id=str(v), marks=pytest.mark.long if v in (LONG[0], LONG[6]) else ()) for v in LONG],
)
def test_blocks_without_a_mask(variant):
    error_bound(variant, torch.bfloat16)


@pytest.mark.parametrize(
    ("d", "buckets", "dtype"),
    [
        (1, 0, torch.bfloat16),
        (96, 0, torch.bfloat16),
        pytest.param(160, 0, torch.bfloat16, marks=pytest.mark.long),
        (256, 8, torch.bfloat16),
        pytest.param(256, 0, torch.float32, marks=pytest.mark.long),
    ],
)
def test_head_dims(d, buckets, dtype):
    """Both sides of the OpCase's; 256 with the bias's gradient too, whose tiles are smaller there."""
    error_bound(
        Variant({"h": 1, "d": d, "lengths": (20, 40), "buckets": buckets}, {"max_distance": 9} if buckets else {}),
        dtype,
    )


@pytest.mark.long
def test_combinations():
    """Random combinations of features; the plain blocks and most of the OpCase's shapes are above."""
    draw = random.Random(5)
    for _ in range(2):
        error_bound(random_variant(draw), torch.float16)


@pytest.mark.parametrize("options", [{}, {"causal": True, "table": True, "dropout_p": 0.1}], ids=["bare", "all"])
@pytest.mark.parametrize(("offsets_q", "offsets_k"), WRONG.values(), ids=WRONG)
def test_wrong_offsets(offsets_q, offsets_k, options):
    wrong_offsets("triton", ptx.triton_on_ptx, offsets_q, offsets_k or offsets_q, **options)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(40))
def test_any_wrong_offsets(seed):
    any_wrong_offsets("triton", ptx.triton_on_ptx, random.Random(seed))


def test_padding_has_no_influence():
    padding_has_no_influence("triton", ptx.triton_on_ptx)


def test_limits():
    q = torch.zeros(1, 4, 1, 257, dtype=torch.bfloat16)
    with ptx.triton_on_ptx(), pytest.raises(ValueError, match="head dimensions up to 256, not 257"):
        ops.attention(q, q, q, backend="triton")


INTERPRETED_BFLOAT16 = """
import torch
from fastlm import ops
from fastlm.ops import _registry
from fastlm.testing.cases import CASES

case = CASES["attention"]
inputs = case.inputs(case.tests[0], 0, torch.bfloat16)
try:
    case.run(case.function, case.tests[0], inputs, backend="triton")
except ValueError as error:
    assert "tl.dot" in str(error) and "TRITON_INTERPRET" in str(error), error
else:
    raise AssertionError("bfloat16 attention ran on the interpreter")
x = inputs["q"]
_registry._pages["attention"].auto["cpu"] = ("triton", "reference")
assert _registry.choose("attention", "auto", x) == "reference"
assert _registry.choose("attention", "auto", x.half()) == "triton"
assert _registry.choose("attention", "auto", x.float()) == "triton"
"""


def test_interpreted_bfloat16_is_refused():
    """Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot. "auto" takes the next backend."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED_BFLOAT16]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


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


@functools.cache
def compiled_for_hopper(index):
    """Forward and backward of a production variant, which the static report compiles too."""
    with compile_for(90) as compiled:
        CASE.everything(CASE.function, v := HOPPER[index], CASE.inputs(v, 0, torch.bfloat16), 0, backend="triton")
    return {kernel.name: kernel for kernel in compiled}


# BERT's packed and T5's with dropout, and T5's without, which only evaluation runs.
HOPPER = (
    *CASE.production[:5],
    Variant({"h": 8, "d": 64, "lengths": (16,), "buckets": 32}, {"softmax_scale": 1.0}),
)


@pytest.mark.parametrize("index", [1, pytest.param(3, marks=pytest.mark.long), pytest.param(5, marks=pytest.mark.long)])
def test_wgmma_is_not_serialised(index):
    kernels_of = compiled_for_hopper(index)
    for name in ("_fwd", "_dkdv", "_dq"):
        assert "wgmma.mma_async" in kernels_of[name].ptx
        assert not kernels_of[name].warnings(), name


def test_keys_gradients_copy_each_row_of_lse_and_delta_once():
    """Both loops, ahead and in them; packed with dropout also two offsets of a row's sequence. Triton 3.6 had 128."""
    text = compiled_for_hopper(1)["_dkdv"].ptx
    assert len(re.findall(r"cp\.async\.ca\.shared\.global \[[^]]*\], \[[^]]*\], 0x4\b", text)) == 12


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_philox_call_serves_sixteen_keys(packed):
    """No thread repeats another's work: of a call's twenty high products, no more than the tile needs.

    Two loops. Where blocks of sixteen keys may start anywhere three calls serve thirty-two keys: in all loops of packed
    input but those of a query tile over blocks without a mask.
    """
    compiled = compiled_for_hopper(1 if packed else 0)
    for name in ("fwd", "dkdv", "dq"):
        with compile_for(90):  # whose configurations these are
            c = kernels.config(name, 64, 2, dropout=True)
        calls = c.block_m * c.block_n // 16 // (32 * c.num_warps)
        calls *= (1 if name != "dkdv" else 1.5) + 1.5 if packed else 2
        text = compiled[f"_{name}"].ptx
        assert text.count("mul.wide.u32") <= 20 * (calls + 1) + 10, name  # the call's key, and a few addresses
