"""On a device an error comes before any launch: the bad input of every OpCase, and a count of its launches."""

from contextlib import contextmanager

import ptx
import pytest

from fastlm import _native, ops
from fastlm.ops import _registry
from fastlm.testing.cases import CASES

BAD = [
    pytest.param(case, backend, {**case.accepted, **wrong}, message, id=f"{backend}-{op}-{next(iter(wrong))}-{k}")
    for op, case in CASES.items()
    for backend in ("triton", "cuda")
    if backend in _registry.backends(op)
    for k, (wrong, message) in enumerate(case.refused)
]


@contextmanager
def launches(backend):
    """A function that says what was launched so far, while the backend takes CPU tensors."""
    if backend == "triton":
        with ptx.triton_on_ptx() as launched:
            yield launched.kernels
        return
    if _native.cuda() is None:
        pytest.skip("fastlm._cuda is not built")
    launched = []
    _native.record_cuda(lambda entry, *_: launched.append(entry))
    try:
        yield lambda: launched
    finally:
        _native.record_cuda(None)


@pytest.mark.parametrize(("case", "backend", "arguments", "message"), BAD)
def test_an_error_comes_before_any_launch(case, backend, arguments, message):
    with launches(backend) as launched:
        with pytest.raises(ValueError) as error:
            getattr(ops, case.op)(**arguments, backend=backend)
        assert str(error.value).startswith(message)
        assert not launched()


def test_triton_has_no_sparse_gradient():
    with launches("triton") as launched:
        with pytest.raises(ValueError, match="sparse: expected False for backend triton, whose gradients are dense"):
            ops.embedding(**CASES["embedding"].accepted, sparse=True, backend="triton")
        assert not launched()


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_arguments_are_good_but_for_that(op, backend):
    """What is counted above would be seen: the same call without the fault launches."""
    assert CASES[op].refused, f"{op}: its OpCase has no bad input"
    if backend not in _registry.backends(op):
        pytest.skip(f"{op} has no backend {backend}")
    with launches(backend) as launched:
        getattr(ops, op)(**CASES[op].accepted, backend=backend)
        assert launched()
