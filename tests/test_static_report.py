"""The compiled kernels, compared with the committed report and with the requirements for each kind of kernel."""

import csv
import re
from pathlib import Path

import pytest
import torch

from fastlm.bench import predicted, static_report
from fastlm.info import version
from fastlm.ops import _registry
from fastlm.testing.ahead_of_time import Compiled, Resources, compile_for, serialised
from fastlm.testing.cases import CASES

DIRECTORY = Path(__file__).parent.parent / "benchmarks" / "results" / "static"
COMMITTED = (DIRECTORY / static_report.FILE).read_text()
ROWS = list(csv.DictReader(COMMITTED.splitlines()[1:]))
CUDA = (DIRECTORY / static_report.CUDA_FILE).read_text()
CUDA_ROWS = list(csv.DictReader(CUDA.splitlines()[1:]))
MULTIPLYING = {row["op"] for row in ROWS if row["matrix"]}


def _committed() -> str:
    """The committed report of the triton that is here: of 3.7, or of 3.6 in the release matrix."""
    try:
        text = (DIRECTORY / static_report.triton_file()).read_text()
    except ValueError as error:
        pytest.skip(str(error))
    pinned = text.splitlines()[0].removeprefix("# triton ")
    if version("triton") != pinned:
        pytest.skip(f"the report is of triton {pinned}, here is {version('triton')}")
    return text


def _assert_as_committed(committed: str, rows: list[dict[str, str]]) -> None:
    changed = static_report.differences(committed, static_report.as_text(rows))
    assert not changed, (
        "python benchmarks/static_report.py --update, and commit it, if this is on purpose:\n" + "\n".join(changed)
    )
    assert not static_report.serialised(rows)


@pytest.mark.long
def test_every_production_configuration_compiles_to_what_is_committed():
    """For sm_80, sm_90, sm_100 and sm_120, in the shared memory of each, with the triton that is installed."""
    _assert_as_committed(_committed(), static_report.report())


@pytest.mark.long
def test_every_prediction_is_what_is_committed():
    if static_report.triton_file() != static_report.FILE:
        pytest.skip(f"predictions are of triton {static_report.TRITON}, here is {version('triton')}")
    rows = static_report.in_processes(predicted.predict, predicted.configurations(), 2)
    text = static_report.as_text(rows, columns=predicted.COLUMNS)
    assert not static_report.differences((DIRECTORY / predicted.FILE).read_text(), text)


@pytest.mark.parametrize("op", ["gelu", "rms_norm", "attention"])
def test_a_few_configurations_compile_to_what_is_committed(op):
    """The first of an op for sm_90; of attention BERT's packed one with dropout."""
    index = 1 if op == "attention" else 0
    variant, committed = str(CASES[op].production[index]), _committed().splitlines()
    rows = static_report.unique(static_report.compile_one((op, index, 90)))
    kept = [line for line in committed[2:] if f"{op},{variant}," in line.replace('"', "") and ",sm_90," in line]
    assert rows
    assert kept
    _assert_as_committed("\n".join([*committed[:2], *kept]), rows)


@pytest.mark.parametrize("minor", [static_report.TRITON, *static_report.OTHER_TRITONS])
def test_there_is_a_report_of_each_triton_and_no_wgmma_is_serialised(minor):
    name = static_report.FILE if minor == static_report.TRITON else f"triton-{minor}.csv"
    header, *lines = (DIRECTORY / name).read_text().splitlines()
    assert header.startswith(f"# triton {minor}.")
    rows = list(csv.DictReader(lines))
    assert {row["op"] for row in rows} == {op for op in CASES if "triton" in _registry.backends(op)}
    assert not static_report.serialised(rows)


def test_ptxas_warnings_of_serialised_wgmma_are_read():
    """A real one: the registers of an unfinished product are read before it is waited for."""
    log = """ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
    ptxas info    : (C7513) Potential Performance Loss
    ptxas info    : (C7600) Something else"""
    assert serialised(log) == ["C7513", "C7515"]
    registers = ", ".join(f"%f{i}" for i in range(4))
    wgmma = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{registers}}}, %rd1, %rd1, 1, 1, 1, 0, 0;"
    ptx = f""".version 8.0
    .target sm_90a
    .address_size 64
    .visible .entry k(.param .u64 out) {{
      .reg .b64 %rd<4>; .reg .f32 %f<8>;
      ld.param.u64 %rd2, [out]; mov.u64 %rd1, 0;
      mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
      wgmma.fence.sync.aligned; {wgmma} READ
      wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
      st.global.f32 [%rd2], %f0; st.global.f32 [%rd2+4], %f1; ret;
    }}"""
    early = f"add.f32 %f1, %f1, %f1; {wgmma}"
    assert Compiled("k", 90, 4, 0, ptx.replace("READ", ""), b"").warnings() == []
    assert Compiled("k", 90, 4, 0, ptx.replace("READ", early), b"").warnings()
    assert static_report.serialised([dict.fromkeys(static_report.COLUMNS, "C7515")])
    assert not static_report.serialised([dict.fromkeys(static_report.COLUMNS, "")])


@pytest.mark.parametrize(("installed", "file"), [("3.7.1", "triton.csv"), ("3.6.0", "triton-3.6.csv"), ("3.5.1", None)])
def test_each_triton_has_its_file(monkeypatch, installed, file):
    monkeypatch.setattr(static_report, "version", lambda name: installed)
    if file:
        assert static_report.triton_file() == file
    else:
        with pytest.raises(ValueError, match=r"triton: expected 3.7 or 3.6, got 3.5.1"):
            static_report.triton_file()


def test_cuda_kernels_with_wgmma_are_those_of_sm90():
    """What ptxas says of them is in tests/test_cuda_sm90.py."""
    wgmma = [row["matrix"] == "wgmma" for row in CUDA_ROWS]
    assert wgmma == [row["kernel"].startswith("sm90::attention") for row in CUDA_ROWS]


def test_attention_alone_multiplies_matrices():
    assert {"attention"} == MULTIPLYING


def test_memory_bound_kernels_do_not_spill():
    """Those of every op whose kernels multiply no matrices."""
    rows = [row for row in ROWS if row["op"] not in MULTIPLYING and row["arch"] in ("sm_80", "sm_90")]
    assert not [row for row in rows if row["spill_bytes"] != "0"]


@pytest.mark.parametrize("arch", static_report.CUDA_ARCHITECTURES)
def test_every_cuda_kernel_compiles_to_what_is_committed(arch):
    """The module as it is built here. Where it was built for less, the architectures that are left out are skipped."""
    if reason := static_report.missing_cuda():
        pytest.skip(reason)
    compiler, pinned = static_report.cuda_compiler(), CUDA.splitlines()[0].removeprefix("# ")
    if compiler != pinned:
        pytest.skip(f"the report is of {pinned}, fastlm._cuda was built by {compiler}")
    if arch not in static_report.cuda_architectures():
        pytest.skip(f"fastlm._cuda is built for {static_report.cuda_architectures()} only (FASTLM_CUDA_ARCHS)")
    committed = static_report.as_text([row for row in CUDA_ROWS if row["arch"] == f"sm_{arch}"], compiler)
    changed = static_report.differences(committed, static_report.as_text(static_report.cuda_report(arch), compiler))
    assert not changed, (
        "python benchmarks/static_report.py --only cuda --update, and commit it, if this is on purpose (after a build "
        "of all that changed):\n" + "\n".join(changed)
    )


def test_cuda_kernels_do_not_spill():
    assert {row["arch"] for row in CUDA_ROWS} == {f"sm_{arch}" for arch in static_report.CUDA_ARCHITECTURES}
    spills = {(row["kernel"], row["arch"]): int(row["spill_bytes"]) for row in CUDA_ROWS if row["spill_bytes"] != "0"}
    # Argued for in LOG.md, "Attention in CUDA C++".
    left = {f"attention_dkdv_kernel<{kind}, true>": 8 for kind in ("bf16, 64", "f16, 64")}
    left |= {f"attention_dkdv_kernel<f32, {width}, true>": 8 for width in (128, 256)}
    assert spills == {(kernel, "sm_100"): most for kernel, most in left.items()}


def test_cuda_kernels_over_rows_load_16_bytes():
    """But for layer_norm's where rows are no multiple of 16 bytes long (VEC 1), and its weights' long sums."""
    rows = [
        row for row in CUDA_ROWS if re.match(r"(layer_norm|cross_entropy)_(fwd|bwd)|mlm_mask_select", row["kernel"])
    ]
    rows = [row for row in rows if not re.search(r", 1(, \d+, \d+)?>$", row["kernel"])]
    assert len(rows) > 3 * 60
    assert not [row for row in rows if "x16B" not in row["loads"]]


def test_report_reads_machine_code():
    sass = """ LDG.E.U16.CONSTANT R2, [R2.64] ; LDGSTS.E.BYPASS.128 [R3], [R4.64] ; @P0 LDG.E R5, [R4] ;
    LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ; LDG.E.64 R8, [R2] ; HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ; """
    assert static_report.load_widths(sass) == {2: 1, 4: 1, 8: 1, 16: 2}
    assert static_report.matrix_unit(sass) == "wgmma"
    name = "_ZN6fastlm4cuda21layer_norm_fwd_kernelI13__nv_bfloat16Li8ELi1ELi32EEEvNS0_16LayerNormForwardE"
    assert static_report.demangled(name) == "layer_norm_fwd_kernel<bf16, 8, 1, 32>"
    assert static_report.demangled("memset") == "memset"
    ptx = f".visible .entry {name}(\n\t.param .align 8 .b8 {name}_param_0[136]\n)\n.maxntid 32, 4, 1\n.minnctapersm 8"
    assert static_report.block_sizes(ptx) == {name: 128}


@pytest.mark.parametrize("d", [64, 128])
def test_attention_multiplies_with_the_instructions_of_each_architecture(d):
    """Forward and backward, in bfloat16: wgmma on Hopper, whose tiles have the 64 rows that it takes."""
    rows = [row for row in ROWS if row["op"] == "attention" and f"-d{d}-" in row["variant"]]
    for arch, matrix in (("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("sm_120", "mma")):
        for kernel in ("_fwd", "_dkdv", "_dq"):
            used = {row["matrix"] for row in rows if (row["arch"], row["kernel"]) == (arch, kernel)}
            assert used == {matrix}, f"{kernel}, {arch}"


def test_committed_files_are_written_by_a_flag_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(static_report, "report", lambda workers: [])
    monkeypatch.setattr(static_report, "triton_file", lambda: static_report.FILE)
    committed, new = "# triton 3\nop,arch\ngelu,sm_80\n", static_report.as_text([])
    kept, other = tmp_path / "static" / static_report.FILE, tmp_path / "other"
    kept.parent.mkdir()
    kept.write_text(committed)
    assert static_report.main(kept.parent, ["--only", "triton"]) == 1
    assert "- gelu,sm_80" in capsys.readouterr().out
    assert static_report.main(kept.parent, ["--only", "triton", "--out", str(other)]) == 0
    assert (kept.read_text(), (other / static_report.FILE).read_text()) == (committed, new)
    assert static_report.main(kept.parent, ["--only", "triton", "--update"]) == 0
    assert kept.read_text() == new
    assert static_report.main(kept.parent, ["--only", "triton"]) == 0
    assert "as committed" in capsys.readouterr().out
    fault = dict.fromkeys(static_report.COLUMNS, "x") | {"warnings": "C7513"}
    monkeypatch.setattr(static_report, "report", lambda workers: [fault])
    assert static_report.main(kept.parent, ["--only", "triton", "--update"]) == 1
    assert static_report.main(kept.parent, ["--only", "triton"]) == 1  # as committed, and yet a fault
    assert "C7513, its wgmma are serialised" in capsys.readouterr().out


def test_differences_allow_for_ptxas_and_nothing_else():
    header = "# nvcc 13\nkernel,arch,registers,spill_bytes,occupancy\n"
    row = header + '"k<1, 2>",sm_80,{},{},{}\n'
    same = row.format(146, 0, 0.19)
    assert static_report.differences(same, row.format(154, 0, 0.25)) == []
    for other in (
        row.format(155, 0, 0.19),
        row.format(146, 8, 0.19),
        row.format(154, 8, 0.25),
        header,
        same + "k,sm_90,1,0,1\n",
    ):
        assert static_report.differences(same, other)


def test_report_reads_ptx():
    ptx = """ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1]; @%p1 ld.global.L1::evict_last.b16 %rs1, [%rd2];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2; wgmma.mma_async.sync.aligned.m64n64k16 x;"""
    kernel = Compiled("k", 90, 8, 65536, ptx, b"")
    assert kernel.load_bytes() == {2: 1, 16: 2}
    assert kernel.matrix_instruction() == "wgmma"
    assert kernel.occupancy(Resources(128, 0, 65536)) == 16 / 64  # two blocks by registers, three by shared memory


def test_more_shared_memory_than_the_architecture_has_is_an_error():
    from ptx.sources.triton_kernels import matmul
    from triton.runtime.errors import OutOfResources

    a = torch.zeros(128, 128, dtype=torch.bfloat16)
    arguments = (a, a, a, 128, 128, 128, 128, 128, 128, 128, 128, 128, "ieee")
    with compile_for(90):
        matmul[(1,)](*arguments, num_stages=3)
    with compile_for(120), pytest.raises(OutOfResources, match="shared memory"):
        matmul[(1,)](*arguments, num_stages=3)
    with pytest.raises(ValueError, match="arch: expected one of"), compile_for(70):
        pass
