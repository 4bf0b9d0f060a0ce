"""What every op must hold on every backend, for an OpCase: used by the tests of each place where kernels run.

Each check takes a case, a variant, and a backend by its name, and raises AssertionError. `around` is a context for the
calls of the backend alone: an interpreter that takes the place of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.testing.cases import OpCase, Variant
from fastlm.testing.compare import Comparison

Around = Callable[[], AbstractContextManager]


def error_bound(
    case: OpCase,
    variant: Variant,
    dtype: torch.dtype,
    device: str,
    backends: Iterable[str],
    seeds: Iterable[int] = range(5),
    around: Around = nullcontext,
) -> None:
    """Outputs and gradients within the bound of compare.py, over seeds; integers equal the reference's.

    Several backends at once, since the references cost more than the kernels.
    """
    comparisons = {backend: Comparison() for backend in backends}
    for seed in seeds:
        exact = case.everything(case.reference, variant, case.exact(case.inputs(variant, seed, dtype, device)), seed)
        eager = case.everything(case.reference, variant, case.inputs(variant, seed, dtype, device), seed)
        for backend, comparison in comparisons.items():
            inputs = case.inputs(variant, seed, dtype, device)
            with around():
                ours = case.everything(case.function, variant, inputs, seed, backend=backend)
            assert ours.keys() == exact.keys(), f"{backend}: {ours.keys() ^ exact.keys()} in one of the two only"
            for name, value in ours.items():
                if not value.dtype.is_floating_point:
                    assert torch.equal(value, eager[name]), f"{backend}: {name} differs from the reference"
                    continue
                comparison.add(name, value, eager[name], exact[name])
                if name.startswith("d "):
                    assert value.dtype == inputs[name[2:]].dtype, f"{backend}: gradient {name} is {value.dtype}"
    for backend, comparison in comparisons.items():
        assert not comparison.failures(), f"{backend}: " + "; ".join(comparison.failures())


def _bits(case, variant, inputs, backend, function=None):
    return case.everything(function or case.function, variant, inputs, 0, backend=backend)


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], what: str) -> None:
    """Two sets of named tensors, equal to the bit; NaN equals NaN."""
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.allclose(a[name], b[name], rtol=0, atol=0, equal_nan=True)]
    assert not differing, f"{what}: {', '.join(differing)} differ"


def _strided(tensor, gap):
    """The same values as a view of a larger tensor: a gap after each row, or, without, swapped dims."""
    if gap:
        wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + gap)
        view = wide[..., : tensor.shape[-1]]
    else:
        view = tensor.new_zeros(*tensor.shape[:-2], *tensor.shape[:-3:-1]).transpose(-1, -2)
    return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def non_contiguous(case: OpCase, variant: Variant, dtype: torch.dtype, device: str, backend: str, around=nullcontext):
    """Inputs with any strides give the bits of contiguous ones."""
    inputs = case.inputs(variant, 0, dtype, device)
    with around():
        want = _bits(case, variant, inputs, backend)
    for gap in (3, 0):
        views = {
            name: _strided(value, gap) if isinstance(value, torch.Tensor) and value.dim() >= 2 else value
            for name, value in inputs.items()
        }
        with around():
            assert_same_bits(want, _bits(case, variant, views, backend), f"{backend}, gap {gap}")


def deterministic(case: OpCase, variant: Variant, dtype: torch.dtype, device: str, backend: str, around=nullcontext):
    """The same bits from run to run and, on the CPU, from any number of threads."""
    with around():
        first = _bits(case, variant, case.inputs(variant, 0, dtype, device), backend)
        assert_same_bits(first, _bits(case, variant, case.inputs(variant, 0, dtype, device), backend), backend)
    if backend == "cpu" and case.thread_invariant:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            one = _bits(case, variant, case.inputs(variant, 0, dtype, device), backend)
        finally:
            torch.set_num_threads(threads)
        assert_same_bits(first, one, f"{backend}, one thread")


class _RawCalls(TorchDispatchMode):
    """Records the calls of fastlm's raw ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastlm":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def _leaves(args, differentiable):
    """The tensors of `args` as fresh ones, so that opcheck may differentiate through them."""
    return tuple(
        a.detach().clone().requires_grad_(differentiable and a.dtype.is_floating_point)
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    )


def opcheck(case: OpCase, variant: Variant, dtype: torch.dtype, device: str, backend: str, around=nullcontext):
    """Schema, fake implementation and autograd of every raw op that a call reaches, forward and backward."""
    inputs = case.inputs(variant, 0, dtype, device)
    with around():
        with _RawCalls() as raw:
            _bits(case, variant, inputs, backend)
        for function, args in raw.calls:
            differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "AutogradCPU")
            torch.library.opcheck(function, _leaves(args, differentiable))


def second_derivative_is_refused(case: OpCase, backend: str, device: str = "cpu"):
    """A gradient with a graph of its own raises an error that names the remedy, and is not silently a constant."""
    inputs = case.inputs(case.tests[0], 0, torch.float32, device)
    outputs = case.run(case.function, case.tests[0], inputs, backend=backend)
    total = sum(out.float().square().sum() for out in outputs if out.requires_grad)
    leaves = [inputs[name] for name in case.gradients if inputs.get(name) is not None]
    try:
        torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    except NotImplementedError as error:
        message = str(error)
    else:
        message = "no error"
    assert f"fastlm::{case.op}" in message or "fastlm::layer_norm" in message, message
    assert "no second derivative" in message, message
    assert 'backend="reference"' in message, message


def compiles(case: OpCase, variant: Variant, dtype: torch.dtype, device: str, backend: str, around=nullcontext):
    """torch.compile(fullgraph=True), forward and backward, gives eager's bits."""
    inputs = case.inputs(variant, 0, dtype, device)
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True)
    with around():
        want = _bits(case, variant, inputs, backend)
        assert_same_bits(want, _bits(case, variant, inputs, backend, compiled), backend)


def cuda_graph(case: OpCase, variant: Variant, dtype: torch.dtype, backend: str):
    """Forward and backward are captured in one CUDA graph, and its replay on other inputs gives eager's bits."""
    inputs = case.inputs(variant, 0, dtype, "cuda")
    given = [inputs[name] for name in case.gradients if inputs.get(name) is not None]
    leaves = [value for value in given if value.requires_grad]
    first = [out for out in case.run(case.function, variant, inputs, backend=backend) if out.requires_grad]
    cotangents = [torch.randn_like(out) for out in first]
    del first  # with it the leaves' ends of the graph, which belong to the stream that they were made on

    def call():
        outputs = case.run(case.function, variant, inputs, backend=backend)
        differentiable = [out for out in outputs if out.requires_grad]
        if not differentiable:
            return outputs
        gradients = torch.autograd.grad(differentiable, leaves, cotangents, allow_unused=True)
        return (*(out.detach() for out in outputs), *gradients)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and loaded before the capture
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for name, value in case.inputs(variant, 1, dtype, "cuda").items():
            if isinstance(value, torch.Tensor) and value.shape == inputs[name].shape:
                inputs[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    got = {str(i): out.clone() for i, out in enumerate(captured) if out is not None}
    assert_same_bits({str(i): out for i, out in enumerate(call()) if out is not None}, got, backend)
