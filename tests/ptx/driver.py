"""Drives kernels from their own host code: Triton's `kernel[grid](...)`, and the launches of CUDA host code."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch

from ptx.compile import ARCH, ptx_pipeline
from ptx.launch import SHARED_LIMITS, Report, load, run, uninitialised
from ptx.tensor_map import tensor_map


@dataclass
class Launches:
    """The reports of the launches under a driver, in order, with their kernels' names."""

    reports: list[tuple[str, Report]] = field(default_factory=list)

    def kernels(self) -> list[str]:
        return [name for name, _ in self.reports]


class _Driver:
    """What Triton's runtime asks of a device, answered by the interpreter."""

    def __init__(self, launches: Launches, arch: int, options: dict):
        self.launches, self.arch, self.options = launches, arch, options
        self.utils = self  # load_binary, get_device_properties
        self.launcher_cls = self.launcher

    # Triton keeps compiled kernels per device; this one is nobody else's.
    def get_current_device(self):
        return f"ptx{self.arch}"

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {
            "max_shared_mem": SHARED_LIMITS[self.arch],
            "multiprocessor_count": 1,
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def get_benchmarker(self):
        raise ValueError("autotuning needs a device: give the kernel one configuration")

    def load_binary(self, name, binary, shared, device):
        """module, function, registers, spills, threads of a block"""
        return None, load(binary.decode(), name), 0, 0, 1024

    def launcher(self, source, metadata):
        from triton.runtime.jit import TensorWrapper

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, exit_, *args):
            if x * y * z == 0:  # as Triton's own launcher
                return
            described = iter(getattr(metadata, "tensordesc_meta", None) or ())
            named = list(_flat(source.signature, source.signature.values(), args, described))
            names = [name for name, _ in named]
            arguments = [value.base if isinstance(value, TensorWrapper) else value for _, value in named]
            # After the kernel's own parameters come pointers to scratch memory, for every block its share.
            hidden = len(function.parameters) - len(arguments)
            size = getattr(metadata, "global_scratch_size", 0) * x * y * z
            scratch = [uninitialised(np.empty(size, np.uint8)) if size else None, None][:hidden]
            report = run(
                function, None, (x, y, z), 32 * metadata.num_warps, [*arguments, *scratch],
                shared_bytes=metadata.shared, names=names, **self.options,
            )  # fmt: skip
            self.launches.reports.append((metadata.name, report))

        return launch


def _flat(names, types, values, described):
    """(name, value) of each parameter in PTX: a tuple's elements one by one, constants not at all.

    described: what the compiler says of each tensor descriptor in turn.
    """
    for name, type_, value in zip(names, types, values):
        if isinstance(type_, tuple):
            fields = getattr(type_, "_fields", range(len(type_)))
            yield from _flat([f"{name}.{field}" for field in fields], type_, value, described)
        elif type_.startswith("tensordesc"):
            yield from ((name, part) for part in _descriptor(value, next(described)))
        elif type_ != "constexpr":
            yield name, value


def _descriptor(value, meta: dict):
    """The parameters of one TensorDescriptor of the host: its map for sm_90's copies, its sizes and its strides."""
    tensor = value.base.as_strided(value.shape, value.strides)
    yield tensor_map(tensor, tuple(meta["block_size"][::-1]), (0, 32, 64, 128)[meta["swizzle"]])
    yield from (*value.shape, *value.strides)


@contextlib.contextmanager
def empty_is_unwritten():
    """Memory from torch.empty and its like counts as unwritten until a kernel, or anything else, writes it."""

    def marked(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            # Not what a tracer makes: a FakeTensor has no memory.
            return uninitialised(out) if type(out) is torch.Tensor and out.device.type == "cpu" and out.numel() else out

        return call

    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
            (torch.Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, marked(getattr(owner, name))))
        yield


@contextlib.contextmanager
def triton_on_ptx(arch: int = ARCH, **options):
    """Every Triton kernel launched inside runs on the interpreter, over CPU tensors.

    Compiled for sm_`arch`, 80 or 90, as Triton's own launcher would, specialisation included. options: those of `run`.
    Yields the Launches. A fault raises from the launch.
    """
    from triton.runtime.driver import driver

    launches = Launches()
    before = driver._active
    with ptx_pipeline(), empty_is_unwritten():
        driver.set_active(_Driver(launches, arch, options))
        try:
            yield launches
        finally:
            driver._active = before


@contextlib.contextmanager
def cuda_on_ptx(record: Callable, ptx: str, tensors: Callable[[], list] | None = None, **options):
    """Launches of CUDA host code inside run on the interpreter, over CPU tensors, one after the other.

    record: called with a function f(entry, grid, block, shared_bytes, params), which the host code is to call in place
    of every launch, and with None at the end. `params` are the bytes of the kernel's parameters, with the tensors' own
    addresses in them. ptx: the module that holds the kernels. options: those of `run`. Yields the Launches.
    A kernel may touch the elements of every tensor of `tensors()`, or of every live one, that a word of its parameters
    points into.
    """
    launches = Launches()

    def execute(entry: str, grid, block, shared_bytes: int, params: bytes) -> None:
        words = np.frombuffer(params[: len(params) // 8 * 8], np.uint64).tolist()
        known = _live_tensors() if tensors is None else tensors()
        memory = [tensor for tensor in known if any(_contains(tensor, word) for word in words)]
        report = run(ptx, entry, grid, block, params, shared_bytes=shared_bytes, memory=memory, **options)
        launches.reports.append((entry, report))

    with empty_is_unwritten():
        record(execute)
        try:
            yield launches
        finally:
            record(None)


def _live_tensors() -> list[torch.Tensor]:
    found = (item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter))
    return [tensor for tensor in found if tensor.device.type == "cpu" and tensor.layout == torch.strided]


def _contains(tensor: torch.Tensor, address: int) -> bool:
    size = tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())))
    return bool(tensor.numel()) and tensor.data_ptr() <= address < tensor.data_ptr() + size
