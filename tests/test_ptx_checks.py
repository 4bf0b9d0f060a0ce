"""Each check of the interpreter finds a planted fault, in CUDA and in Triton, and nothing in the correct twin."""

import re
from pathlib import Path

import ptx
import pytest
import torch

SOURCES = Path(__file__).parent / "ptx" / "sources"
pytest.importorskip("triton")
from ptx.sources import triton_faults as tf  # noqa: E402
from ptx.sources import triton_features as tg  # noqa: E402


def ints(n, value=None):
    return torch.arange(n, dtype=torch.int32) if value is None else torch.full((n,), value, dtype=torch.int32)


def planted_line(file: Path, kernel: str) -> int:
    """The line marked as the fault of a kernel."""
    lines = file.read_text().splitlines()
    start = next(k for k, line in enumerate(lines) if f"{kernel}(" in line and ("__global__" in line or "def " in line))
    return (
        next(k for k in range(start, len(lines)) if lines[k].partition("fault")[0].rstrip().endswith(("//", "#"))) + 1
    )


def expect(kind, file, kernel, launch):
    """The launch is at fault as `kind`, and the finding names the planted line."""
    with pytest.raises(ptx.KernelFault) as caught:
        launch()
    (finding,) = caught.value.findings
    print(finding)
    assert finding.kind == kind
    assert finding.location
    assert re.search(rf"{re.escape(str(file))}:{planted_line(file, kernel)}\b", str(finding)), finding
    return finding


# ---- CUDA ----------------------------------------------------------------------------------------------------------

CUDA_FILE = SOURCES / "faults.cu"
# kernel: (kind, grid, block, arguments of the faulty launch, of the correct one), shared bytes where the launch decides
CUDA = {
    "race_between_warps": ("race", 1, 128, lambda ok: [ints(128), ints(128)]),
    "race_within_a_warp": ("race", 1, 32, lambda ok: [ints(32), ints(32)]),
    "race_of_a_write_after_reads": ("race", 1, 64, lambda ok: [ints(128), ints(128)]),
    "race_between_blocks": ("race", 4, 32, lambda ok: [ints(1)]),
    "race_between_blocks_that_write": ("race", 4, 32, lambda ok: [ints(125, -1)]),
    "race_between_a_block_that_reads_and_one_that_writes": ("race", 4, 32, lambda ok: [ints(128), ints(128)]),
    "race_without_a_fence": ("race", 4, 32, lambda ok: [ints(4), ints(1, 0), ints(1)]),
    "race_past_a_fence_of_the_block": ("race", 4, 32, lambda ok: [ints(4), ints(1, 0), ints(1)]),
    "race_of_atomics_of_the_block": ("race", 4, 32, lambda ok: [ints(1, 0)]),
    "race_of_an_async_copy": ("race", 1, 64, lambda ok: [ints(128), ints(128)]),
    "race_past_a_named_barrier": ("race", 1, 128, lambda ok: [ints(128)]),
    "async_copy_read_too_early": ("async", 1, 32, lambda ok: [ints(256), ints(256)]),
    "bounds_of_global_memory": ("bounds", 2, 64, lambda ok: [torch.ones(100), torch.ones(100), 100]),
    "bounds_of_a_shared_array": ("bounds", 1, 32, lambda ok: [ints(32), ints(32)]),
    "bounds_of_dynamic_shared_memory": ("bounds", 1, 64, lambda ok: [ints(64)]),
    "bounds_of_a_local_array": ("bounds", 1, 32, lambda ok: [ints(32), 8 if ok else 9]),
    "bounds_of_an_async_copy": ("bounds", 1, 32, lambda ok: [ints(4 * 30), ints(128), 30]),
    "alignment": ("alignment", 1, 32, lambda ok: [torch.ones(160), torch.ones(32), 4 if ok else 2]),
    "alignment_of_shared_memory": ("alignment", 1, 34, lambda ok: [torch.ones(34), 4 if ok else 2]),
    "alignment_of_an_atomic": ("alignment", 1, 32, lambda ok: [torch.zeros(32, dtype=torch.int8), 4 if ok else 6]),
    "uninitialised_shared_memory": ("uninitialised", 1, 64, lambda ok: [ints(64), 64 if ok else 60]),
    "uninitialised_global_memory": (
        "uninitialised",
        1,
        32,
        lambda ok: [ints(32) if ok else ptx.uninitialised(torch.empty(32)), ints(32)],
    ),
    "uninitialised_local_memory": ("uninitialised", 1, 32, lambda ok: [ints(32, 7), 32 if ok else 20]),
    "divergence_within_a_warp": ("divergence", 1, 32, lambda ok: [ints(32)]),
    "divergence_of_warps": ("divergence", 1, 64, lambda ok: [ints(64)]),
    "divergence_by_an_early_exit": ("divergence", 1, 64, lambda ok: [ints(64), 64 if ok else 50]),
    "divergence_of_a_shuffle": ("divergence", 1, 32, lambda ok: [ints(32)]),
    "unset_register": ("unset register", 1, 32, lambda ok: [ints(32)]),
    "unset_register_of_a_shuffle": ("unset register", 1, 32, lambda ok: [ints(32)]),
    "assertion": ("assert", 1, 32, lambda ok: [ints(32), 32 if ok else 31]),
    "trapped": ("trap", 1, 32, lambda ok: [ints(32), 32 if ok else 31]),
    "endless": ("timeout", 1, 32, lambda ok: [ints(1, 0)]),
}


def launch_cuda(kernel, ok, **options):
    if ptx.nvcc() is None:
        pytest.skip("nvcc is not installed")
    text = ptx.compile_cuda(CUDA_FILE, (f"CORRECT={int(ok)}",))
    _, grid, block, arguments = CUDA[kernel]
    shared = (256 if ok else 128) if "dynamic" in kernel else 0
    return ptx.run(text, kernel, grid, block, arguments(ok), shared_bytes=shared, max_instructions=100_000, **options)


@pytest.mark.parametrize("kernel", CUDA)
def test_cuda_fault_is_found(kernel):
    expect(CUDA[kernel][0], CUDA_FILE, kernel, lambda: launch_cuda(kernel, False))


@pytest.mark.parametrize("kernel", CUDA)
def test_cuda_correct_twin_is_clean(kernel):
    launch_cuda(kernel, True)


@pytest.mark.parametrize("kernel", [kernel for kernel in CUDA if CUDA[kernel][1] > 1])
def test_finding_does_not_depend_on_the_workers(kernel):
    """Blocks that meet in memory without atomics are found whatever their timing, and reported as in order."""
    seen = set()
    for workers in (1, 2, 4, 4, 4, 4):
        with pytest.raises(ptx.KernelFault) as caught:
            launch_cuda(kernel, False, workers=workers)
        seen.add(str(caught.value.findings))
    assert len(seen) == 1


# ---- Triton --------------------------------------------------------------------------------------------------------

TRITON_FILE = SOURCES / "triton_faults.py"
TRITON = {
    "race_between_blocks": ("race", 4, lambda ok: ([ints(1)], {"CORRECT": ok})),
    "race_between_warps": ("race", 1, lambda ok: ([ints(256), ints(256)], {"CORRECT": ok})),
    "race_within_a_warp": ("race", 1, lambda ok: ([ints(32)], {"CORRECT": ok, "num_warps": 1})),
    "bounds": ("bounds", 2, lambda ok: ([ints(100), ints(100), 100], {"BLOCK": 64, "CORRECT": ok})),
    "uninitialised": (
        "uninitialised",
        1,
        lambda ok: ([ints(128) if ok else torch.empty(128, dtype=torch.int32), ints(128)], {}),
    ),
    "divergence": ("divergence", 1, lambda ok: ([ints(32)], {"CORRECT": ok, "num_warps": 1})),
    "unset_register": ("unset register", 1, lambda ok: ([ints(32)], {"CORRECT": ok, "num_warps": 1})),
    "assertion": ("assert", 1, lambda ok: ([ints(32), 32 if ok else 31], {"num_warps": 1, "debug": True})),
}


def launch_triton(kernel, ok):
    with ptx.triton_on_ptx():
        _, grid, arguments = TRITON[kernel]
        args, options = arguments(ok)
        getattr(tf, kernel)[(grid,)](*args, **options)


@pytest.mark.parametrize("kernel", TRITON)
def test_triton_fault_is_found(kernel):
    expect(TRITON[kernel][0], TRITON_FILE, kernel, lambda: launch_triton(kernel, False))


@pytest.mark.parametrize("kernel", TRITON)
def test_triton_correct_twin_is_clean(kernel):
    launch_triton(kernel, True)


# Faults that Triton's language cannot express, planted in what it compiles:
# (kind, pattern, which, what takes its place, the source of the line that the finding names).
A_LOADED = "a = tl.load(a_tile, "
HALF_A_WARP = "{ .reg .b32 t; .reg .pred q; mov.u32 t, %tid.x; setp.lt.u32 q, t, 16; @q bar.sync 0; @!q bar.sync 0; }"
EDITS = {
    "race_after_a_dropped_barrier": ("race", r"bar\.sync\s+0;", 2, ";", A_LOADED),
    "async_copy_read_before_the_barrier": ("async", r"bar\.sync\s+0;", 1, ";", A_LOADED),
    "async_copy_read_without_its_wait": ("async", r"cp\.async\.wait_group[^;]*;", 0, ";", A_LOADED),
    "uninitialised_shared_memory": ("uninitialised", r"cp\.async\.cg[^;]*;", 0, ";", A_LOADED),
    "alignment_of_shared_memory": ("alignment", r"(ldmatrix[^;]*)\];", 0, r"\1+2];", A_LOADED),
    "bounds_of_shared_memory": ("bounds", r"(ldmatrix[^;]*)\];", 0, r"\1+163840];", A_LOADED),
    "divergence_of_a_barrier": ("divergence", r"bar\.sync\s+0;", 4, HALF_A_WARP, "tl.store(c_tile, "),
}


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.parametrize("name", EDITS)
def test_triton_fault_in_compiled_code_is_found(name):
    kind, pattern, which, instead, source = EDITS[name]
    kernel = tg.pipelined_matmul
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "M": "i32", "N": "i32:16", "K": "i32:16"}
    sizes = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "STAGES": 3}
    compiled = ptx.compile_triton(kernel, types, sizes)
    found = list(re.finditer(pattern, compiled.ptx))[which]
    a, b = torch.randn(32, 128).bfloat16(), torch.randn(128, 32).bfloat16()

    def launch(text):
        c = ptx.uninitialised(torch.empty(32, 32))
        arguments = [a, b, c, 32, 32, 128, None, None]
        ptx.run(text, compiled.entry, 1, compiled.block, arguments, shared_bytes=compiled.shared_bytes)
        return c

    torch.testing.assert_close(launch(compiled.ptx), a.float() @ b.float())
    with pytest.raises(ptx.KernelFault) as caught:
        launch(compiled.ptx[: found.start()] + found.expand(instead) + compiled.ptx[found.end() :])
    (finding,) = caught.value.findings
    assert finding.kind == kind
    file, _, line = finding.location.rpartition(":")
    assert source in Path(file).read_text().splitlines()[int(line) - 1]


def test_triton_alignment_fault_is_found():
    """A pointer that is not aligned as the signature of its compilation says."""
    kernel = ptx.compile_triton(tf.alignment, {"x_ptr": "*i32", "y_ptr": "*i32"}, {}, num_warps=1)
    x = ints(132)

    def launch(offset):
        ptx.run(kernel.ptx, kernel.entry, 1, kernel.block, [x[offset:], ints(128), None, None])

    launch(4)
    expect("alignment", TRITON_FILE, "alignment", lambda: launch(2))
