"""The device that a run is on: its name, the peak rate of its matrix products, which MFU is measured against, and the
dtype in which it multiplies faster.

    MFU = FLOPs of a step's matrix products (Model.flops) / (seconds · peak)

A GPU's peak is the vendor's dense figure for the dtype, a CPU's is measured (fastlm.cpu_rate). Where neither is known,
a run has no MFU.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from fastlm import cpu_rate

# product -> FLOP/s of (dense bfloat16 with float32 accumulation, float32 outside the tensor cores); None where there is
# no such unit. Source: NVIDIA's data sheets and architecture white papers.
_PEAKS: dict[str, tuple[float | None, float]] = {
    "b200": (2250e12, 75e12),
    "h200": (989e12, 67e12),
    "h200 nvl": (835e12, 60e12),
    "h100 hbm3": (989e12, 67e12),  # as the driver calls the SXM module
    "h100 pcie": (756e12, 51e12),
    "h100 nvl": (835e12, 60e12),
    "a100 sxm4": (312e12, 19.5e12),
    "a100 pcie": (312e12, 19.5e12),
    "a10g": (70e12, 35e12),
    "l40s": (362e12, 91.6e12),
    "l40": (181e12, 90.5e12),
    "l4": (121e12, 30.3e12),
    "v100 sxm2": (None, 15.7e12),
    "v100 pcie": (None, 14e12),
    "t4": (None, 8.1e12),
    "rtx 6000 ada generation": (364e12, 91.1e12),
    "geforce rtx 4090": (165.2e12, 82.6e12),
    "geforce rtx 3090": (71e12, 35.6e12),
}

# Times float32's rate that makes bfloat16 worth it on a CPU: its casts, and ops that gain nothing, take back a part.
GAIN = 1.3


class Chip(NamedTuple):
    """What bounds a kernel beside `_PEAKS`, by the same sources. ghz: the clock at which the peaks are stated."""

    arch: int  # 90 for sm_90
    multiprocessors: int
    ghz: float
    bandwidth: float  # of its memory, bytes/s

    def flops_of_sm(self, bfloat16: float) -> float:
        """FLOPs of bfloat16 matrix products that a multiprocessor makes in a cycle, of the chip's peak in FLOP/s."""
        return bfloat16 / (self.multiprocessors * self.ghz * 1e9)


CHIPS = {
    "b200": Chip(100, 148, 1.85, 8.0e12),
    "h200": Chip(90, 132, 1.83, 4.8e12),
    "h200 nvl": Chip(90, 132, 1.545, 4.8e12),
    "h100 hbm3": Chip(90, 132, 1.83, 3.35e12),
    "h100 pcie": Chip(90, 114, 1.62, 2.0e12),
    "h100 nvl": Chip(90, 132, 1.545, 3.9e12),
    "a100 sxm4": Chip(80, 108, 1.41, 2.039e12),  # of 80 GB, as the next; those of 40 GB have 1.555
    "a100 pcie": Chip(80, 108, 1.41, 1.935e12),
    "a10g": Chip(86, 80, 1.71, 0.6e12),
    "l40s": Chip(89, 142, 2.52, 0.864e12),
    "l40": Chip(89, 142, 2.49, 0.864e12),
    "l4": Chip(89, 58, 2.04, 0.3e12),
    "rtx 6000 ada generation": Chip(89, 142, 2.505, 0.96e12),
    "geforce rtx 4090": Chip(89, 128, 2.52, 1.008e12),
    "geforce rtx 3090": Chip(86, 82, 1.695, 0.936e12),
}


def data_sheet(name: str) -> tuple[float | None, float]:
    """FLOP/s of a product, a key of CHIPS, in bfloat16 and in float32."""
    return _PEAKS[name]


def chip_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def product(name: str) -> str:
    """A driver's name without vendor, brand and memory size: "NVIDIA A100-SXM4-80GB" is "a100 sxm4"."""
    words = re.split(r"[\s-]+", name.strip().lower())
    return " ".join(word for word in words if word not in ("nvidia", "tesla") and not re.fullmatch(r"\d+gb", word))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of the chip in `dtype` by its data sheet; None without one, and for float32 with tf32 on."""
    if device.type != "cuda" or (dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"):
        return None
    bfloat16, float32 = _PEAKS.get(product(chip_name(device)), (None, None))
    return bfloat16 if dtype == torch.bfloat16 else float32


class Peak(NamedTuple):
    """FLOP/s, None where they are not known; `source` says where they come from, or why there are none."""

    flops: float | None
    source: str

    def __str__(self) -> str:
        if self.flops is None:
            return f"n/a, {self.source}"
        rate = f"{self.flops / 1e12:.4g} TFLOP/s" if self.flops >= 1e12 else f"{self.flops / 1e9:.0f} GFLOP/s"
        return f"{rate}, {self.source}"


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """What MFU on `device` is against. It measures nothing; `fastlm info` and a run do, on a CPU."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        rate, threads = cpu_rate.known(dtype), torch.get_num_threads()
        what = f"this CPU in {name} with {threads} thread{'s' if threads > 1 else ''}"
        remedy = f"OMP_NUM_THREADS={threads} fastlm info"
        if rate is None:
            return Peak(None, f"the rate of {what} was not measured; `{remedy}` does")
        busy = "" if rate.steady else f", which was busy; `{remedy}` measures again"
        return Peak(rate.flops, f"as measured on {what}{busy}")
    flops = peak_flops(device, dtype)
    if flops is None:
        return Peak(None, f"no peak of {chip_name(device)} in {name} is known")
    return Peak(flops, f"the data sheet's in {name}")


class Dtype(NamedTuple):
    """A value of `train.dtype`, and why it is the device's."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}, since {self.why}"


def auto_dtype(device: torch.device) -> Dtype:
    """The dtype of matrix products that `train.dtype = "auto"` means on `device`.

    On a CPU bfloat16 from GAIN times float32's rate on. The rates are measured, in a second, where they are not
    known or the machine was busy. On a GPU bfloat16 from sm_80 on, the first with units for it.
    """
    if device.type == "cuda":
        chip, arch = chip_name(device), "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Dtype("bfloat16", f"{chip} ({arch}) has units for it")
        return Dtype("float32", f"{chip} ({arch}) has no units for bfloat16")
    float32, bfloat16 = cpu_rate.both()
    gain, threads = bfloat16.flops / float32.flops, torch.get_num_threads()
    with_threads = f"with {threads} thread{'s'[: threads > 1]}"
    busy = "" if float32.steady and bfloat16.steady else " on a busy machine"
    rates = f"{bfloat16.flops / 1e9:,.0f} and {float32.flops / 1e9:,.0f} GFLOP/s"
    measured = f"measured {with_threads}{busy}: {rates}"
    if gain >= GAIN:
        return Dtype("bfloat16", f"this CPU multiplies {gain:.3g} times as fast in it as in float32 ({measured})")
    return Dtype("float32", f"this CPU multiplies {gain:.3g} times as fast in bfloat16, less than {GAIN} ({measured})")


def parse_device(name: str) -> torch.device:
    """ValueError where `name` is no device, or one that torch does not see."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected cpu, or one of the {torch.cuda.device_count()} CUDA devices that torch "
            f"{torch.__version__} sees, got {name}"
        )
    return device
