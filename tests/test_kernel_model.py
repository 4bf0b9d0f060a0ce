"""What limits a kernel (fastlm/bench/sass.py, kernel_model.py), on machine code whose answers are counted by hand."""

import csv
from pathlib import Path

import pytest

from fastlm import chip
from fastlm.bench import kernel_model as model
from fastlm.bench import predicted, sass
from fastlm.info import version

# A stream over rows: two loads ahead of the loop; in it their use, two 16-byte loads for the next pass, and a store.
STREAM = """
        /*0000*/                   S2R R0, SR_TID.X ;                    /* 0x0 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x0 */
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ; /* 0x0 */
        /*0030*/                   FADD R20, R4, R5 ;                    /* 0x0 */
        /*0040*/                   FFMA R21, R8, R9, R20 ;               /* 0x0 */
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64+0x20] ; /* 0x0 */
        /*0060*/              @!PT LDS RZ, [RZ] ;                        /* 0x0 */
        /*0070*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x30] ; /* 0x0 */
        /*0080*/                   MUFU.EX2 R22, R21 ;                   /* 0x0 */
        /*0090*/                   IADD3 R2, R2, 0x20, RZ ;              /* 0x0 */
        /*00a0*/                   STG.E.64 desc[UR4][R24.64], R20 ;     /* 0x0 */
        /*00b0*/              @!P0 BRA 0x30 ;                            /* 0x0 */
        /*00c0*/                   EXIT ;                                /* 0x0 */
        /*00d0*/                   BRA 0xd0;                             /* 0x0 */
"""

# Two loops that multiply: the first of them twice as long as the other, with the same products.
PRODUCTS = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], !P0 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   DEPBAR.LE SB0, 0x1 ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R56, R80, gdesc[UR8], RZ, !UPT ;
        /*0060*/                   FMUL R1, R1, R2 ;
        /*0070*/                   FMUL R1, R1, R2 ;
        /*0080*/                   FMUL R1, R1, R2 ;
        /*0090*/               @P0 BRA 0x40 ;
        /*00a0*/                   DEPBAR.LE SB0, 0x1 ;
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/                   HGMMA.64x32x16.F32.BF16 R56, R80, gdesc[UR8], RZ, !UPT ;
        /*00d0*/               @P0 BRA 0xa0 ;
        /*00e0*/                   EXIT ;
"""


def test_work_of_a_loop():
    loop = sass.main_loop(sass.parse(STREAM))
    assert (loop[0].address, loop[-1].address) == (0x30, 0xB0)
    # 9 issued, the one under @!PT too; FADD, FFMA; IADD3; EX2; 32 lanes of 16 + 16 + 8 bytes.
    assert sass.count(loop) == sass.Work(9, fma=2, alu=1, mufu=1, lsu_bytes=1280, flops=0.0, read=1024, written=256)


def test_main_loop_is_the_shorter_of_those_with_most_products():
    code = sass.parse(PRODUCTS)
    loop = sass.main_loop(code)
    assert loop[0].address == 0xA0
    assert sass.count(loop).flops == 2 * 64 * 32 * 16 / 4  # of one of four warps
    assert model.waits(loop) == 2
    assert sass.count(sass.parse("/*0000*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;")).flops == 2 * 16 * 8 * 16


def test_bytes_in_flight():
    """The loads ahead of a loop's next pass count; a load that is used at once leaves no room for another."""
    assert sass.bytes_in_flight(sass.parse(STREAM)) == 32
    waiting = """/*0000*/ LDG.E.128 R4, [R2.64] ; /*0010*/ FADD R1, R4, R5 ; /*0020*/ LDG.E.128 R8, [R2.64] ;
    /*0030*/ FADD R1, R8, R9 ; /*0040*/ LDG.E.64 R12, [R2.64] ; /*0050*/ EXIT ;"""
    assert sass.bytes_in_flight(sass.parse(waiting)) == 16
    # The second group of copies is still out behind DEPBAR.LE SB0, 0x1, the first is not.
    assert sass.bytes_in_flight(sass.parse(PRODUCTS)) == 32
    one = PRODUCTS.replace("DEPBAR.LE SB0, 0x1", "DEPBAR.LE SB0, 0x0").split("/*0020*/")
    again = "/*0020*/ DEPBAR.LE SB0, 0x0 ; /*0030*/ LDGSTS.E.64 [R1], desc[UR4][R2.64] ; /*0040*/ LDGDEPBAR ;"
    assert sass.bytes_in_flight(sass.parse(one[0] + again)) == 16


def _kernel(text: str, blocks: int, *, warps=4, registers=128, shared=0) -> model.Kernel:
    return model.Kernel("k", 90, warps, registers, shared, blocks, sass.parse(text))


def test_waves():
    """128 registers of 128 threads: four blocks a multiprocessor, 528 on an H100."""
    assert _kernel(STREAM, 1).resident == 4
    for blocks, whole, left, fill in ((528, 1, 0, 1.0), (1056 + 132, 2, 132, 0.25), (400, 0, 400, 400 / 528)):
        found = model.waves(_kernel(STREAM, blocks), 132)
        assert (found.whole, found.left, found.last_fill) == (whole, left, fill)


def test_cycles_of_units():
    work = sass.Work(80, fma=16, alu=8, mufu=3, lsu_bytes=1280, flops=16384.0, read=512, written=0)
    units = model.unit_cycles(work, 90, 4096, 128)
    assert units == {"issue": 20, "fma": 4, "alu": 4, "mufu": 6, "lsu": 10, "l2": 12.8, "tensor": 4}
    assert model.unit_cycles(work, 80, 2048, 128)["fma"] == 8
    # Sixteen warps: 16 (4 + 20), more than 16 x 12.8 and 4 (4 + 20) + 30 x 2. One: the chain, and its first loads.
    assert model.wave_cycles(units, 16, 2) == (384, "issue")
    assert model.wave_cycles(units, 1, 2, passes=10.0, start=500.0) == (10 * 156 + 500, "latency")
    assert model.wave_cycles({**units, "l2": 50}, 16, 2) == (800, "l2")


def test_a_stream_is_bound_by_memory_or_by_what_is_in_flight():
    moved = 1e9
    seconds, bound, in_flight, *_ = model.predict(_kernel(STREAM, 52800), "h100 hbm3", 0.0, moved)
    assert (bound, in_flight) == ("memory", 32 * 128 * 4)
    assert seconds == pytest.approx(2e-6 + moved / (0.9 * 3.35e12))
    # One block of a warp a multiprocessor, with 200 kB: 1 kB in flight, and 0.8 of the bytes are read.
    slow = model.predict(_kernel(STREAM, 132, warps=1, shared=200 << 10), "h100 hbm3", 0.0, moved)
    assert slow.in_flight == 1024
    assert slow.seconds == pytest.approx(2e-6 + 0.8 * moved * 600e-9 / (1024 * 132))


def test_products_take_a_blocks_passes():
    """One block of four warps a multiprocessor, 100 passes each: a chain of 4 (tensor + issue) and two waits."""
    flops = 2.0 * 64 * 32 * 16 * 100 * 132
    kernel = _kernel(PRODUCTS, 132, registers=255, shared=200 << 10)
    found = model.predict(kernel, "h100 hbm3", flops, 1e3)
    rate = 989e12 / (132 * 1.83e9)
    cycles = 100 * (4 * (16384 / rate + 1) + 60) + 2 * 600e-9 * 1.83e9
    assert found.bound == "latency"
    assert found.seconds == pytest.approx(2e-6 + cycles / 1.83e9 / model.PRODUCTS_SHARE)
    # Half of a second wave's blocks take as long as all of them.
    longer = model.predict(kernel._replace(blocks=198), "h100 hbm3", flops * 1.5, 1e3)
    assert longer.seconds - 2e-6 == pytest.approx(2 * (found.seconds - 2e-6))


def test_executed_pairs():
    assert model.executed_pairs((128, 128), 64) == 2 * 128 * 128
    assert model.executed_pairs((128,), 64, causal=True) == 64 * 64 + 64 * 128
    assert model.executed_pairs((256,), 64, causal=True, left=64) == 64 * (64 + 128 + 128 + 128)
    # A tile of two packed sequences runs over the keys of both.
    assert model.executed_pairs((96, 32), 64, packed=True) == 64 * 96 + 64 * 128


def test_every_chip_with_a_peak_that_triton_compiles_for_has_its_limits():
    """Multiprocessors times clock times a power of two is the data sheet's peak within 5%; V100 and T4 have none."""
    for name, gpu in chip.CHIPS.items():
        of_sm = gpu.flops_of_sm(chip.data_sheet(name)[0])
        assert min(abs(of_sm / size - 1) for size in (512, 1024, 2048, 4096, 8192)) < 0.05, name
    assert set(chip.CHIPS) == {name for name, (bfloat16, _) in chip._PEAKS.items() if bfloat16}


FILE = Path(__file__).parent.parent / "benchmarks" / "results" / "static" / predicted.FILE


def test_committed_predictions_have_every_shape_and_are_slower_than_the_roofline():
    rows = list(csv.DictReader(FILE.read_text().splitlines()[1:]))
    shapes = {(row["op"], row["shape"], row["chip"]) for row in rows}
    assert shapes == {
        (row.op, predicted.shape_of(row.variant), product) for row in predicted.ROWS for product in row.chips
    }
    assert all(float(row["us"]) > float(row["roofline_us"]) for row in rows)
    assert {row["peers"] for row in rows} >= {peers for row in predicted.ROWS for peers in row.peers.values()}


@pytest.mark.skipif(not (version("triton") or "").startswith("3.7"), reason="predictions are of triton 3.7")
def test_a_prediction_is_of_the_launchers_own_grid():
    """rms_norm's, on an H100 and on a chip of twice its multiprocessors; one that the launcher chooses has a star."""
    at = next(i for i, row in enumerate(predicted.ROWS) if row.op == "rms_norm")
    forward, backward = predicted.predict((at, predicted.H100))
    assert int(forward["blocks"]) >= 1024
    assert int(backward["blocks"]) % 132 == 0
    assert [row["last_wave"].endswith("*") for row in (forward, backward)] == [False, True]
    committed = {tuple(row.values())[:4]: row for row in csv.DictReader(FILE.read_text().splitlines()[1:])}
    for row in (forward, backward):
        assert predicted.nearly_same(committed[tuple(row.values())[:4]], row)


def test_no_launcher_that_chooses_its_blocks_leaves_the_last_wave_empty():
    assert not predicted.short_waves(list(csv.DictReader(FILE.read_text().splitlines()[1:])))


def test_an_empty_last_wave_is_a_fault_where_the_launcher_chooses():
    row = dict.fromkeys(predicted.COLUMNS, "0")
    assert [bool(predicted.short_waves([row | {"last_wave": fill}])) for fill in ("0.59*", "0.60*", "0.10")] == [
        True,
        False,
        False,
    ]
