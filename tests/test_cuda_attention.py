"""attention in CUDA C++ beyond its OpCase: dropout bits equal to the CPU's, all kinds of tiles, launches for a GPU."""

import random
import re
import subprocess

import pytest
import test_cuda
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
from test_attention import random_variant
from test_cuda import device

from fastlm import _native, ops
from fastlm.testing import checks
from fastlm.testing.cases import CASES, Variant

pytestmark = test_cuda.pytestmark
CASE = CASES["attention"]


def error_bound(variant, dtype):
    checks.error_bound(CASE, variant, dtype, "cpu", ["cuda"], range(1), device)


@pytest.mark.parametrize(("layout", "causal"), LAYOUTS)
def test_dropout_bits_are_the_cpus(layout, causal):
    dropout_bits_are_the_cpus(layout, causal, "cuda", device)


def test_gradients_of_one_product():
    gradients_of_one_product("cuda", device)


# The kernels without dropout and bias, which d 64 and 128 alone have.
BARE = (
    Variant({"h": 2, "kv": 1, "d": 64, "lengths": (30, 300)}, {"causal": True}),
    Variant({"b": 1, "s": 300, "sk": 200, "h": 1, "d": 64, "padding": "both"}),
    Variant({"b": 1, "s": 200, "h": 1, "d": 128, "padding": "holes"}, {"window_size": (-1, 90)}),
)


@pytest.mark.parametrize("variant", [*LONG, *BARE], ids=str)
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


@pytest.mark.parametrize("options", [{}, {"causal": True, "table": True, "dropout_p": 0.1}], ids=["bare", "all"])
@pytest.mark.parametrize(("offsets_q", "offsets_k"), WRONG.values(), ids=WRONG)
def test_wrong_offsets(offsets_q, offsets_k, options):
    wrong_offsets("cuda", device, offsets_q, offsets_k or offsets_q, **options)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(40))
def test_any_wrong_offsets(seed):
    any_wrong_offsets("cuda", device, random.Random(seed))


def test_padding_has_no_influence():
    padding_has_no_influence("cuda", device)


def test_more_buckets_than_a_launch_takes():
    error_bound(Variant({"b": 1, "s": 40, "h": 2, "d": 8, "buckets": 140}, {"max_distance": 100}), torch.bfloat16)


def test_limits():
    q = torch.zeros(1, 4, 1, 257, dtype=torch.bfloat16)
    with device(), pytest.raises(ValueError, match="head dimensions up to 256, not 257"):
        ops.attention(q, q, q, backend="cuda")


def test_softcap_beside_a_bias_is_refused():
    """The OpCase has it without a bias; a bias beside it is refused with the reason."""
    q, bias = torch.zeros(1, 4, 1, 8), ops.RelativeBias(torch.zeros(8, 1), True, 9)
    with device(), pytest.raises(ValueError, match="softcap or relative_bias, not both"):
        ops.attention(q, q, q, softcap=2.0, relative_bias=bias, backend="cuda")


def cuobjdump(*options):
    """What cuobjdump writes of each attention kernel of the build: (symbol, (kernel, dtype, d), text)."""
    knobs = pytest.importorskip("triton", reason="triton brings cuobjdump").knobs
    command = [knobs.nvidia.cuobjdump.path, *options, _native.cuda().__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for function in re.split(r"Function (?:: )?", text)[1:]:
        match = re.match(r"_ZN6fastlm4cuda\d+attention_(\w+?)_kernelI(\w+?)Li(\d+)E\w*", function)
        if match:
            yield match[0], match.groups(), function


def test_16_bit_products_are_on_the_tensor_cores_and_float32s_on_fma():
    arch = f"sm_{_native.cuda().architectures().split(',')[0][:-1]}"
    of_64 = [name for name, (_, _, d), _ in cuobjdump("--dump-resource-usage", "-arch", arch) if d == "64"]
    seen = set()
    for _, (kernel, dtype, _), text in cuobjdump("-sass", "-arch", arch, "-fun", ",".join(of_64)):
        if kernel == "cache":  # one query a sequence: nothing for the tensor cores
            continue
        seen.add((kernel, dtype))
        products = {"fwd": 2, "dkdv": 4, "dq": 3}[kernel]
        tensor_cores, fma = (len(re.findall(rf"\b{word}\b", text)) for word in (r"HMMA\.16816\.F32", "FFMA"))
        if dtype == "f":
            assert tensor_cores == 0
            assert fma > 100 * products
        else:  # a step's of every product: 32 rows, 32 columns and 64 between them at least, 16 x 8 x 16 each
            assert tensor_cores >= 32 * products
    assert len(seen) == 9


def test_16_bit_kernels_of_heads_of_64_and_128_do_not_spill():
    for arch in {"800", "900"} & set(_native.cuda().architectures().split(",")):
        for _, kernel, text in cuobjdump("--dump-resource-usage", "-arch", f"sm_{arch[:-1]}"):
            if kernel[1] != "f" and kernel[2] in ("64", "128"):
                assert re.search(r"STACK:0 .*LOCAL:0", text), kernel
