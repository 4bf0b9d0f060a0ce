"""What the launchers ask of a device."""

import functools

import torch


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """SMs of a CUDA device; 2 where an interpreter takes CPU tensors, so that persistent kernels loop there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
