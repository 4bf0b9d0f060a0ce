"""attention's forward by tensor descriptors (TMA), as compiled for sm_90: the bits of loads by pointers, and faults."""

import dataclasses
import re
from unittest import mock

import ptx
import ptx.driver
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from test_ptx_hopper import needs_fences

from fastlm.bench import sass
from fastlm.kernels import attention as kernels
from fastlm.kernels import tuning
from fastlm.testing import checks
from fastlm.testing.ahead_of_time import compile_for
from fastlm.testing.cases import CASES, Variant

CASE = CASES["attention"]
BASE = kernels.Config(64, 64, 4, 3, descriptors=True)
CANDIDATES = [
    (d, kernels.Config(*block, descriptors=True)) for d, blocks in kernels._DESCRIBED.items() for block in blocks
]


def described(config=None):
    """Forward has this configuration, or its own, with descriptors; the other kernels have theirs."""
    original = kernels._config

    def choose(kernel, q, threshold):
        found = original(kernel, q, threshold)
        return (config or dataclasses.replace(found, descriptors=True)) if kernel == "fwd" else found

    return mock.patch.object(kernels, "_config", choose)


def forward(variant, config, spoil=lambda inputs: None, dtype=torch.bfloat16):
    """(out, how many tiles TMA brought)."""
    inputs = CASE.inputs(variant, 0, dtype)
    with torch.no_grad(), described(config), ptx.triton_on_ptx(arch=90) as launches:
        spoil(inputs)
        out = CASE.run(CASE.function, variant, inputs, backend="triton")[0]
    return out, launches.reports[-1][1].count("cp.async.bulk.tensor")


def same_bits(variant, config, spoil=lambda inputs: None):
    out, tiles = forward(variant, config, spoil)
    expected, none = forward(variant, dataclasses.replace(config, descriptors=False), spoil)
    assert tiles > 0 == none
    assert torch.equal(out, expected)
    return out


GROUPED = Variant({"b": 2, "s": 9, "sk": 75, "h": 4, "kv": 2, "d": 128}, {"causal": True})
PACKED = Variant({"h": 2, "kv": 1, "d": 72, "lengths": (70, 9)})


@needs_fences
def test_descriptors_give_the_bits_of_pointers():
    """Of grouped heads in a batch, whose last keys are behind the plain block."""
    assert same_bits(GROUPED, BASE).isfinite().all()


@needs_fences
def test_rows_of_other_sequences_have_no_influence():
    """The first tile's second block has six keys of its sequence, then NaN, which times a probability of 0 is NaN.

    Heads of 72 columns: TMA fills the block of 128 with 0.
    """

    def spoil(inputs):
        inputs["k"][70:], inputs["v"][70:] = torch.nan, torch.nan

    (clean, tiles), (out, _) = forward(PACKED, BASE), forward(PACKED, BASE, spoil)
    assert tiles > 0
    assert torch.equal(out[:64], clean[:64])
    assert out[70:].isnan().all()


@needs_fences
@pytest.mark.long
@pytest.mark.parametrize(("d", "config"), CANDIDATES, ids=str)
def test_every_candidate(d, config):
    """Several plain blocks, so that all stages of the loop are used again; padding with NaN behind; T5's bias."""

    def spoil(inputs):
        inputs["v"].masked_fill_(~inputs["key_mask"][:, :, None, None], torch.nan)

    same_bits(Variant({"b": 2, "s": 20, "sk": 600, "h": 1, "d": d, "padding": "right"}), config, spoil)
    same_bits(Variant({"h": 1, "d": d - 8, "lengths": (300, 140)}, {"causal": True, "softcap": 30.0}), config)
    variant = Variant({"b": 1, "s": 40, "sk": 420, "h": 1, "d": d, "buckets": 8}, {"max_distance": 20})
    same_bits(variant, config)


@needs_fences
@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [v for v in CASE.tests if "cache" not in v.shape], ids=str)
def test_error_bound(variant, dtype):
    """Every input, those that no descriptor can have too, and dropout."""
    with described():
        checks.error_bound(CASE, variant, dtype, "cpu", ["triton"], range(1), lambda: ptx.triton_on_ptx(arch=90))


def rows(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (rows(2, 5, 3, 128), True),
        (rows(5, 3, 72), True),
        (rows(2, 5, 3, 3, 128)[:, :, 1], True),  # as a fused projection leaves it
        (rows(1, 1, 1, 8), True),
        (rows(2, 5, 3, 33), False),  # 66 bytes
        (rows(5 * 128 + 4)[4:].view(5, 1, 128), False),  # off 16 bytes
        (rows(2, 5, 1, 128).expand(2, 5, 3, 128), False),
        (rows(2, 0, 3, 128), False),
    ],
)
def test_what_a_descriptor_can_have(x, fits):
    """TMA's limits, as the twin of the driver's encoder has them; the rest is loaded by pointers."""
    found = kernels._descriptors(BASE, x, x)
    assert kernels._descriptors(dataclasses.replace(BASE, descriptors=False), x, x) == {}
    assert found.keys() == ({"k_desc", "v_desc"} if fits else set())
    for value in found.values():
        view = x.as_strided(value.shape, value.strides)
        ptx.tensor_map(view, (64, 64, 1, 1), 128)
        assert torch.equal(view, (x if x.dim() == 4 else x[None]).transpose(1, 2))


FENCE, WAIT = r"fence\.proxy\.async\.shared::cta; mov\.b32", r"mbarrier\.try_wait\.parity\.[^;]*;"
FAULTS = {
    "no_fence_behind_the_initialisation": (FENCE, "mov.b32", "async: .*without a fence.mbarrier_init or fence.proxy"),
    "no_wait": (WAIT, "setp.eq.u32 complete, 0, 0;", "async: .*a bulk copy is still writing"),
    "other_bytes": (r"(expect_tx[^;]*), 16384;", r"\1, 16400;", "divergence: .*nothing completes|misses"),
}


@needs_fences
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name, monkeypatch):
    pattern, instead, message = FAULTS[name]

    def load(text, entry):
        text, count = re.subn(pattern, instead, text)
        assert count >= 1
        return ptx.load(text, entry)

    monkeypatch.setattr(ptx.driver, "load", load)
    monkeypatch.setattr(ptx.driver._Driver, "get_current_device", lambda self: name)  # a kernel is loaded anew
    with pytest.raises(ptx.KernelFault, match=message):
        forward(GROUPED, BASE)


def test_tune_measures_descriptors_where_they_are_predicted_to_win():
    def offered(kernel="fwd", d=128, itemsize=2, arch=90, dropout=0):
        return [c for c in kernels._others(kernel, d, itemsize, arch, dropout) if c.descriptors]

    assert BASE in offered()
    assert kernels.Config(64, 32, 8, 2, descriptors=True) in offered(d=256)
    others = ({"dropout": 1}, {"arch": 80}, {"arch": 100}, {"itemsize": 4}, {"d": 64}, {"kernel": "dq"})
    assert not any(offered(**case) for case in (*others, {"kernel": "dkdv"}, {"kernel": "cache"}))
    assert not any(c.descriptors for d in (64, 128, 256) for c in [kernels._rule("fwd", d, 2, 90, 0)])


@pytest.mark.long
def test_machine_code():
    """TMA in the loop and no other loads, no spills, wgmma not serialised, and fewer instructions than by pointers."""
    variant, loops = CASE.production[4], {}
    for descriptors in (True, False):
        config = dataclasses.replace(BASE, descriptors=descriptors)
        with torch.no_grad(), compile_for(90) as compiled, tuning.override(("attention_fwd", (128, 2, 90, 0)), config):
            CASE.run(CASE.function, variant, CASE.inputs(variant, 0, torch.bfloat16), backend="triton")
        (kernel,) = compiled
        assert not kernel.warnings()
        assert not kernel.resources().spills
        loops[descriptors] = [i.opcode.split(".")[0] for i in sass.main_loop(sass.parse(kernel.sass()))]
    assert "UTMALDG" in loops[True]
    assert "LDGSTS" not in loops[True]
    assert "LDGSTS" in loops[False]
    assert len(loops[True]) < 0.97 * len(loops[False])
