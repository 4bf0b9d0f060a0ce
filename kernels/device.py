"""What the launchers read of a device."""

import functools

import torch
import triton


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """SMs of a CUDA device; 2 for an interpreter's CPU tensors, so that persistent kernels loop there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def register_limit(num_warps: int, registers: int) -> int:
    """`maxnreg` for a kernel of resident programs: what is handed out, in units of 8, and one block can have."""
    return min(255, -(-registers // 8) * 8, 65536 // (32 * num_warps))


def resident(num_warps: int, registers: int, device: torch.device) -> int:
    """Programs of so many warps and registers a thread, at most, that are resident at once on a device.

    A grid of as many, which loops, has no second wave. sm_80 to sm_120 all have 65536 registers a multiprocessor.
    """
    return min(32, 65536 // (32 * num_warps * registers)) * multiprocessors(device)


def stages(tile_bytes: int) -> int:
    """`num_stages` of a loop that loads two or three tensors, a tile of so many bytes of each, to shared memory ahead.

    3 hold two tiles of each: at two programs a multiprocessor, 32 to 48 KB of each tensor are on their way, against the
    29 KB that latency times bandwidth needs in all on an H200. A block has 99 KB on sm_86, sm_89 and sm_120.
    """
    return 3 if tile_bytes <= 8192 else 2 if tile_bytes <= 16384 else 1


def architecture() -> int:
    """What Triton compiles for, 80 for sm_80: the current device, or the driver in place of one.

    80 under TRITON_INTERPRET=1, where there is neither.
    """
    if triton.knobs.runtime.interpret:
        return 80
    return triton.runtime.driver.active.get_current_target().arch
