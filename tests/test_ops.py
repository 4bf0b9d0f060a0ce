"""Every op, through its OpCase: fastlm/testing/cases.py. Nothing here knows a particular op."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.ops import _registry
from fastlm.testing.cases import CASES
from fastlm.testing.compare import Comparison

SEEDS = range(5)
EVERY = [pytest.param(case, variant, id=f"{case.op}-{variant}") for case in CASES.values() for variant in case.tests]
GRADCHECK = [
    pytest.param(case, variant, id=f"{case.op}-{variant}") for case in CASES.values() for variant in case.gradcheck
]


def backends(case, device, dtype, inputs, variant):
    """The backends of the case that can run here; at least one, or there would be nothing to test."""
    x = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    names = []
    for backend in case.backends:
        try:
            _registry.choose(case.op, backend, x)
        except ValueError:
            continue
        names.append(backend)
    assert names, f"no backend of {case.op} runs on {device} in {dtype}"
    return names


def name_outputs(outputs):
    return {f"output {i}": out for i, out in enumerate(outputs) if isinstance(out, torch.Tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_error_bound(case, variant, dtype, device):
    """Forward and every gradient within the bound of fastlm/testing/compare.py; integers equal the reference."""
    if dtype not in case.dtypes and not (dtype == torch.float16 and device == "cuda"):
        pytest.skip(f"{case.op} is tested in {case.dtypes} on {device}")
    comparisons = {}
    for seed in SEEDS:
        inputs = case.inputs(variant, seed, dtype, device)
        exact_inputs = case.exact(inputs)
        exact = case.run(case.reference, variant, exact_inputs)
        exact_grads = case.run_backward(exact_inputs, exact, seed)
        eager_inputs = case.inputs(variant, seed, dtype, device)
        eager = case.run(case.reference, variant, eager_inputs)
        eager_grads = case.run_backward(eager_inputs, eager, seed)
        for backend in backends(case, device, dtype, inputs, variant):
            inputs = case.inputs(variant, seed, dtype, device)
            outputs = case.run(case.function, variant, inputs, backend=backend)
            grads = case.run_backward(inputs, outputs, seed)
            assert grads.keys() == exact_grads.keys()
            comparison = comparisons.setdefault(backend, Comparison())
            for name, ours in {**name_outputs(outputs), **{f"d{n}": g for n, g in grads.items()}}.items():
                one = {**name_outputs(eager), **{f"d{n}": g for n, g in eager_grads.items()}}[name]
                truth = {**name_outputs(exact), **{f"d{n}": g for n, g in exact_grads.items()}}[name]
                if ours.dtype.is_floating_point:
                    comparison.add(name, ours, one, truth)
                else:
                    assert torch.equal(ours, one), f"{backend}: {name} differs from the reference"
            for name, grad in grads.items():
                assert grad.dtype == inputs[name].dtype, f"{backend}: gradient of {name} is {grad.dtype}"
    for backend, comparison in comparisons.items():
        assert not comparison.failures(), f"{backend}: " + "; ".join(comparison.failures())


@pytest.mark.parametrize(("case", "variant"), GRADCHECK)
def test_reference_gradcheck(case, variant):
    """The reference's own gradients, in float64, against finite differences."""
    inputs = case.exact(case.inputs(variant, 0, torch.float32))
    names = [name for name in case.gradients if inputs.get(name) is not None]

    def function(*tensors):
        out = case.run(case.reference, variant, {**inputs, **dict(zip(names, tensors))})
        return tuple(o for o in out if isinstance(o, torch.Tensor) and o.requires_grad)

    assert torch.autograd.gradcheck(function, tuple(inputs[name] for name in names), atol=1e-5, rtol=1e-4)


def strided(tensor, gap):
    """The same values as a view of a larger tensor: a gap after each row, or, without, swapped dims."""
    if gap:
        wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + gap)
        view = wide[..., : tensor.shape[-1]]
    else:
        view = tensor.new_zeros(*tensor.shape[:-2], *tensor.shape[:-3:-1]).transpose(-1, -2)
    return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def bits(case, variant, inputs, backend, seed):
    outputs = case.run(case.function, variant, inputs, backend=backend)
    return {**name_outputs(outputs), **case.run_backward(inputs, outputs, seed)}


def assert_same_bits(a, b, what):
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.allclose(a[name], b[name], rtol=0, atol=0, equal_nan=True)]
    assert not differing, f"{what}: {', '.join(differing)} differ"


@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_non_contiguous(case, variant, device):
    """Inputs with any strides give the bits of contiguous ones, and are not written."""
    for gap in (3, 0):
        inputs = case.inputs(variant, 0, torch.float32, device)
        for backend in backends(case, device, torch.float32, inputs, variant):
            if backend == "reference":
                continue  # torch's own functions, whose sums depend on the layout
            views = {
                name: strided(value, gap) if isinstance(value, torch.Tensor) and value.dim() >= 2 else value
                for name, value in inputs.items()
            }
            want = bits(case, variant, inputs, backend, 0)
            assert_same_bits(want, bits(case, variant, views, backend, 0), f"{backend}, gap {gap}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_deterministic(case, variant, dtype, device):
    """The same bits from run to run and, on the CPU, from any number of threads."""
    if dtype not in case.dtypes:
        pytest.skip(f"{case.op} is tested in {case.dtypes}")
    inputs = case.inputs(variant, 0, dtype, device)
    for backend in backends(case, device, dtype, inputs, variant):
        first = bits(case, variant, case.inputs(variant, 0, dtype, device), backend, 0)
        assert_same_bits(first, bits(case, variant, case.inputs(variant, 0, dtype, device), backend, 0), backend)
        if backend == "cpu" and case.thread_invariant:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                one = bits(case, variant, case.inputs(variant, 0, dtype, device), backend, 0)
            finally:
                torch.set_num_threads(threads)
            assert_same_bits(first, one, f"{backend}, one thread")


class RawCalls(TorchDispatchMode):
    """Records the calls of fastlm's raw ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastlm":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def detach(args):
    """The arguments as fresh leaves, so that opcheck may differentiate through them."""
    return tuple(
        a.detach().clone().requires_grad_(a.dtype.is_floating_point) if isinstance(a, torch.Tensor) else a for a in args
    )


@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_opcheck(case, variant, device):
    """Schema, fake implementation and autograd of every raw op that a call reaches, forward and backward."""
    inputs = case.inputs(variant, 0, torch.float32, device)
    for backend in backends(case, device, torch.float32, inputs, variant):
        with RawCalls() as raw:
            outputs = case.run(case.function, variant, inputs, backend=backend)
            case.run_backward(inputs, outputs, 0)
        for function, args in raw.calls:
            differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "AutogradCPU")
            arguments = (
                detach(args)
                if differentiable
                else tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            )
            torch.library.opcheck(function, arguments)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_compile(case, device):
    """torch.compile(fullgraph=True), forward and backward, gives eager's bits."""
    variant = case.gradcheck[0] if case.gradcheck else case.tests[0]
    inputs = case.inputs(variant, 0, torch.float32, device)
    for backend in backends(case, device, torch.float32, inputs, variant):
        if backend == "reference":
            continue  # Inductor compiles plain torch into other, equally good bits
        torch._dynamo.reset()
        compiled = torch.compile(case.function, fullgraph=True)
        want = bits(case, variant, inputs, backend, 0)
        outputs = case.run(compiled, variant, inputs, backend=backend)
        got = {**name_outputs(outputs), **case.run_backward(inputs, outputs, 0)}
        assert_same_bits(want, got, backend)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_cuda_graph(case, device):
    """The op can be captured in a CUDA graph, and replay gives the eager bits."""
    if device != "cuda":
        pytest.skip("needs --device cuda")
    variant = case.tests[0]
    inputs = case.inputs(variant, 0, torch.float32, device)
    for backend in backends(case, device, torch.float32, inputs, variant):
        want = case.run(case.function, variant, inputs, backend=backend)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            got = case.run(case.function, variant, inputs, backend=backend)
        graph.replay()
        assert_same_bits(name_outputs(want), name_outputs(got), backend)
