"""Loads the compiled modules, and says why one is missing.

`_cpu` is not linked to an OpenMP library. Its symbols resolve to the library that torch has loaded, so torch and
fastlm share one pool of threads. On Linux torch makes its library visible to the whole process. If it does not, this
module opens the library found in the process again, with global visibility.
"""

import ctypes
import functools
import importlib
import re
import sys
from typing import NamedTuple

import torch


def _load(name):
    try:
        return importlib.import_module(f"fastlm.{name}"), None
    except ImportError as error:
        return None, error


def openmp_libraries() -> list[str]:
    """Paths of the OpenMP runtimes mapped in this process; empty outside Linux."""
    if sys.platform != "linux":
        return []
    with open("/proc/self/maps") as maps:
        return sorted(set(re.findall(r"(/\S*lib(?:gomp|iomp5|omp)[-.\w]*)$", maps.read(), re.M)))


def _load_cpu():
    module, error = _load("_cpu")
    if error is not None and "undefined symbol" in str(error):
        for library in openmp_libraries() or ["libgomp.so.1"]:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        module, error = _load("_cpu")
    return module, error


_cpu, _cpu_error = _load_cpu()


def cpu():
    """The module fastlm._cpu. Call this only if `missing_cpu()` is None."""
    return _cpu


def missing_cpu() -> str | None:
    """Why the C++ kernels are not available, or None."""
    return (
        None if _cpu_error is None else f"fastlm._cpu is not built ({_cpu_error}); run `pip install .` in fastlm's tree"
    )


@functools.cache
def _cuda():
    return _load("_cuda")


def cuda():
    """The module fastlm._cuda. Call this only if `missing_cuda()` is None."""
    return _cuda()[0]


@functools.cache
def missing_cuda() -> str | None:
    """Why the CUDA C++ kernels are not available, or None."""
    module, error = _cuda()
    if error is not None:
        return f"fastlm._cuda is not built ({error}); build fastlm where nvcc is on PATH"
    try:
        devices = module.devices()
    except RuntimeError as reason:
        return f"no usable CUDA device ({reason})"
    if not devices:
        return "there is no CUDA device"
    built = [int(code) // 10 for code in module.architectures().split(",")]
    for device in devices:
        if not _runs_on(device.capability, built):
            return (
                f"fastlm._cuda is built for {', '.join(f'sm_{arch}' for arch in built)}, {device.name} is "
                f"sm_{device.capability}; build fastlm with FASTLM_CUDA_ARCHS={device.capability}"
            )
    return None


def _runs_on(capability: int, built: list[int]) -> bool:
    """Whether the build has machine code for a device, or PTX to compile. The PTX is of the last architecture."""
    return capability >= built[-1] or any(arch // 10 == capability // 10 and arch <= capability for arch in built)


def threads() -> int:
    """The number of threads for a CPU kernel: torch's setting. A kernel in a forked worker always uses one."""
    return torch.get_num_threads()


cuda_recorder = None


def record_cuda(recorder) -> None:
    """For tests: calls recorder(entry, grid, block, shared_bytes, params) in place of each CUDA launch; None ends it.

    While a recorder is set, backend="cuda" takes CPU tensors.
    """
    global cuda_recorder
    _cuda()[0].record(recorder)
    cuda_recorder = recorder


def drop_cuda_launches(on: bool) -> None:
    """For measuring host time: CUDA kernels are not launched, and backend="cuda" takes CPU tensors."""
    global cuda_recorder
    _cuda()[0].drop_launches(on)
    cuda_recorder = on or None


class Place(NamedTuple):
    """Where a CUDA kernel runs."""

    device: int
    stream: int


def cuda_place(tensor: torch.Tensor) -> Place:
    """The device of `tensor`, and torch's current stream on it."""
    if not tensor.is_cuda:
        return Place(0, 0)
    return Place(tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream)


DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
