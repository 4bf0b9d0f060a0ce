"""Thread-block clusters on the interpreter: each other's shared memory, barriers, multicasts, and planted faults."""

import re
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch
from ptx.snippets import assemble

SOURCE = Path(__file__).parent / "ptx" / "sources" / "cluster.cu"
THREADS = 64
# kernel: {fault: (kind, what the finding says)}. Its line has the number in a comment.
FAULTS = {
    "ring": {
        1: ("race", "nothing says that it has started"),
        2: ("race", "nothing keeps that block from exiting before"),
        3: ("uninitialised", "of block 1, which nothing wrote"),
        4: ("race", " wrote it, and nothing orders the two"),
        5: ("divergence", "arrives at barrier.cluster again"),
        6: ("divergence", "waits at barrier.cluster without having arrived"),
        7: ("bounds", "without .shared::cluster"),
        8: ("bounds", ": outside every variable"),
        9: ("race", " wrote it, and nothing orders the two"),  # an arrival that releases nothing
        10: ("race", " wrote it, and nothing orders the two"),  # an atomic of the block's scope
        11: ("bounds", "which has exited"),
        12: ("divergence", "threads wait for others that do not come here"),
    },
    "spread": {
        21: ("divergence", "of block 1 misses 0 of 1 arrivals and 16 bytes"),
        22: ("async", "of shared memory of block 1"),  # an mbarrier in one of the blocks alone
        23: ("race", "nothing says that it has started"),
        24: ("bounds", "a multicast to the blocks of mask"),
        25: ("async", "a bulk copy is still writing"),
        26: ("async", "block 1 exits while this copy is under way"),
    },
    "send": {
        31: ("async", "no fence.proxy.async came in between"),
        32: ("async", "is still reading"),
        33: ("async", "is still reading"),  # the copy's reader has not said that it is there
        34: ("divergence", "misses 0 of 1 arrivals and -4 bytes"),
        35: ("async", "a bulk copy is still writing"),
    },
}

needs_nvcc = pytest.mark.skipif(ptx.nvcc() is None, reason="nvcc is not installed")


def run(kernel, fault, blocks, **options):
    text = ptx.compile_cuda(SOURCE, arch="90a")
    x = torch.arange(2 * blocks * THREADS, dtype=torch.int32) * 7 % 101
    y = ptx.uninitialised(torch.empty_like(x))
    ptx.run(text, kernel, 2 * blocks, THREADS, [x, y, fault], cluster=blocks, **options)
    return x.view(2, blocks, THREADS), y.view(2, blocks, THREADS)


@needs_nvcc
@pytest.mark.parametrize(("blocks", "fault"), [(1, 0), (2, 0), (4, 0), (4, 13)])
def test_blocks_read_and_add_to_each_others_shared_memory(blocks, fault):
    """13: a relaxed arrival, after a fence of the cluster's scope."""
    x, y = run("ring", fault, blocks)
    votes = (x & 1).sum(-1, keepdim=True)  # each block's value is counted at its reader's next
    expected = x.roll(-1, 1) + 2 * x + 1000 * (votes + THREADS)
    assert torch.equal(y, expected.to(y.dtype))


@needs_nvcc
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_multicast_reaches_every_block(blocks):
    x, y = run("spread", 0, blocks)
    assert torch.equal(y, x[:, :1] + torch.arange(blocks, dtype=torch.int32)[:, None])


@needs_nvcc
def test_a_multicast_of_a_tile_reaches_every_block():
    x = torch.arange(3 * THREADS, dtype=torch.int32).view(3, THREADS)
    y = ptx.uninitialised(torch.empty(3, 2, THREADS, dtype=torch.int32))
    text = ptx.compile_cuda(SOURCE, arch="90a")
    ptx.run(text, "spread_tile", 6, THREADS, [ptx.tensor_map(x, (THREADS, 1)), y], cluster=2)
    assert torch.equal(y, x[:, None].expand_as(y))


@needs_nvcc
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_copies_and_stores_to_another_block_complete_at_its_mbarrier(blocks):
    x, y = run("send", 0, blocks)
    assert torch.equal(y, 4 * x.roll(1, 1))


@needs_nvcc
@pytest.mark.parametrize(("kernel", "fault"), [(kernel, fault) for kernel in FAULTS for fault in FAULTS[kernel]])
def test_planted_fault_is_found(kernel, fault):
    with pytest.raises(ptx.KernelFault) as caught:
        run(kernel, fault, 2)
    (finding,) = caught.value.findings
    print(finding)
    kind, message = FAULTS[kernel][fault]
    assert finding.kind == kind
    assert message in finding.message
    line = SOURCE.read_text().splitlines()[int(re.findall(r"cluster\.cu:(\d+)", finding.location)[-1]) - 1]
    assert str(fault) in line.partition("// fault")[2].split(), line


VECTORS = ("ctaid", "clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid")
NAMES = [
    *(f"%{name}.{axis}" for name in VECTORS for axis in "xyz"),
    "%cluster_ctarank",
    "%cluster_nctarank",
]


def test_special_registers():
    """Of a grid of 4 x 6 x 1 blocks in clusters of 2 x 3."""
    code = "mov.u32 %r0, %ctaid.y; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r0, %r0, 4, %r1; "
    code += f"ld.param.u64 %d0, [out]; mad.wide.u32 %d0, %r0, {4 * len(NAMES) + 4}, %d0; "
    code += "".join(f"mov.u32 %r2, {name}; st.global.u32 [%d0+{4 * k}], %r2; " for k, name in enumerate(NAMES))
    code += "mov.pred %p0, %is_explicit_cluster; selp.u32 %r2, 1, 0, %p0; "
    code += f"st.global.u32 [%d0+{4 * len(NAMES)}], %r2;"
    text = assemble(code, ".param .u64 out", arch=90)
    out = np.zeros((6, 4, len(NAMES) + 1), np.uint32)
    ptx.run(text, "k", (4, 6), 1, [out], cluster=(2, 3))
    for y, x in np.ndindex(6, 4):
        inside = [x % 2, y % 3, 0]
        expected = [x, y, 0, x // 2, y // 3, 0, 2, 2, 1, *inside, 2, 3, 1, x % 2 + 2 * (y % 3), 6, 1]
        assert out[y, x].tolist() == expected


def test_addresses_and_ranks():
    """mapa's generic address is read by a plain load; getctarank says whose an address is."""
    code = """
    .shared .b32 here; mov.u32 %r0, %cluster_ctarank; st.shared.u32 [here], %r0;
    barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r1, 1; sub.u32 %r1, %r1, %r0;
    mov.u64 %d1, here; cvta.shared.u64 %d1, %d1; mapa.u64 %d2, %d1, %r1; ld.u32 %r2, [%d2];
    getctarank.u64 %r3, %d2; getctarank.u64 %r4, %d1; mov.u32 %r7, here; getctarank.shared::cluster.u32 %r5, %r7;
    shl.b32 %r3, %r3, 4; shl.b32 %r4, %r4, 8; or.b32 %r2, %r2, %r3; or.b32 %r2, %r2, %r4;
    barrier.cluster.arrive; barrier.cluster.wait;
    ld.param.u64 %d0, [out]; mad.wide.u32 %d0, %r0, 4, %d0; st.global.u32 [%d0], %r2;
    """
    out = np.zeros(2, np.uint32)
    ptx.run(assemble(code, ".param .u64 out", arch=90), "k", 2, 1, [out], cluster=2)
    assert out.tolist() == [0x011, 0x100]
    with pytest.raises(ptx.KernelFault, match="maps to block 1 of a cluster of 1"):
        ptx.run(assemble("mov.u32 %r1, 1; mapa.shared::cluster.u32 %r2, %r1, %r1;", arch=90), "k", 1, 1, [])


def test_vectors_stored_in_another_block_and_an_atomic_there():
    """Two 64-bit words by one st.async; atom.exch returns what the other block had."""
    code = """
    .shared .align 16 .b64 here[2]; .shared .b64 signal; .shared .b32 old;
    mov.u32 %r0, %cluster_ctarank; xor.b32 %r1, %r0, 1; add.u32 %r2, %r0, 7; st.shared.u32 [old], %r2;
    mov.u32 %r3, signal; mbarrier.init.shared::cta.b64 [%r3], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 16;
    barrier.cluster.arrive; barrier.cluster.wait;
    mov.u32 %r4, here; mapa.shared::cluster.u32 %r5, %r4, %r1; mapa.shared::cluster.u32 %r6, %r3, %r1;
    cvt.u64.u32 %d1, %r0; add.u64 %d2, %d1, 0x1234567890;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [%r5], {%d1, %d2}, [%r6];
    mov.u32 %r7, old; mapa.shared::cluster.u32 %r7, %r7, %r1;
    atom.relaxed.cluster.shared::cluster.exch.b32 %r8, [%r7], 0;
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r3], 0; @!%p0 bra WAIT;
    ld.shared.v2.b64 {%d3, %d4}, [here]; cvt.u64.u32 %d5, %r8;
    barrier.cluster.arrive; barrier.cluster.wait;
    ld.param.u64 %d0, [out]; mad.wide.u32 %d0, %r0, 24, %d0;
    st.global.b64 [%d0], %d3; st.global.b64 [%d0+8], %d4; st.global.b64 [%d0+16], %d5;
    """
    out = np.zeros((2, 3), np.uint64)
    ptx.run(assemble(code, ".param .u64 out", arch=90), "k", 2, 1, [out], cluster=2)
    assert out.tolist() == [[1, 0x1234567891, 8], [0, 0x1234567890, 7]]


def test_a_kernel_may_demand_its_cluster():
    text = assemble("ret;", arch=90).replace("k()", "k()\n.explicitcluster\n.reqnctapercluster 2, 1, 1\n")
    ptx.run(text, "k", 4, 32)
    with pytest.raises(ValueError, match=r"cluster: k requires \(2, 1, 1\), got \(4, 1, 1\)"):
        ptx.run(text, "k", 4, 32, cluster=4)
    with pytest.raises(ValueError, match=r"grid: expected a multiple of the cluster \(2, 1, 1\), got \(3, 1, 1\)"):
        ptx.run(text, "k", 3, 32)
    with pytest.raises(ValueError, match="cluster: sm_80 has none"):
        ptx.run(assemble("ret;"), "k", 4, 32, cluster=2)
    with pytest.raises(ValueError, match="at most 8 blocks and 4096 threads, got"):
        ptx.run(assemble("ret;", arch=90), "k", 8, 1024, cluster=8)
