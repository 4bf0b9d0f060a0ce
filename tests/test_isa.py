"""The instruction sets of the C++ kernels (csrc/cpu/isa.h), every one that this CPU has, in one process."""

import pytest
import torch
from test_attention import RNG, gradients, randn

from fastlm import _native, ops
from fastlm.generate import cpu_decoder
from fastlm.testing import checks
from fastlm.testing.cases import CASES, Variant

pytestmark = pytest.mark.skipif(bool(_native.missing_cpu()), reason=str(_native.missing_cpu()))

FLOAT = ("portable", "x86-64-v3", "x86-64-v4")  # without bfloat16 units
UNITS = ("avx512-bf16", "amx", "amx-twin")
ATTENTION = CASES["attention"]
# Each feature of attention once, and shapes beside those of the OpCase: several tiles of keys, windows and padding that
# begin inside of one, rows that are no multiple of a tile.
FEW = (
    Variant({"b": 1, "s": 150, "h": 2, "kv": 1, "d": 40}, {"softcap": 5.0, "causal": True, "dropout_p": 0.1}),
    Variant({"b": 2, "s": 33, "sk": 150, "h": 1, "d": 64, "buckets": 32}, {"max_distance": 50, "dropout_p": 0.3}),
    Variant({"b": 3, "s": 70, "h": 1, "d": 16, "padding": "both"}, {"window_size": (40, 9)}),
)
MORE = (
    Variant({"b": 1, "s": 333, "h": 2, "d": 64}, {"window_size": (100, 3), "dropout_p": 0.1}),
    Variant(
        {"b": 2, "s": 30, "sk": 260, "h": 2, "d": 72, "padding": "left"}, {"dropout_p": 0.1, "softmax_scale": -0.2}
    ),
    Variant({"h": 4, "kv": 2, "d": 64, "lengths": (129, 1, 64, 0, 200), "buckets": 8}, {"causal": True}),
    Variant({"b": 2, "s": 140, "h": 1, "d": 20, "padding": "holes"}, {"causal": True, "softmax_scale": 0.0}),
)


@pytest.fixture
def use():
    """Sets the instruction set, or skips where this CPU lacks it; the one before comes back after the test."""
    cpu = _native.cpu()
    before = cpu.use_isa(None)

    def use(name):
        if name not in cpu.isas():
            pytest.skip(f"this CPU has no {name}: it has {', '.join(cpu.isas())}")
        cpu.use_isa(name)

    yield use
    cpu.use_isa(before)


def test_names(use):
    cpu = _native.cpu()
    names = cpu.isas()
    assert names[0] == "portable"
    assert names[-1] == "amx-twin"
    assert names == [name for name in (*FLOAT, *UNITS) if name in names]
    best = cpu.use_isa("portable")  # the fixture asked for it
    assert best in names[:-1]
    assert cpu.use_isa("auto") == "portable"
    assert cpu.use_isa(None) == best
    for wrong in ("sse9", "", "AMX"):
        with pytest.raises(ValueError, match=f"isa: expected auto, {', '.join(names)} on this CPU, got {wrong}$"):
            cpu.use_isa(wrong)
    assert cpu.use_isa(None) == best


@pytest.mark.parametrize("variant", FEW, ids=str)
@pytest.mark.parametrize("isa", [*FLOAT, *UNITS])
def test_attention(use, isa, variant):
    use(isa)
    checks.error_bound(ATTENTION, variant, torch.bfloat16, "cpu", ["cpu"], seeds=range(2))


@pytest.mark.long
@pytest.mark.parametrize("variant", [*ATTENTION.tests, *MORE], ids=str)
@pytest.mark.parametrize("isa", [*FLOAT, *UNITS])
def test_every_variant_of_attention(use, isa, variant):
    use(isa)
    checks.error_bound(ATTENTION, variant, torch.bfloat16, "cpu", ["cpu"])


@pytest.mark.parametrize("isa", UNITS)
def test_attention_on_the_units_is_deterministic_with_any_strides_and_threads(use, isa):
    use(isa)
    for variant in FEW[:2]:
        checks.deterministic(ATTENTION, variant, torch.bfloat16, "cpu", "cpu")
        checks.non_contiguous(ATTENTION, variant, torch.bfloat16, "cpu", "cpu")


@pytest.mark.parametrize("isa", UNITS)
def test_padding_has_no_influence_on_the_units(use, isa):
    """NaN in a masked row of k and v changes no bit and gets no gradient; a query without keys gives 0."""
    use(isa)
    q, k, v, dout = (randn(3, 80, 2, 16, seed=s).bfloat16() for s in range(4))
    mask = torch.ones(3, 80, dtype=torch.bool)
    mask[0, :13] = mask[0, 50:] = mask[1] = False
    mask[2, 20:23] = False
    results = []
    for fill in (0.0, float("nan")):
        inputs = [q.clone(), *(torch.where(mask[..., None, None], x, fill) for x in (k, v))]
        inputs = [x.requires_grad_() for x in inputs]
        out = ops.attention(*inputs, key_mask=mask, backend="cpu")
        results.append([out, *gradients(out, dout, *inputs)])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results):
        assert torch.equal(a, b), name
    out, dq, dk, dv = results[1]
    assert not out[1].any()
    assert not dq[1].any()
    assert not dk[~mask].any()
    assert not dv[~mask].any()


@pytest.mark.parametrize("isa", UNITS)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_on_the_units_drops_what_float_drops(use, isa, p):
    """With equal scores and v the identity, the output is the mask."""
    lengths, d = (40, 0, 67, 150), 160
    cu = torch.tensor([0, 40, 40, 107, 257], dtype=torch.int32)
    q = torch.zeros(257, 2, d, dtype=torch.bfloat16)
    v = torch.cat([torch.eye(n, d) for n in lengths])[:, None].expand(-1, 2, -1).bfloat16()
    options = {"cu_seqlens_q": cu, "max_seqlen_q": 150, "dropout_p": p, "rng": RNG, "site": 9, "backend": "cpu"}
    use("portable")
    want = ops.attention(q, q, v, **options)
    use(isa)
    out = ops.attention(q, q, v, **options)
    assert torch.equal(out != 0, want != 0)
    assert want.any() == (p < 1.0)
    torch.testing.assert_close(out, want, rtol=2**-7, atol=0)


def pairs(b):
    """A right operand of csrc/cpu/units.h: rows 2i and 2i + 1 of b (k, n) in the low and high halves of words."""
    return b.view(b.shape[0] // 2, 2, -1).transpose(1, 2).contiguous()


def product(a, b):
    c = torch.full((a.shape[0], b.shape[1]), torch.nan)
    words = pairs(b)
    _native.cpu().bf16_product(a.data_ptr(), words.data_ptr(), c.data_ptr(), a.shape[0], b.shape[1], a.shape[1])
    return c


@pytest.mark.parametrize("isa", UNITS)
@pytest.mark.parametrize(("m", "n", "k"), [(16, 16, 32), (48, 80, 96), (32, 64, 320)])
def test_products(use, isa, m, n, k):
    """To the rounding of a float sum."""
    use(isa)
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randn(*size, generator=generator).bfloat16() for size in ((m, k), (k, n)))
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((product(a, b) - exact).abs() <= k * 2.0**-24 * size).all()


def test_products_need_units(use):
    use("portable")
    with pytest.raises(ValueError, match="isa: expected one with bfloat16 units in use"):
        product(torch.ones(16, 32).bfloat16(), torch.ones(32, 16).bfloat16())


def test_amx_is_its_twin_to_the_bit(use):
    """Sums of any size, denormals, infinities and NaN of bfloat16; the products of bytes and bfloat16 of decoding."""
    use("amx")
    generator = torch.Generator().manual_seed(0)
    scale = torch.ldexp(torch.ones(64, 96), torch.randint(-75, 40, (64, 96), generator=generator))
    a = (torch.randn(64, 96, generator=generator) * scale).bfloat16()
    b = (torch.randn(96, 48, generator=generator) * scale.t()[:, :48]).bfloat16()
    tiny = torch.full((64, 96), 2.0**-130).bfloat16()
    odd = a.clone()
    odd[3, 5], odd[9, 70], odd[20, 0] = torch.inf, torch.nan, -torch.inf
    packers = [cpu_decoder._Packer(weights) for weights in ("int8", "bfloat16")]  # they keep the packed weights
    matrices = [packer.matrix(torch.randn(40, 192, generator=generator), None) for packer in packers]
    x = torch.randn(19, 192, generator=generator)

    def everything():
        yield from (product(left, b) for left in (a, tiny, odd, a * 2.0**-50))
        for matrix in matrices:
            y = torch.full((19, 40), torch.nan)
            _native.cpu().matvec(matrix=matrix, x=x, batch=19, y=y, threads=1)
            yield y

    amx = list(everything())
    use("amx-twin")
    for ours, twin in zip(amx, everything()):
        assert torch.equal(ours.isnan(), twin.isnan())
        assert torch.equal(ours.nan_to_num(0.0), twin.nan_to_num(0.0))


@pytest.mark.parametrize("name", UNITS)
def test_scores_of_any_size(name, use):
    """A key has all of a query's probability: p is 1, not what rounding a score and the maximum apart leaves."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 64, 1, 64) for _ in range(4))
    found = []
    for isa in ("x86-64-v4", name):
        use(isa)
        q_, k_, v_ = (x.bfloat16().requires_grad_() for x in (2e3 * q, 2e3 * k, v))
        out = ops.attention(q_, k_, v_)
        out.backward(dout.bfloat16())
        found.append((out, q_.grad, k_.grad))
        assert v_.grad.abs().max() <= 64 * dout.abs().max()
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=0.02, rtol=0.02)
