"""predicted.csv: what fastlm.bench.kernel_model predicts for the shapes at which peers have published figures.

A row is one pass of one op at one shape on one chip: its kernels, compiled for the chip's architecture and launched
with its number of multiprocessors, and the sum of their times. `blocks`, `resident` (a multiprocessor), `waves` and
`last_wave` (its fill) are of the largest kernel, and so are `in_flight` (bytes of a multiprocessor), `bound` and
`cycles`, which are a warp's cycles of each unit in one pass of its main loop. TFLOP/s are at the textbook count; GB/s
count OpCase.bytes.

`peers` are other projects' own figures (their repositories and papers, read in 2026), most on an H100 80GB or an H200,
as the row's chip. Attention's lengths are of sequences that make 16384 tokens together where the peer gives no batch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

import fastlm
from fastlm import chip
from fastlm.bench import kernel_model as model
from fastlm.bench import sass
from fastlm.testing.ahead_of_time import Compiled, compile_for
from fastlm.testing.cases import CASES
from fastlm.testing.cases._case import Variant

FILE = "predicted.csv"
COLUMNS = ("op", "shape", "pass", "chip", "us", "rate", "unit", "roofline_us", "bound", "kernels")
COLUMNS += ("blocks", "resident", "waves", "last_wave", "in_flight", "cycles", "peers")
H100, H200, A100, B200 = "h100 hbm3", "h200", "a100 sxm4", "b200"


@dataclass(frozen=True)
class Row:
    """A shape, the chips to predict it on, and {(chip, pass): peers' figures}."""

    op: str
    variant: Variant
    chips: tuple[str, ...]
    peers: dict[tuple[str, str], str] = field(default_factory=dict)


def _heads(length: int, d: int, heads: int, kv: int, tokens: int = 16384, **options) -> Variant:
    shape = {"b": max(1, tokens // length), "s": length, "h": heads, "d": d}
    return Variant(shape | ({"kv": kv} if kv != heads else {}), options)


_ALL = (H100, H200, A100)
ROWS = (
    Row(
        "attention",
        _heads(512, 128, 16, 16),
        (H100, A100),
        {
            (H100, "fwd"): "cuDNN 497, FA3 467, Triton 323, FA2 309",
            (H100, "bwd"): "FA3 316, cuDNN 305, FA2 214",
        },
    ),
    Row(
        "attention",
        _heads(2048, 128, 16, 16),
        (H100,),
        {(H100, "fwd"): "FA3 625, cuDNN 617, Triton 389, FA2 362"},
    ),
    Row(
        "attention",
        _heads(16384, 128, 16, 16),
        (H100,),
        {
            (H100, "fwd"): "FA3 648, cuDNN 595, Triton 395, FA2 370",
            (H100, "bwd"): "FA3 561, cuDNN 516, FA2 322",
        },
    ),
    *(
        Row(
            "attention",
            _heads(length, 128, 64, 8),
            (H200,),
            {(H200, "fwd"): f"cuDNN {forward}", (H200, "bwd"): f"cuDNN {backward}"},
        )
        for length, forward, backward in ((2048, 633, 504), (8192, 691, 594), (16384, 702, 612))
    ),
    *(
        Row(
            "attention",
            _heads(length, 128, 64, 8, causal=True),
            (H200,),
            {(H200, "fwd"): f"cuDNN {forward}", (H200, "bwd"): f"cuDNN {backward}"},
        )
        for length, forward, backward in ((2048, 484, 370), (8192, 644, 541))
    ),
    Row(
        "attention",
        _heads(16384, 64, 32, 32),
        (H100,),
        {
            (H100, "fwd"): "FA3 497, cuDNN 413, Triton 403, FA2 324",
            (H100, "bwd"): "FA3 474, cuDNN 433, FA2 291",
        },
    ),
    Row(
        "attention",
        _heads(512, 64, 32, 32),
        _ALL,
        {(H100, "fwd"): "Triton 340, cuDNN 335, FA3 333", (H100, "bwd"): "FA3 272"},
    ),
    *(
        Row(
            "attention",
            _heads(length, 64, 64, 8, causal=True, window_size=(1024, 0)),
            (H200,),
            {(H200, "fwd"): f"cuDNN {forward}", (H200, "bwd"): f"cuDNN {backward}"},
        )
        for length, forward, backward in ((2048, 310, 264), (4096, 336, 289), (8192, 349, 300))
    ),
    # The shapes at which an H100 has run fastlm: LOG.md, 2026-11-26, with other kernels than today's.
    Row(
        "attention",
        Variant({"b": 32, "s": 512, "h": 12, "d": 64, "padding": "right"}),
        _ALL,
        {(H100, "fwd"): "fastlm 245 (2026-11-26)", (H100, "bwd"): "fastlm 245 (2026-11-26)"},
    ),
    Row(
        "attention",
        _heads(8192, 128, 16, 16, causal=True),
        (H100,),
        {(H100, "fwd"): "fastlm 405 (2026-11-26)", (H100, "bwd"): "fastlm 324 (2026-11-26)"},
    ),
    Row(
        "attention",
        Variant({"h": 12, "d": 64, "lengths": (512,) * 32}, {"dropout_p": 0.1}),
        _ALL,
        {(H100, "fwd"): "fastlm 197 µs (2026-11-26)", (H100, "bwd"): "fastlm 523 µs (2026-11-26)"},
    ),
    *(
        Row(
            "rms_norm",
            Variant({"rows": 32768, "cols": cols, "bias": 0}),
            (H100, H200, A100, B200),
            {(H100, "fwd"): f"quack {rate}"},
        )
        for cols, rate in ((256, 1913), (1024, 2581), (8192, 2987))
    ),
    Row(
        "rms_norm",
        Variant({"rows": 16384, "cols": 4096, "bias": 0}),
        (H200,),
        {(H200, "fwd"): "cuDNN 3708, torch.compile 3523", (H200, "bwd"): "cuDNN 3801, torch.compile 1704"},
    ),
    Row(
        "layer_norm",
        Variant({"rows": 1024, "cols": 12288}),
        (H200,),
        {(H200, "fwd"): "cuDNN 3227", (H200, "bwd"): "torch.compile 1773, eager 1245, cuDNN 946"},
    ),
    Row(
        "layer_norm",
        Variant({"rows": 32768, "cols": 1024}),
        (H100, H200, A100, B200),
        {(H100, "bwd"): "forward and backward: Triton 309 µs, apex 578 µs"},
    ),
    Row(
        "layer_norm",
        Variant({"rows": 16384, "cols": 768, "residual": 1}, {"dropout_p": 0.1}),
        (H100, H200, A100, B200),
        {(H100, "bwd"): "fastlm, forward and backward: 104 µs (2026-11-26)"},
    ),
    Row(
        "gelu",
        Variant({"rows": 16384, "cols": 3072}),
        (H100, H200, A100, B200),
        {(H100, "bwd"): "fastlm, forward and backward: 204 µs (2026-11-26)"},
    ),
    *(
        Row(
            "cross_entropy",
            Variant({"rows": 32768, "vocabulary": classes}),
            (H100, H200, A100),
            {(H100, "fwd"): f"quack {quack}, torch.compile {compiled}; with its gradient Liger {liger}"},
        )
        for classes, quack, compiled, liger in (
            (256, 1113, 340, 32),
            (1024, 1902, 875, 132),
            (8192, 2942, 1553, 695),
            (32768, 3021, 1700, 844),
        )
    ),
)


def empty_inputs(op: str, variant: Variant, gradients: bool) -> dict[str, object]:
    """The OpCase's inputs in bfloat16, unwritten: no page of them is touched, so that real shapes cost no memory."""
    case = CASES[op]
    with torch.device("meta"):
        made = case.make(None, **variant.shape)
    inputs = {}
    for name, value in made.items():
        if isinstance(value, torch.Tensor):
            dtype = value.dtype if value.dtype != torch.float64 else torch.bfloat16
            dtype = torch.float32 if name in variant.float32 else dtype
            value = torch.empty(value.shape, dtype=dtype, device="cpu")
            if name.startswith("cu_seqlens"):  # a CPU's are checked
                value.copy_(torch.tensor([0, *itertools.accumulate(variant.shape["lengths"])]))
            value.requires_grad_(gradients and name in case.gradients)
        inputs[name] = value
    return inputs


@contextlib.contextmanager
def multiprocessors(count: int):
    """The launchers of Triton kernels take the CPU for a device with so many multiprocessors."""
    with contextlib.ExitStack() as stack:
        for found in pkgutil.iter_modules([str(Path(fastlm.__file__).parent / "kernels")], "fastlm.kernels."):
            module = importlib.import_module(found.name)
            if hasattr(module, "multiprocessors"):
                stack.enter_context(mock.patch.object(module, "multiprocessors", return_value=count))
        yield


def launches(op: str, variant: Variant, arch: int, count: int) -> dict[str, list[Compiled]]:
    """The kernels of each pass, compiled and not run, in the order of their first launch."""
    case = CASES[op]
    backward = not case.gradient_in_forward
    inputs = empty_inputs(op, variant, backward)
    with multiprocessors(count), compile_for(arch) as compiled:
        outputs = case.run(case.function, variant, inputs, backend="triton")
        kernels = {"fwd": list(compiled)}
        if backward:
            outputs = [out for out in outputs if isinstance(out, torch.Tensor) and out.requires_grad]
            wanted = [inputs[name] for name in case.gradients if inputs.get(name) is not None]
            torch.autograd.grad(outputs, wanted, [torch.empty_like(out) for out in outputs], allow_unused=True)
            kernels["bwd"] = compiled[len(kernels["fwd"]) :]
    return kernels


@functools.lru_cache(maxsize=256)  # many shapes launch the same machine code
def _read(compiled: Compiled) -> tuple[int, list[sass.Instruction]]:
    return compiled.resources().registers, sass.parse(compiled.sass())


def _kernel(compiled: Compiled) -> model.Kernel:
    registers, code = _read(compiled)
    kernel = compiled.name, compiled.arch, compiled.num_warps, registers, compiled.shared, compiled.blocks[0]
    return model.Kernel(*kernel, code)


# Matrix products of an attention kernel, of which the textbook counts two forward and five backward.
_PRODUCTS = {"_fwd": 2, "_dkdv": 4, "_dq": 3}
# Of the op's bytes, where a pass has several kernels that move many. Backward of attention has eight tensors, of which
# dkdv and dq each move six. Of long rows' norms the weights' gradients read two of three again.
_SHARES = {"_dkdv": 3 / 4, "_dq": 3 / 4, "_bwd_long": 1.0, "_weights_long": 2 / 3}


def _lengths(variant: Variant) -> tuple[list[int], bool]:
    packed = variant.shape.get("lengths")
    return (list(packed), True) if packed else ([variant.shape["s"]] * variant.shape["b"], False)


def _attention_flops(kernel: model.Kernel, variant: Variant) -> float:
    """Of a launch: what its tiles cover, which is more than the textbook's count."""
    if kernel.name not in _PRODUCTS:
        return 0.0
    shape, (lengths, packed) = variant.shape, _lengths(variant)
    heads = shape.get("kv", shape["h"]) if kernel.name == "_dkdv" else shape["h"]
    sequences = 1 if packed else shape["b"]
    tiles = kernel.blocks // (heads * sequences)
    tokens = sum(lengths) if packed else shape["s"]
    tile = 1 << (-(-tokens // tiles) - 1).bit_length()
    window = variant.options.get("window_size", (-1, -1))[0]
    pairs = model.executed_pairs(
        lengths, tile, causal=bool(variant.options.get("causal")), left=window if window >= 0 else None, packed=packed
    )
    return 2.0 * _PRODUCTS[kernel.name] * pairs * shape["h"] * shape["d"]


def _textbook_flops(variant: Variant, backward: bool) -> float:
    """As OpCase's, with the window."""
    shape, window = variant.shape, variant.options.get("window_size", (-1, -1))[0]
    if window < 0 or window >= shape["s"]:
        return float(CASES["attention"].flops(shape, variant.options, backward))
    s, seen = shape["s"], window + 1  # each query sees at most `seen` keys, causally
    pairs = shape["b"] * (seen * (seen + 1) / 2 + (s - seen) * seen)
    return 4 * pairs * shape["h"] * shape["d"] * (2.5 if backward else 1)


def shape_of(variant: Variant) -> str:
    """Sequences of equal lengths as lengths32x512."""
    lengths = variant.shape.get("lengths")
    return str(variant).replace(f"lengths{lengths}", f"lengths{len(lengths)}x{lengths[0]}") if lengths else str(variant)


def chooses(few: list[Compiled], many: list[Compiled]) -> list[bool]:
    """Of each kernel, whether its launcher chooses the number of blocks: on more multiprocessors it launches more."""
    return [a.blocks != b.blocks for a, b in zip(few, many)]


def configurations() -> list[tuple[int, str]]:
    """(index into ROWS, chip)."""
    return [(i, product) for i, row in enumerate(ROWS) for product in row.chips]


def predict(configuration: tuple[int, str]) -> list[dict[str, str]]:
    """The rows of a shape on one chip: forward, and backward where it has its own pass."""
    row, product = ROWS[configuration[0]], configuration[1]
    case, gpu, variant = CASES[row.op], chip.CHIPS[product], row.variant
    kernels = launches(row.op, variant, gpu.arch, gpu.multiprocessors)
    more = launches(row.op, variant, gpu.arch, 2 * gpu.multiprocessors)
    rows = []
    for name, compiled in kernels.items():
        backward = name == "bwd"
        chosen = chooses(compiled, more[name])
        moved = case.bytes(variant.shape, variant.options, 2, backward)
        flops = _textbook_flops(variant, backward) if row.op == "attention" else 0.0
        parts = [_kernel(kernel) for kernel in compiled]
        largest = max(range(len(parts)), key=lambda i: (parts[i].name in _PRODUCTS, parts[i].blocks * parts[i].warps))
        predictions = []
        for i, part in enumerate(parts):
            of_part = _attention_flops(part, variant) if flops else 0.0
            # The largest moves the op's bytes; sums of partial sums move few.
            share = _SHARES.get(part.name, 1.0 if i == largest or of_part else 0.0)
            predictions.append(model.predict(part, product, of_part, moved * share))
        seconds, main = sum(p.seconds for p in predictions), predictions[largest]
        amount, unit, scale = (flops, "TFLOP/s", 1e12) if flops else (moved, "GB/s", 1e9)
        values = [row.op, shape_of(variant), name, product]
        values += [f"{seconds * 1e6:.1f}", f"{amount / seconds / scale:.0f}", unit]
        values += [f"{model.roofline(product, flops, moved) * 1e6:.1f}", main.bound]
        values += [" ".join(f"{k.name}:{p.seconds * 1e6:.1f}" for k, p in zip(parts, predictions))]
        values += [parts[largest].blocks, parts[largest].resident, main.waves]
        values += [f"{main.waves.last_fill:.2f}" + ("*" if chosen[largest] else ""), main.in_flight]
        values += [model.format_units(main.units), row.peers.get((product, name), "")]
        rows.append(dict(zip(COLUMNS, map(str, values))))
    return rows


def short_waves(rows: list[dict[str, str]]) -> list[str]:
    """The passes whose launcher chooses the number of blocks (*), and leaves the last wave emptier than LEAST_FILL."""
    return [
        f"{row['op']} {row['shape']} {row['pass']} on {row['chip']}: {row['blocks']} blocks, {row['resident']} a "
        f"multiprocessor, fill {float(row['last_wave'].rstrip('*')):.0%} of the last of {row['waves']} waves"
        for row in rows
        if row["last_wave"].endswith("*") and float(row["last_wave"][:-1]) < model.LEAST_FILL
    ]


def nearly_same(row: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two rows are of one pass, and a few registers more or less explain what differs: times within 5%."""
    named = ("op", "shape", "pass", "chip", "unit", "roofline_us", "peers", "blocks", "resident", "waves", "last_wave")
    close = abs(float(row["us"]) - float(other["us"])) <= 0.05 * float(row["us"])
    return close and all(row[name] == other[name] for name in named)
