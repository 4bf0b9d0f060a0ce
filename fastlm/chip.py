"""The device that a run is on: its name, and the peak rate of its matrix products, which MFU is measured against.

    MFU = FLOPs of a step's matrix products (Model.flops) / (seconds · peak)

The peak is the vendor's dense figure for the dtype; an unknown chip has none, and a run on it has no MFU.
"""

from __future__ import annotations

import re

import torch

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


def chip_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def product(name: str) -> str:
    """A driver's name without vendor, brand and memory size: "NVIDIA A100-SXM4-80GB" is "a100 sxm4"."""
    words = re.split(r"[\s-]+", name.strip().lower())
    return " ".join(word for word in words if word not in ("nvidia", "tesla") and not re.fullmatch(r"\d+gb", word))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of the chip in `dtype`, or None where it is not known: a CPU, or float32 with torch's tf32 switched on."""
    if device.type != "cuda" or (dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"):
        return None
    bfloat16, float32 = _PEAKS.get(product(chip_name(device)), (None, None))
    return bfloat16 if dtype == torch.bfloat16 else float32


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
