"""Undefined values, refused instructions, handling of tensors at a launch, and launches from host code."""

import ctypes
import hashlib
import re
import subprocess
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch
from ptx.native import cache_directory, once
from ptx.snippets import assemble, warp

SOURCES = Path(__file__).parent / "ptx" / "sources"

VALUES = np.arange(1, 33, dtype=np.uint32)
ALL = 0xFFFFFFFF

HARMLESS = [
    "mov.b32 %r2, {%h1, %h2}; mov.b32 {%h3, %h4}, %r2; mov.b32 y, {%h4, %h4};",  # %h1 is unset, %h4 is not
    "prmt.b32 y, %r9, x0, 0x7654;",
    "and.b32 %r2, %r9, 0; or.b32 y, %r2, x0;",
    "setp.eq.u32 %p1, 0, 0; selp.b32 y, x0, %r9, %p1;",
    "lop3.b32 y, %r9, x0, x0, 0xC0; lop3.b32 y, %r9, x0, x0, 0xCC;",
    "shl.b32 %r2, %r9, 16; shl.b32 %r2, %r2, 16; or.b32 y, %r2, x0;",
    "cvt.rn.bf16x2.f32 %r2, x0, %r9; shr.u32 y, %r2, 16;",
    "cvt.u32.u16 %r2, %h1; shr.u32 y, %r2, 16;",
    "cvt.u32.u8 %r2, %r9; shr.u32 y, %r2, 8;",
    ".local .b8 here[4]; st.local.b8 [here], %h1; ld.local.u8 %r2, [here]; shr.u32 y, %r2, 8;",
]
HARMFUL = [
    "add.u32 y, %r9, x0;",
    "prmt.b32 y, %r9, x0, 0x7653;",
    "selp.b32 y, x0, x0, %p9;",
    "setp.lt.u32 %p1, %r9, x0; @%p1 mov.b32 y, 0; mov.b32 y, 1;",
    "cvt.rn.bf16x2.f32 %r2, x0, %r9; shl.b32 y, %r2, 16;",
    "mov.b32 y, 1; ld.global.b32 %r3, [%d9];",
    "cvt.s32.s16 %r2, %h1; shr.u32 y, %r2, 16;",
    "mov.b32 %r2, {%h2, %h1}; cvt.sat.u16.u32 %r3, %r2; cvt.u32.u16 y, %r3;",
    ".local .b8 here[4]; st.local.b8 [here], %h1; ld.local.s8 %r2, [here]; shr.u32 y, %r2, 8;",
]


@pytest.mark.parametrize("code", HARMLESS)
def test_undefined_bytes_that_do_not_matter(code):
    warp("mov.b16 %h2, 5; " + code, VALUES)


@pytest.mark.parametrize("code", HARMFUL)
def test_unset_register(code):
    with pytest.raises(ptx.KernelFault) as caught:
        warp(code, VALUES)
    assert caught.value.findings[0].kind == "unset register"


# ---- what the interpreter refuses ----------------------------------------------------------------------------------


def test_unknown_instruction_is_an_error_that_names_it():
    with pytest.raises(ptx.UnknownInstruction, match=r"`wgmma.fence.sync.aligned`.*line 7.*needs sm_90"):
        ptx.load(assemble("wgmma.fence.sync.aligned;"), "k")
    with pytest.raises(ptx.UnknownInstruction, match=r"add.rn.satfinite.f32.*satfinite"):
        ptx.load(assemble("add.rn.satfinite.f32 %r1, %r2, %r3;"), "k")
    with pytest.raises(ptx.UnknownInstruction, match=r"fence.proxy.alias"):
        ptx.load(assemble("fence.proxy.alias;"), "k")
    with pytest.raises(ptx.PtxError, match="no kernel 'other'"):
        ptx.load(assemble(""), "other")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("mov.u32 %r1, %d1;", "%d1 is a register of 64 bits, as an operand of type .u32"),
        ("add.s64 %d1, %d2, %r1;", "%r1 is a register of 32 bits, as an operand of type .s64"),
        ("setp.lt.u16 %p1, %r1, 3;", "%r1 is a register of 32 bits, as an operand of type .u16"),
        ("selp.b64 %d1, %d2, %r1, %p1;", "%r1 is a register of 32 bits"),
        ("shl.b64 %d1, %d2, %d3;", "%d3 is a register of 64 bits, as an operand of type .u32"),
        ("and.b32 %r1, %p1, 1;", "%p1 is a predicate, as an operand of type .b32"),
        ("mul.wide.u32 %r1, %r2, %r3;", "%r1 is a register of 32 bits, as an operand of type .u64"),
        ("st.global.b64 [%d1], %r1;", "%r1 is a register of 32 bits, as an operand of type .b64"),
        ("ld.global.b32 %h1, [%d1];", "%h1 is a register of 16 bits, as an operand of type .b32"),
        ("cvt.u64.u32 %r1, %r2;", "%r1 is a register of 32 bits, as an operand of type .u64"),
        ("@%r1 bra end; end:", "%r1 is a register of 32 bits, as an operand of type .pred"),
    ],
)
def test_register_of_another_width_is_an_error(code, found):
    with pytest.raises(ptx.UnknownInstruction, match=re.escape(found)):
        ptx.load(assemble(code), "k")


@pytest.mark.parametrize(
    ("type_", "register"),
    [
        (f"{sign}{bits}", name)
        for sign in "su"
        for bits in (8, 16, 32)
        for name in ("%h", "%r", "%d")
        if bits < 32 or name != "%h"
    ],
)
def test_loads_stores_and_conversions_take_wider_registers(type_, register):
    size = int(type_[1:]) // 8
    # Through memory into a wider register, back from its low bytes, and a conversion of them.
    code = (
        ".local .b32 here; .local .b32 there; st.local.b32 [here], x0; st.local.b32 [there], 0; "
        f"ld.local.{type_} {register}5, [here]; st.local.{type_} [there], {register}5; ld.local.u32 %r2, [there]; "
        f"cvt.s32.{type_} %r3, {register}5; xor.b32 y, %r2, %r3;"
    )
    x = np.random.default_rng(5).integers(0, 2**32, 32, dtype=np.uint32)
    low = x.view(f"{'i' if type_[0] == 's' else 'u'}{size}")[:: 4 // size]
    want = low.view(f"u{size}").astype(np.uint32) ^ low.astype(np.int64).astype(np.uint32)
    np.testing.assert_array_equal(warp(code, x), want)


def test_wrong_arguments_are_errors():
    text = assemble("", ".param .u64 p0, .param .u32 n")
    with pytest.raises(ValueError, match="takes 2 arguments"):
        ptx.run(text, "k", 1, 32, [None])
    with pytest.raises(ValueError, match=r"argument 1: .u32 n has 4 bytes"):
        ptx.run(text, "k", 1, 32, [None, np.float64(1)])
    with pytest.raises(ValueError, match="at most 1024 threads"):
        ptx.run(text, "k", 1, (1024, 2), [None, 1])
    with pytest.raises(ValueError, match="grid: expected"):
        ptx.run(text, "k", (1, 65536), 32, [None, 1])
    with pytest.raises(ValueError, match=r"argument 1: .u32 n is no floating-point type"):
        ptx.run(text, "k", 1, 32, [None, 1.0])
    with pytest.raises(ValueError, match="shared_bytes"):
        ptx.run(text, "k", 1, 32, [None, 1], shared_bytes=200 * 1024)


def test_numbers_take_the_type_of_the_parameter():
    body = """ld.param.u64 %d0, [p0]; mov.u32 %r0, %tid.x; setp.ne.u32 %p1, %r0, 0; @%p1 ret;
    ld.param.f32 %r1, [a]; ld.param.f32 %r2, [b]; ld.param.s16 %r3, [c]; st.global.v2.b32 [%d0], {%r1, %r2};
    st.global.b32 [%d0+8], %r3;"""
    out = np.zeros(3, np.float32)
    text = assemble(body, ".param .u64 p0, .param .f32 a, .param .f32 b, .param .s16 c")
    ptx.run(text, "k", 1, 32, [out, 3, 1e40, -2])
    assert out[:2].tolist() == [3, np.inf]
    assert out.view(np.int32)[2] == -2


COPY = """mov.u32 %r0, %tid.x; ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; ld.param.u32 %r1, [n];
mul.lo.u32 %r2, %r0, %r1; mad.wide.u32 %d2, %r2, 4, %d0; ld.global.b32 %r3, [%d2];
mad.wide.u32 %d2, %r0, 4, %d1; st.global.b32 [%d2], %r3;"""
COPY_PARAMETERS = ".param .u64 p0, .param .u64 p1, .param .u32 n"


def test_elements_between_those_of_a_strided_view_are_out_of_bounds():
    x, out = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    text = assemble(COPY, COPY_PARAMETERS)
    ptx.run(text, "k", 1, 32, [x[::4], out, 4])
    np.testing.assert_array_equal(out, x[::4])
    with pytest.raises(ptx.KernelFault, match="not part of the tensor"):
        ptx.run(text, "k", 1, 32, [x[::4], out, 3])


def test_memory_that_one_launch_wrote_is_initialised_for_the_next():
    x, middle = np.arange(32, dtype=np.uint32), ptx.uninitialised(np.empty(64, np.uint32))
    text, out = assemble(COPY, COPY_PARAMETERS), np.zeros(32, np.uint32)
    ptx.run(text, "k", 1, 32, [x, middle, 1])
    ptx.run(text, "k", 1, 32, [middle, out, 1])
    with pytest.raises(ptx.KernelFault, match="uninitialised"):
        ptx.run(text, "k", 1, 32, [middle, out, 2])
    middle[:] = 5  # by the host
    ptx.run(text, "k", 1, 32, [middle, out, 2])
    assert (out == 5).all()


def test_all_findings_are_collected_on_request():
    text = assemble(COPY, COPY_PARAMETERS)
    x, out = np.zeros(16, np.uint32), np.zeros(8, np.uint32)
    report = ptx.run(text, "k", 2, 32, [x, out, 1], check=False, max_findings=10)
    assert (report.findings[0].kind, report.findings[0].count) == ("bounds", 32)
    assert {f.instruction.split(".")[0] for f in report.findings} >= {"ld", "st"}


def test_modules_in_a_row_keep_their_files():
    """As tests/test_cuda.py joins those of all sources: each numbers its files from 1."""
    module = """.version 8.0
.target sm_80
.address_size 64
.visible .entry {name}(.param .u64 p0)
{{
.reg .b64 %d<2>;
.reg .b32 %r<2>;
ld.param.u64 %d1, [p0];
mov.b32 %r1, 1;
.loc 1 7 0
st.global.b32 [%d1+400], %r1;
ret;
}}
.file 1 "{name}.cu"
"""
    text = "".join(module.format(name=name) for name in ("first", "second"))
    for name in ("first", "second"):
        with pytest.raises(ptx.KernelFault, match=rf"at {name}\.cu:7"):
            ptx.run(text, name, 1, 1, [np.zeros(1, np.uint32)])


def test_bank_conflicts_are_counted():
    body = """.shared .align 4 .b32 s[1024]; mov.u32 %r0, %tid.x; ld.param.u32 %r1, [n]; mul.lo.u32 %r2, %r0, %r1;
    mov.u32 %r3, s; mad.lo.u32 %r2, %r2, 4, %r3; st.shared.b32 [%r2], %r0;"""
    text = assemble(body, ".param .u32 n")
    for stride, extra in ((1, 0), (2, 1), (32, 31), (31, 0)):
        report = ptx.run(text, "k", 1, 32, [stride], bank_conflicts=True)
        assert sum(report.bank_conflicts.values()) == extra


# ---- blocks side by side -------------------------------------------------------------------------------------------

# Every block stores its number in out[block >> n], and counts itself in.
MEET = """mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; ld.param.u64 %d0, [p0]; ld.param.u32 %r2, [n];
shr.u32 %r3, %r1, %r2; mad.wide.u32 %d1, %r3, 4, %d0; ld.param.u32 %r4, [same]; and.b32 %r5, %r1, %r4;
setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%d1], %r5;"""


def meet(shift, mask, workers, **options):
    out = ptx.uninitialised(np.empty(64 >> shift, np.uint32))
    text = assemble(MEET, ".param .u64 p0, .param .u32 n, .param .u32 same")
    return out, ptx.run(text, "k", 64, 32, [out, shift, mask], workers=workers, check=False, **options)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_nothing_depends_on_the_workers(workers):
    """Neither results nor counts nor findings, of blocks that keep apart, store one value, or race."""
    for shift, mask, found in ((0, ALL, 0), (3, 0, 0), (3, 0x38, 0), (3, ALL, 1)):
        for most in (1, 5):
            expected, report = meet(shift, mask, 1, max_findings=most)
            assert len(report.findings) == found
            for _ in range(10):
                out, other = meet(shift, mask, workers, max_findings=most)
                np.testing.assert_array_equal(out, expected)
                assert other == report


def test_what_was_there_comes_back_before_a_launch_is_done_over():
    """Every block adds 1, without an atomic: in order, that is still 64 in all."""
    body = """ld.param.u64 %d0, [p0]; mov.u32 %r0, %tid.x; setp.ne.u32 %p1, %r0, 0; @%p1 ret;
    ld.global.u32 %r1, [%d0]; add.u32 %r1, %r1, 1; st.global.u32 [%d0], %r1;"""
    for workers in (1, 2, 5):
        x = np.full(1, 100, np.uint32)
        report = ptx.run(
            assemble(body, ".param .u64 p0"), "k", 64, 32, [x], workers=workers, check=False, max_findings=9
        )
        assert (x[0], [f.kind for f in report.findings]) == (164, ["race", "race"])


# ---- host code in C++ ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host():
    """sources/recorded.cu as a library, and its PTX."""
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not installed")
    source = SOURCES / "recorded.cu"
    key = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    library = cache_directory() / f"recorded-{key}.so"
    with once(library) as missing:
        if missing:
            options = ["-shared", "-arch=sm_80", "-std=c++17", "-Xcompiler=-fPIC", "-cudart=static"]
            options += ["-static-global-template-stub=false", "-device-entity-has-hidden-visibility=false"]
            subprocess.run([ptx.nvcc(), *options, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)), ptx.compile_cuda(source)


@pytest.mark.parametrize("cols", [40, 33])
def test_cuda_host_code_launches_on_the_interpreter(host, cols):
    """The host chooses the instantiation and packs a struct; the kernel is executed in place of the launch."""
    library, text = host
    signature = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
    )
    kept = []

    def record(execute):
        def call(entry, shape, shared, params, size):
            execute(entry.decode(), shape[0:3], shape[3:6], shared, ctypes.string_at(params, size))

        kept.append(signature(call) if execute else signature())
        library.record(kept[-1])

    x, factor = torch.randn(3, 48)[:, :cols], torch.randn(3)
    with ptx.cuda_on_ptx(record, text) as launches:
        y = torch.empty(3, 48)[:, :cols]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y, factor)]
        library.scale(*pointers, 3, cols, ctypes.c_long(48))
    assert torch.equal(y, x * factor[:, None])
    assert ("ILi4E" in launches.kernels()[0]) == (cols % 4 == 0)
