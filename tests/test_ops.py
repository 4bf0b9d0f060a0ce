"""Every op, through its OpCase and fastlm/testing/checks.py. No op is named here."""

import pytest
import torch

from fastlm.ops import _registry
from fastlm.testing import checks
from fastlm.testing.cases import CASES

EVERY = [pytest.param(case, variant, id=f"{case.op}-{variant}") for case in CASES.values() for variant in case.tests]
GRADCHECK = [
    pytest.param(case, variant, id=f"{case.op}-{variant}") for case in CASES.values() for variant in case.gradcheck
]


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.op)
def test_kinds_miss_nothing(case):
    kinds = case.kinds()
    assert kinds[0] == case.tests[0]
    assert set().union(*(v.words() for v in kinds)) == set().union(*(v.words() for v in case.tests))


@pytest.fixture
def only(request):
    """The backend named on the command line, or None."""
    return request.config.getoption("--backend")


def backends(case, variant, dtype, device, only):
    """The backends of the case that can run here; at least one, or there would be nothing to test."""
    inputs = case.inputs(variant, 0, dtype, device)
    x = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    names = []
    for backend in case.backends if only is None else (only,):
        try:
            _registry.choose(case.op, backend, x)
        except ValueError as error:
            if only is not None:
                pytest.skip(str(error))
            continue
        names.append(backend)
    assert names, f"no backend of {case.op} runs on {device} in {dtype}"
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_error_bound(case, variant, dtype, device, only):
    """Forward and every gradient within the bound of fastlm/testing/compare.py; integers equal the reference."""
    if dtype not in case.dtypes and not (dtype == torch.float16 and device == "cuda"):
        pytest.skip(f"{case.op} is tested in {case.dtypes} on {device}")
    checks.error_bound(case, variant, dtype, device, backends(case, variant, dtype, device, only))


@pytest.mark.parametrize(("case", "variant"), GRADCHECK)
def test_reference_gradcheck(case, variant):
    """The reference's own gradients, in float64, against finite differences."""
    inputs = case.exact(case.inputs(variant, 0, torch.float32))
    names = [name for name in case.gradients if inputs.get(name) is not None]

    def function(*tensors):
        out = case.run(case.reference, variant, {**inputs, **dict(zip(names, tensors))})
        return tuple(o for o in out if isinstance(o, torch.Tensor) and o.requires_grad)

    assert torch.autograd.gradcheck(function, tuple(inputs[name] for name in names), atol=1e-5, rtol=1e-4)


def kernels(case, variant, dtype, device, only):
    """The backends with kernels of our own: the reference's bits are torch's, which strides and Inductor change."""
    return [name for name in backends(case, variant, dtype, device, only) if name != "reference"]


@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_non_contiguous(case, variant, device, only):
    for backend in kernels(case, variant, torch.float32, device, only):
        checks.non_contiguous(case, variant, torch.float32, device, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_deterministic(case, variant, dtype, device, only):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.op} is tested in {case.dtypes}")
    for backend in backends(case, variant, dtype, device, only):
        checks.deterministic(case, variant, dtype, device, backend)


@pytest.mark.parametrize(("case", "variant"), EVERY)
def test_opcheck(case, variant, device, only):
    for backend in backends(case, variant, torch.float32, device, only):
        checks.opcheck(case, variant, torch.float32, device, backend)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_compile(case, device, only):
    variant = case.gradcheck[0] if case.gradcheck else case.tests[0]
    for backend in kernels(case, variant, torch.float32, device, only):
        checks.compiles(case, variant, torch.float32, device, backend)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_cuda_graph(case, device, only):
    if device != "cuda":
        pytest.skip("needs --device cuda")
    for backend in kernels(case, case.tests[0], torch.float32, device, only):
        checks.cuda_graph(case, case.tests[0], torch.float32, backend)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.gradients])
def test_a_second_derivative_is_refused(case, device, only):
    for backend in kernels(case, case.tests[0], torch.float32, device, only):
        checks.second_derivative_is_refused(case, backend, device)
