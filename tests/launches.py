"""Counts what a training step launches on a GPU, on a machine without one.

    LD_PRELOAD=absent_device.so python tests/launches.py

The step of BERT-base runs on fake tensors of device "cuda": torch computes shapes, and nothing is allocated. The
adapters and launchers of the Triton backend run as on an H100; their launches are counted, and not made. What torch's
own ops launch is the table below. Prints JSON; see `main`.
"""

import contextlib
import json
import sys
import types
from collections import Counter
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlm import models
from fastlm.ops import _registry
from fastlm.tasks import Micro, TrainTable
from fastlm.testing.ahead_of_time import compile_for
from fastlm.train import graph as graphs
from fastlm.train.optimizer import make_optimizer, train_step

KINDS = {
    "matmul": ("mm", "addmm", "bmm", "baddbmm"),
    "cast": ("_to_copy",),
    "copy": ("copy_", "clone", "cat", "stack", "constant_pad_nd", "_foreach_copy_"),
    "fill": ("zero_", "fill_", "new_zeros", "zeros", "ones", "ones_like", "zeros_like", "full", "scalar_tensor"),
    "add": ("add", "add_"),
    "sum": ("sum",),
    "optimizer": ("_fused_adamw_", "_foreach_add_", "_foreach_sub_", "_foreach_norm", "linalg_vector_norm"),
}
_KIND = {name: kind for kind, names in KINDS.items() for name in names}
# Allocations, and what reads or changes a tensor's description alone. Views are found by their schemas.
_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "is_pinned"}
# What makes the host wait for the device, or a copy between them.
SYNCS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item"}


def _multi_tensor(lists) -> int:
    """Launches of ATen's multi_tensor_apply (MultiTensorApply.cuh, CUDA 13): 65536 elements a block."""
    depth = len(lists)
    most_tensors, most_blocks = (770, 448, 336, 252, 210)[depth - 1], 2240
    blocks = sum(-(-x.numel() // 65536) for x in lists[0])
    return max(-(-len(lists[0]) // most_tensors), -(-blocks // most_blocks))


def _launches(func, args, out) -> int:
    space, _, name = func._schema.name.partition("::")
    if space == "prim" or name in _NOTHING or func.is_view or name == "detach" or name in SYNCS:
        return 0
    if (
        name == "sort"
    ):  # cub's stable radix sort with an index for each: a histogram, a scan, and a pass for each 8 bits
        return 2 + args[0].element_size()
    if name.startswith(("_foreach", "_fused")):
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
        if name == "_fused_adamw_":  # steps are read beside, not a list of the kernel's
            lists = lists[:4]
        return _multi_tensor(lists) + (name == "_foreach_norm")  # it adds up the blocks' sums in a second kernel
    return 1


class Launches(TorchDispatchMode):
    """kinds: launches by kind; names: by kernel or op.

    calls: of the host that launch something
    waits: ops that make the host wait, or copy to or from it; host: those that make or read a tensor of the host
    """

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.kinds, self.names, self.waits, self.host, self.calls = Counter(), Counter(), [], [], 0

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def add(self, kind: str, name: str, count: int = 1) -> None:
        self.calls += 1
        self.kinds[kind] += count
        self.names[name] += count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, (space, _, name) = kwargs or {}, func._schema.name.partition("::")
        if space == "fastlm":
            raw = _registry._raw[name]
            with self:  # the adapter allocates, and may call torch
                return raw.implementation(args[-1])(raw.arguments.unflatten(args[:-1]))
        out = func(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if name in SYNCS or len(devices) > 1:
            self.waits.append(name)
        if "cpu" in devices:
            self.host.append(name)
        if "cuda" in devices and (count := _launches(func, args, out)):
            self.add(_KIND.get(name, "other"), name, count)
        return out


@contextlib.contextmanager
def device_step():
    """Inside, tensors are fake, and a device "cuda" seems to be there. Yields the `Launches`."""
    from triton.runtime.jit import JITFunction

    counted = Launches()

    def launch(self, *args, grid, warmup, **kwargs):
        counted.add("fastlm", self.fn.__name__)

    properties = types.SimpleNamespace(multi_processor_count=132)
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(JITFunction, "run", launch),
            mock.patch("torch._subclasses.fake_tensor.init_gpu_context"),
            mock.patch("torch.utils._foreach_utils._foreach_supported_types", [torch.nn.Parameter, FakeTensor]),
            mock.patch("torch.cuda.get_device_properties", return_value=properties),
            mock.patch("torch.cuda.is_available", return_value=True),
            mock.patch("torch.cuda.current_device", return_value=0),
            mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
            mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        ):
            stack.enter_context(patch)
        stack.enter_context(compile_for(90))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        stack.enter_context(counted)
        yield counted


def to_device(model: torch.nn.Module) -> torch.nn.Module:
    """The fake `model` on the device. Module.to would swap tensors, to which fake tensors hold references."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(p, device="cuda:0"))
    return model


def bert_base(rows: int = 32, length: int = 512) -> tuple[models.Bert, Micro]:
    tokens, predicted = rows * length, 2560
    model = to_device(models.Bert(models.BertConfig())).train()

    def ids(shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="cuda:0")

    inputs = {
        "input_ids": ids(tokens),
        "cu_seqlens": ids(8 * rows + 1, torch.int32),
        "max_seqlen": length,
        "positions": ids(tokens),
        "rng": ids(2),
        "index": ids(predicted),
        "targets": ids(predicted),
        "reduction": "sum",
    }
    return model, Micro(inputs, models.Counts(tokens, tokens * length, predicted))


class Replayed:
    """As CudaGraph, for a model whose steps have made what warming up makes. `capture` runs the function."""

    warm = staticmethod(lambda function: None)
    replay = staticmethod(lambda: None)

    def capture(self, function):
        self.counted.clear()
        return function()


def main() -> dict:
    """Of BERT-base in bfloat16: "step", with one micro-batch and the optimizer, "micro", its forward and backward, and
    "graph", the step with a graph, whose replay is not counted. Each has launches, calls, kinds, names, waits, host."""
    found, dtype = {}, torch.bfloat16

    def add(what):
        found[what] = {"launches": counted.total, "calls": counted.calls, "kinds": counted.kinds}
        found[what] |= {"names": counted.names, "waits": counted.waits, "host": counted.host}
        counted.clear()

    with device_step() as counted, mock.patch.object(graphs, "CudaGraph", Replayed):
        Replayed.counted = counted
        model, micro = bert_base()
        optimizer = make_optimizer(model, TrainTable(dtype="bfloat16"))
        arguments = {"lr": 1e-3, "grad_clip": 1.0, "dtype": dtype}
        train_step(model, optimizer, [micro], **arguments)  # the first makes AdamW's state and the copies of weights
        counted.clear()
        train_step(model, optimizer, [micro], **arguments)
        add("step")
        graph = graphs.StepGraph(model, dtype)
        graph.capture(micro)
        add("micro")
        train_step(model, optimizer, [micro], **arguments, graph=graph)
        add("graph")
    return found


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
