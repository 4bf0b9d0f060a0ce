"""What the launchers read of a device."""

import functools

import torch
import triton


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """SMs of a CUDA device; 2 for an interpreter's CPU tensors, so that persistent kernels loop there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def architecture() -> int:
    """What Triton compiles for, 80 for sm_80: the current device, or the driver in place of one.

    80 under TRITON_INTERPRET=1, where there is neither.
    """
    if triton.knobs.runtime.interpret:
        return 80
    return triton.runtime.driver.active.get_current_target().arch
