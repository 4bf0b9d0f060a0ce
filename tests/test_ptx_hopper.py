"""sm_90 on the interpreter: wgmma, mbarriers and bulk copies, planted faults, and the OpCases compiled for it.

Every day a few variants are drawn by a seed, which a failure prints; `make test-all` has them all.
"""

import functools
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch

triton = pytest.importorskip("triton")
from ptx.snippets import evaluate  # noqa: E402
from ptx.sources import triton_features as tg  # noqa: E402

from fastlm.ops import _registry  # noqa: E402
from fastlm.testing import checks  # noqa: E402
from fastlm.testing.cases import CASES  # noqa: E402

# Triton's fences between cp.async and wgmma came with 3.7.1 (triton#10537).
FENCED = tuple(map(int, triton.__version__.split(".")[:3])) >= (3, 7, 1)
needs_fences = pytest.mark.skipif(not FENCED, reason=f"Triton {triton.__version__} has no fence from cp.async to wgmma")

# ---- what the kernels of an H200 are -------------------------------------------------------------------------------

HAVE = [case for case in CASES.values() if "triton" in _registry.backends(case.op)]
AROUND = functools.partial(ptx.triton_on_ptx, arch=90)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The same in all processes of a run: what they collect must be the same.
SEED = os.environ.get("FASTLM_TEST_SEED") or os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(time.time_ns())


def drawn():
    """Parameters (case, variant, dtype); all but one of attention and two of the other ops are marked long."""
    choices = [(case, variant, dtype) for case in HAVE for variant in case.tests for dtype in DTYPES]
    choices = [(case, variant, dtype) for case, variant, dtype in choices if dtype in case.dtypes]
    mine = [choice for choice in choices if choice[0].op == "attention" and choice[2] == torch.bfloat16]
    rest = [choice for choice in choices if choice[0].op != "attention"]
    draw = random.Random(SEED)
    daily = [draw.choice(mine), *draw.sample(rest, 2)]
    for case, variant, dtype in choices:
        name = f"{case.op}-{variant}-{str(dtype).removeprefix('torch.')}"
        marks = () if (case, variant, dtype) in daily else pytest.mark.long
        yield pytest.param(case, variant, dtype, id=name, marks=marks)


@needs_fences
@pytest.mark.parametrize(("case", "variant", "dtype"), list(drawn()))
def test_error_bound_as_compiled_for_sm90(case, variant, dtype):
    print(f"FASTLM_TEST_SEED={SEED}")
    checks.error_bound(case, variant, dtype, "cpu", ["triton"], range(1), AROUND)


@needs_fences
def test_attention_with_a_bias_has_its_fences():
    """With a branch between its products, Triton left out the fence before the second (LOG.md, 2026-11-30)."""
    case = CASES["attention"]
    variant = next(v for v in case.tests if "buckets32" in str(v))
    checks.error_bound(case, variant, torch.bfloat16, "cpu", ["triton"], range(1), AROUND)


# ---- planted faults ------------------------------------------------------------------------------------------------

DOT, A_LOADED = "acc = tl.dot(a, b, acc)", "a = tl.load(a_tile, "
OF_ONE_WARP = r"{ .reg .b32 t; .reg .pred q; mov.u32 t, %tid.x; setp.lt.u32 q, t, 32; @q \1 }"
OTHER_TILE = (
    r"{ .reg .b64 o; .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 5; cvt.u64.u32 o, t; add.s64 o, o, \2; \1o\3 }"
)
# (kind, pattern, which, what takes its place, the source of the line that the finding names)
EDITS = {
    "without_a_fence_of_the_proxies": ("async", r"fence\.proxy\.async[^;]*;", 0, ";", DOT),
    "with_a_fence_of_global_memory": ("async", r"fence\.proxy\.async[^;]*;", 0, "fence.proxy.async.global;", DOT),
    "without_a_fence_of_the_accumulators": ("async", r"wgmma\.fence[^;]*;", 0, ";", DOT),
    "a_tile_overwritten_in_flight": ("async", r"wgmma\.wait_group\.sync\.aligned 1;", 0, ";", A_LOADED),
    "too_many_left_in_flight": ("async", r"(wgmma\.wait_group\.sync\.aligned) 1;", 0, r"\1 7;", A_LOADED),
    "products_in_no_group": ("async", r"wgmma\.commit_group[^;]*;", 0, ";", A_LOADED),
    "accumulators_read_in_flight": ("async", r"wgmma\.wait_group\.sync\.aligned 0;", 0, ";", "tl.store(c_tile, "),
    "a_tile_that_is_still_arriving": ("async", r"cp\.async\.wait_group \t?2;", 0, ";", DOT),
    "a_tile_of_another_warp_unordered": ("async", r"bar\.sync\s+0;", 1, ";", DOT),
    "a_warp_without_the_others": ("divergence", r"(wgmma\.mma_async[^;]*;)", 1, OF_ONE_WARP, DOT),
    "warps_with_other_tiles": ("divergence", r"(wgmma\.mma_async[^;]*, )(%rd\d+)(, %p[^;]*;)", 0, OTHER_TILE, DOT),
    "a_descriptor_past_the_block": (
        "bounds", r"(wgmma\.mma_async[^;]*, )(%rd\d+)(, %p[^;]*;)", 0,
        r"{ .reg .b64 o; add.s64 o, \2, 8192; \1o\3 }", DOT,
    ),
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def matmul():
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "M": "i32", "N": "i32:16", "K": "i32:16"}
    sizes = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "STAGES": 3}
    return ptx.compile_triton(tg.pipelined_matmul, types, sizes, arch=90)


def multiply(text):
    compiled, generator = matmul(), torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((64, 128), (128, 32)))
    c = ptx.uninitialised(torch.empty(64, 32))
    arguments = [a, b, c, 64, 32, 128, None, None]
    ptx.run(text, compiled.entry, 1, compiled.block, arguments, shared_bytes=compiled.shared_bytes)
    return c, a.float() @ b.float()


@needs_fences
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.parametrize("name", EDITS)
def test_planted_fault_is_found(name):
    kind, pattern, which, instead, source = EDITS[name]
    text = matmul().ptx
    found = list(re.finditer(pattern, text))[which]
    with pytest.raises(ptx.KernelFault) as caught:
        multiply(text[: found.start()] + found.expand(instead) + text[found.end() :])
    (finding,) = caught.value.findings
    print(finding)
    assert finding.kind == kind
    file, _, line = finding.location.rpartition(":")
    assert source in Path(file).read_text().splitlines()[int(line) - 1]


@needs_fences
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_correct_twin_is_clean_and_a_wrong_swizzle_is_not_its_result():
    text = matmul().ptx
    torch.testing.assert_close(*multiply(text))
    # The descriptors' top bits: 2, patterns of 64 bytes, which are the rows of both tiles. 3: of 32.
    wrong = text
    for constant in set(re.findall(r"or\.b64 \s*%rd\d+, %rd\d+, (-?\d{19});", text)):
        assert int(constant) % 2**64 >> 62 == 2
        wrong = wrong.replace(constant, str(int(constant) % 2**64 ^ 1 << 62))
    result, expected = multiply(wrong)
    assert (result - expected).abs().max() > 1


def test_a_block_of_fewer_warps_is_found():
    with pytest.raises(ptx.KernelFault, match=r"needs a warpgroup of four warps; the block has 2"):
        product("bf16", 8, 64, (1, False), (1, False), threads=64)


# ---- mbarriers, bulk copies, tensor maps ---------------------------------------------------------------------------

SOURCE = Path(__file__).parent / "ptx" / "sources" / "sm90.cu"
# FAULT: (kind, what the finding says). Its line has the number in a comment.
FAULTS = {
    1: ("async", "a bulk copy is still writing"),  # the wrong phase
    2: ("async", "without a fence.mbarrier_init"),
    3: ("divergence", "misses 0 of 1 arrivals and 16 bytes"),  # expect_tx too large
    4: ("async", "a bulk copy is still writing"),  # no wait
    5: ("async", "1 arrivals at an mbarrier that misses 0 of the 1"),  # a tile is not waited for to be free
    6: ("async", "no fence.proxy.async came in between"),
    7: ("async", "the block ends while this copy reads its shared memory"),
    8: ("divergence", "nothing completes"),  # two arrivals of each thread
    9: ("async", "no mbarrier was initialised"),
    10: ("race", "thread 0 initialised, and nothing orders the two"),
    11: ("alignment", "not aligned to 128"),
    12: ("async", "is still reading"),  # a store in no group
}


def twice(fault, box=(32, 8)):
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not installed")
    text = ptx.compile_cuda(SOURCE, (f"FAULT={fault}",), arch="90a")
    x = torch.randn(43, 100, generator=torch.Generator().manual_seed(0))
    y = ptx.uninitialised(torch.empty(43, 100))
    ptx.run(text, "twice", 4, 160, [ptx.tensor_map(x, box, 128), ptx.tensor_map(y, box, 128), 6])
    return x, y


def test_a_pipeline_of_bulk_copies():
    """Tiles over the edges of the tensors are filled with 0, and clipped."""
    x, y = twice(0)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_of_a_bulk_copy_is_found(fault):
    with pytest.raises(ptx.KernelFault) as caught:
        twice(fault)
    (finding,) = caught.value.findings
    print(finding)
    kind, message = FAULTS[fault]
    assert finding.kind == kind
    assert message in finding.message
    line = SOURCE.read_text().splitlines()[int(re.findall(r"sm90\.cu:(\d+)", finding.location)[-1]) - 1]
    assert str(fault) in line.partition("// fault")[2].split(), line


def test_a_tile_of_another_size_leaves_the_phase_incomplete():
    with pytest.raises(ptx.KernelFault, match="misses 0 of 1 arrivals and 128 bytes"):
        twice(0, box=(32, 7))


def test_a_bulk_copy_without_a_tensor_map():
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not installed")
    x, y = torch.randn(300), ptx.uninitialised(torch.empty(300))
    text = ptx.compile_cuda(SOURCE, ("FAULT=0",), arch="90a")
    ptx.run(text, "copied", 1, 32, [x, y[:296], 1184])
    assert torch.equal(y[:296], x[:296])
    with pytest.raises(ptx.KernelFault, match=r"alignment: .*1180 bytes.*not multiples of 16"):
        ptx.run(text, "copied", 1, 32, [x, y[:296], 1180])


@pytest.mark.parametrize(
    ("tensor", "box", "swizzle", "message"),
    [
        (torch.zeros(4, 6), (6, 4), 0, "strides of a multiple of 16 bytes, got 24"),
        (torch.zeros(4, 8), (8,), 0, "box: expected 2 sizes from 1 to 256"),
        (torch.zeros(4, 8), (2, 4), 0, "box: expected rows of a multiple of 16 bytes, got 8"),
        (torch.zeros(4, 64), (64, 4), 128, "box: expected rows of at most the 128 bytes of the swizzle, got 256"),
        (torch.zeros(4, 8), (8, 4), 16, "swizzle: expected 0, 32, 64 or 128"),
        (torch.zeros(8, 8)[:, 1:5], (4, 4), 0, "an address that is a multiple of 16"),
        (torch.zeros(()), (), 0, "1 to 5 dimensions"),
    ],
)
def test_a_tensor_map_has_the_drivers_limits(tensor, box, swizzle, message):
    with pytest.raises(ValueError, match=message):
        ptx.tensor_map(tensor, box, swizzle)


# ---- pairs of integers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", ["u16", "s16"])
@pytest.mark.parametrize(("opcode", "function"), [("add", np.add), ("min", np.minimum), ("max", np.maximum)])
def test_pairs_of_integers(opcode, function, type_):
    pairs = np.random.default_rng(0).integers(0, 1 << 32, (2, 300), dtype=np.uint32)
    pairs[:, :4] = [[0xFFFF8000, 0x7FFF0001, 0, 0x80000001], [0x0001FFFF, 0x00017FFF, 0, 0x80007FFF]]
    got = evaluate(f"{opcode}.{type_}x2 y, x0, x1;", "b32", *pairs, arch=90)
    x, y = pairs.view(np.uint16 if type_ == "u16" else np.int16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got.view(x.dtype), function(x, y))
    with pytest.raises(ptx.UnknownInstruction, match="needs sm_90"):
        evaluate(f"{opcode}.{type_}x2 y, x0, x1;", "b32", *pairs)


# ---- layouts and types ---------------------------------------------------------------------------------------------

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def offsets(rows, depth, size, width, across, stride, leading):
    """The byte of every element of a matrix (rows, depth): the canonical layouts of the PTX ISA, by their strides.

    width: 1, or units of 16 bytes in a row of the swizzled pattern. stride, leading: bytes.
    """
    unit = 16 // size
    m, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if across:
        inner = unit * width
        if width == 1:
            byte = m % unit * size + m // unit * stride + k % 8 * 16 + k // 8 * leading
        else:
            byte = m % inner * size + m // inner * leading + k % 8 * inner * size + k // 8 * stride
    elif width == 1:
        byte = k % unit * size + k // unit * leading + m % 8 * 16 + m // 8 * stride
    else:
        byte = k * size + m % 8 * 16 * width + m // 8 * stride
    # Bits 4 and on are exchanged with those of the row: bits 7 and on.
    return byte ^ (byte >> 7 & width - 1) << 4


def descriptor(start, width, stride, leading):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {1: 0, 8: 1, 4: 2, 2: 3}[width] << 62


def product(
    type_, columns, seed, a_layout, b_layout, *, registers=False, half=False, add=True, signs=(1, 1), threads=128
):
    """D and what it is to be, (64, columns) float64. A layout: units in a row of its pattern, across."""
    depth, size = (8, 4) if type_ == "tf32" else (16, 2)
    draw = np.random.default_rng(seed)
    dtype = TYPES[type_]
    exact = type_ == "tf32"
    a, b = (torch.from_numpy(draw.integers(-8, 9, (n, depth)) / 8).to(dtype) for n in (64, columns))
    c = torch.from_numpy(draw.integers(-8, 9, (64, columns)) / 8)
    assert exact or a.element_size() == size
    image = np.zeros(96 * 1024, np.uint8)
    values, found = [], []
    for matrix, (width, across), start in ((a, a_layout, 0), (b, b_layout, 48 * 1024)):
        rows = matrix.shape[0]
        pattern = 128 * width if width > 1 else 128  # bytes of eight rows
        group = pattern * (1 + draw.integers(2)) if width == 1 or not across else pattern
        # Units across lie side by side; a group must not overlap the next.
        many = rows // (16 // size) // width if across else rows // 8
        stride, leading = (group, pattern * 2) if across and width > 1 else (group, group * max(many, 1) + 128 * 8)
        if not across and width > 1:
            leading = 16
        at = start + offsets(rows, depth, size, width, across, int(stride), int(leading))
        assert len(np.unique(at)) == at.size
        assert at.max() < start + 48 * 1024
        raw = matrix.contiguous().view(torch.uint8).numpy().reshape(rows, depth, size)
        image[at[..., None] + np.arange(size)] = raw
        values.append(matrix.double().numpy())
        found.append(descriptor(start, width, int(stride), int(leading)))
    count = columns // (4 if half else 2)
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    r = np.arange(count)[:, None]
    row = 16 * warp + lane // 4 + 8 * ((r if half else r >> 1) & 1)
    column = 8 * (r >> (1 if half else 2)) + 2 * (lane % 4) + (0 if half else r & 1)
    if half:
        pairs = np.stack([c.numpy()[row, column], c.numpy()[row, column + 1]], -1)
        initial = torch.from_numpy(pairs).half().view(torch.int32).squeeze(-1)
    else:
        initial = torch.from_numpy(c.numpy()[row, column]).float().view(torch.int32)
    fragments = np.zeros((4, 128), np.int32)
    if registers:
        per = 4 // size
        fr = np.arange(4)[:, None]
        m, k = 16 * warp + lane // 4 + 8 * (fr & 1), per * (lane % 4) + 4 * per * (fr >> 1)
        words = np.stack([a.numpy(force=True)[m, k + j] if exact else a[m, k + j].view(torch.int16).numpy()
                          for j in range(per)], -1)  # fmt: skip
        fragments = np.ascontiguousarray(words).view(np.int32).reshape(4, 128)
    accumulators = ", ".join(f"%a{k}" for k in range(count))
    shape = f"m64n{columns}k{depth}.{'f16' if half else 'f32'}.{type_}.{type_}"
    across = [int(layout[1]) for layout in (a_layout, b_layout)]
    tail = [] if exact else (across[1:] if registers else across)
    first = "{%f0, %f1, %f2, %f3}" if registers else "%c"
    arguments = ", ".join(map(str, (first, "%b", "%p1", *signs, *tail)))
    text = f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 tile[];
.visible .entry k(.param .u64 image, .param .u64 initial, .param .u64 fragments, .param .u64 out) {{
  .reg .pred %p<4>; .reg .b32 %r<20>; .reg .b64 %d<10>; .reg .b32 %a<130>; .reg .b32 %f<4>; .reg .b64 %b; .reg .b64 %c;
  mov.u32 %r0, %tid.x; mul.lo.u32 %r1, %r0, 16; cvt.u64.u32 %d1, %r1;
  ld.param.u64 %d0, [image]; add.u64 %d0, %d0, %d1;
  mov.u32 %r2, tile; add.u32 %r2, %r2, %r1;
L:
  ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d0]; st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};
  add.u64 %d0, %d0, {16 * threads}; add.u32 %r2, %r2, {16 * threads}; add.u32 %r1, %r1, {16 * threads};
  setp.lt.u32 %p0, %r1, {image.size}; @%p0 bra L;
  ld.param.u64 %d2, [initial]; ld.param.u64 %d3, [fragments]; ld.param.u64 %d4, [out];
  mul.wide.u32 %d1, %r0, 4; add.u64 %d2, %d2, %d1; add.u64 %d3, %d3, %d1; add.u64 %d4, %d4, %d1;
  {" ".join(f"ld.global.b32 %a{k}, [%d2+{512 * k}];" for k in range(count))}
  {" ".join(f"ld.global.b32 %f{k}, [%d3+{512 * k}];" for k in range(4))}
  mov.u64 %b, {found[1]}; mov.u64 %c, {found[0]};
  setp.eq.u32 %p1, {int(add)}, 1;
  fence.proxy.async.shared::cta; bar.sync 0;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.{shape} {{{accumulators}}}, {arguments};
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  {" ".join(f"st.global.b32 [%d4+{512 * k}], %a{k};" for k in range(count))}
  ret;
}}"""
    out = ptx.uninitialised(torch.empty(count, 128, dtype=torch.int32))
    ptx.run(text, "k", 1, threads, [torch.from_numpy(image), initial, fragments, out], shared_bytes=image.size)
    got = np.full((64, columns), np.nan)
    if half:
        got[row, column], got[row, column + 1] = (
            out.unsqueeze(-1).view(torch.float16).double().numpy().transpose(2, 0, 1)
        )
    else:
        got[row, column] = out.view(torch.float32).double().numpy()
    return got, signs[0] * signs[1] * values[0] @ values[1].T + (c.numpy() if add else 0)


# Type, columns, units in a row of A's pattern and whether it lies across, the same of B, what else.
LAYOUTS = {
    "bf16-not-swizzled": ("bf16", 24, (1, False), (1, False), {}),
    "bf16-not-swizzled-across": ("bf16", 24, (1, True), (1, True), {}),
    "bf16-32": ("bf16", 8, (2, False), (2, True), {"add": False}),
    "bf16-64": ("bf16", 64, (4, True), (4, False), {"signs": (-1, 1)}),
    "bf16-128": ("bf16", 256, (8, False), (8, True), {}),
    "f16-of-registers": ("f16", 32, (1, False), (8, False), {"registers": True}),
    "f16-sums-in-f16": ("f16", 16, (8, True), (2, False), {"half": True, "signs": (1, -1)}),
    "tf32-128": ("tf32", 40, (8, False), (4, False), {}),
    "tf32-of-registers": ("tf32", 8, (1, False), (2, False), {"registers": True}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_product(name):
    """Eighths: every sum is exact in every type."""
    type_, columns, a, b, options = LAYOUTS[name]
    got, expected = product(type_, columns, list(LAYOUTS).index(name), a, b, **options)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f1,%f2,%f3,%f4}, %d1, %d2, 1, 1, 1;",
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%f1,%f2,%f3,%f4}, %d1, %d2, %r1, 0, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, %d1, %d2, 1, 1, 1, 0, 0;",
    ],
)
def test_what_is_not_known_is_refused(instruction):
    text = f""".version 8.7
.target sm_90a
.address_size 64
.visible .entry k() {{ .reg .b32 %f<9>; .reg .b32 %r<9>; .reg .b64 %d<9>; {instruction} ret; }}"""
    with pytest.raises(ptx.UnknownInstruction):
        ptx.load(text)
