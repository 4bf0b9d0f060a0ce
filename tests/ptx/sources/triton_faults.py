"""Triton kernels with one planted fault each, on the line marked `# fault`. CORRECT turns it off."""

import triton
import triton.language as tl


@triton.jit
def race_between_blocks(y_ptr, CORRECT: tl.constexpr):
    if CORRECT:
        tl.atomic_add(y_ptr, tl.program_id(0))
    else:
        tl.store(y_ptr, tl.program_id(0))  # fault


@triton.jit
def race_between_warps(x_ptr, y_ptr, CORRECT: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(x_ptr + i, i)
    if CORRECT:
        tl.debug_barrier()
    tl.store(y_ptr + i, tl.load(x_ptr + 255 - i))  # fault


@triton.jit
def race_within_a_warp(y_ptr, CORRECT: tl.constexpr):
    i = tl.arange(0, 32)
    if CORRECT:
        tl.store(y_ptr + i, i)
    else:
        tl.store(y_ptr + i // 2, i)  # fault


@triton.jit
def bounds(x_ptr, y_ptr, n, BLOCK: tl.constexpr, CORRECT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if CORRECT:
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)
    else:
        tl.store(y_ptr + i, tl.load(x_ptr + i), mask=i < n)  # fault


@triton.jit
def alignment(x_ptr, y_ptr):
    i = tl.arange(0, 128)
    tl.store(y_ptr + i, tl.load(x_ptr + i))  # fault, if x_ptr is not aligned as its signature says


@triton.jit
def uninitialised(x_ptr, y_ptr):
    i = tl.arange(0, 128)
    tl.store(y_ptr + i, tl.load(x_ptr + i))  # fault


@triton.jit
def divergence(y_ptr, CORRECT: tl.constexpr):
    i = tl.arange(0, 32)
    if CORRECT:
        tl.debug_barrier()
    else:
        i = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $1, 16; @p bar.sync 0; @!p bar.sync 0; mov.b32 $0, $1; }",
            "=r,r",
            [i],  # fault
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.store(y_ptr + i, i)


@triton.jit
def unset_register(y_ptr, CORRECT: tl.constexpr):
    i = tl.arange(0, 32)
    if not CORRECT:
        i = tl.inline_asm_elementwise(
            "{ .reg .b32 unset; add.s32 $0, $1, unset; }", "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.store(y_ptr + i, 1)  # fault


@triton.jit
def assertion(x_ptr, n):
    i = tl.arange(0, 32)
    tl.device_assert(tl.load(x_ptr + i) < n, "too large")  # fault
