"""csrc/common/fields.h: C++ functions with keyword arguments, their errors and references; and each field is bound."""

import gc
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm import _native, ops

CSRC = Path(__file__).parent.parent / "csrc"
built = pytest.mark.skipif(_native.missing_cpu() is not None, reason=str(_native.missing_cpu()))
GELU = {"x": None, "bias": None, "gate": None, "y": None, "rows": 1, "cols": 8, "stride_x": 8, "stride_gate": 0}
GELU |= {"tanh": False, "dtype": 0, "threads": 1}


def gelu(**changes):
    """Calls gelu_fwd of a row of 8. A name with the value `gelu` is left out."""
    x, y = torch.linspace(-2, 2, 8), torch.empty(8)
    given = {**GELU, "x": x, "y": y, **changes}
    _native.cpu().gelu_fwd(**{name: value for name, value in given.items() if value is not gelu})
    return y


WRONG = {
    "missing cols, tanh": {"cols": gelu, "tanh": gelu},
    "no argument columns": {"cols": gelu, "columns": 8},
    "no argument col\ud800": {"col\ud800": 8},
    "rows: 'float' object cannot be interpreted as an integer": {"rows": 1.0},
    "rows: 'NoneType' object cannot be interpreted as an integer": {"rows": None},
    "rows: int too big to convert": {"rows": 2**63},
    "threads: an integer is too large for its field": {"threads": 2**31},
    "tanh: expected a bool": {"tanh": 0},
    "x: 'float' object has no attribute 'data_ptr'": {"x": 1.0},
    "x: Python int too large to convert": {"x": 2**64},
}


@built
@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls(message):
    with pytest.raises((TypeError, OverflowError, AttributeError)) as error:
        gelu(**WRONG[message])
    assert str(error.value).startswith(f"gelu_fwd: {message}")


@built
def test_any_order_and_names_that_are_not_interned():
    want = gelu()
    torch.testing.assert_close(want, torch.nn.functional.gelu(torch.linspace(-2, 2, 8)))
    x, y = torch.linspace(-2, 2, 8), torch.empty(8)
    given = reversed(list({**GELU, "x": x, "y": y}.items()))
    _native.cpu().gelu_fwd(**{"".join(list(name)): value for name, value in given})
    assert torch.equal(y, want)
    with pytest.raises(TypeError, match="gelu_fwd: expected keyword arguments alone"):
        _native.cpu().gelu_fwd(x)


@built
def test_integers_of_numpy():
    """A signed field (rows) and an unsigned one (the site of dropout)."""
    assert torch.equal(gelu(rows=np.int64(1)), gelu())
    x, rng = torch.ones(4, 8), torch.tensor([1, 2])
    want = ops.dropout(x, 0.5, rng=rng, site=3, backend="cpu")
    assert torch.equal(ops.dropout(x, 0.5, rng=rng, site=np.int64(3), backend="cpu"), want)


@built
def test_booleans_of_numpy():
    """The ops make them Python's; a binding takes no other."""
    x, rng = torch.randn(4, 8), torch.tensor([1, 2])
    want = ops.dropout(x, 0.5, rng=rng, relu=True, backend="cpu")
    assert torch.equal(ops.dropout(x, 0.5, rng=rng, relu=np.bool_(True), backend="cpu"), want)
    q, table = torch.randn(1, 4, 2, 16), torch.randn(8, 2)
    out, same = (
        ops.attention(q, q, q, relative_bias=ops.RelativeBias(table, one_way, 16), backend="cpu")
        for one_way in (False, np.bool_(False))
    )
    assert torch.equal(out, same)


class Interrupted:
    """Its exception has no value in Python 3.11 before it is normalised."""

    def data_ptr(self):
        signal.raise_signal(signal.SIGINT)


@built
def test_other_exceptions_pass():
    with pytest.raises(KeyboardInterrupt, match=r"gelu_fwd: x: $"):
        gelu(x=Interrupted())


@built
def test_items_are_in_a_list_or_tuple():
    """The tensors of a generator would be freed before the kernel reads them."""
    x = torch.ones(4)
    assert _native.cpu().squared_norm(spans=[(x, 4, 0), (x, 4, 0)], threads=1) == 8.0
    with pytest.raises(TypeError, match=r"spans: expected a list or tuple"):
        _native.cpu().squared_norm(spans=((torch.ones(4), 4, 0) for _ in range(2)), threads=1)
    with pytest.raises(ValueError, match=r"spans: expected 3 items, got 1"):
        _native.cpu().squared_norm(spans=[(x,)], threads=1)


@built
@pytest.mark.parametrize("changes", [{}, {"cols": gelu}, {"tanh": 0}, {"more": 1}])
def test_no_reference_is_kept(changes):
    x, y = torch.linspace(-2, 2, 8), torch.empty(8)

    def call():
        try:
            gelu(x=x, y=y, **changes)
        except TypeError:
            assert changes

    call()
    gc.collect()
    before = [sys.getrefcount(value) for value in (x, y)]
    for _ in range(1000):
        call()
    gc.collect()
    assert [sys.getrefcount(value) for value in (x, y)] == before


# ---- the sources: a member without a FIELD would be 0 or null in every call


def members(struct: str) -> list[str]:
    """The names of a struct's data members. "set by" in a comment marks one that C++ sets."""
    lines = [line for line in struct.splitlines() if "set by" not in line and "{ return" not in line]
    declarations = re.sub(r"//.*", "", "\n".join(lines)).split(";")
    names = (name for declaration in declarations if declaration.strip() for name in declaration.split(","))
    return [re.search(r"(\w+)\s*(\[\w+\])?\s*(=.*)?$", name.strip()).group(1) for name in names]


@pytest.mark.parametrize("module", ["cpu", "cuda"])
def test_every_member_is_bound(module):
    headers = "".join(path.read_text() for path in sorted((CSRC / module).glob("*.h")))
    structs = dict(re.findall(r"^struct (\w+) \{\n(.*?)\n\};", headers, re.MULTILINE | re.DOTALL))
    bindings = "".join(path.read_text() for path in sorted((CSRC / f"bindings_{module}").iterdir()))
    fields = re.findall(rf"FASTLM_FIELDS\(fastlm::{module}::(\w+)\) \{{(.*?)\n\}}", bindings, re.DOTALL)
    tuples = re.findall(rf"FASTLM_TUPLE\(fastlm::{module}::(\w+),(.*?)\);", bindings, re.DOTALL)
    assert len(fields) > 5
    for name, body in fields:
        assert sorted(re.findall(r"FIELD\((\w+)\)", body)) == sorted(members(structs[name])), name
    for name, body in tuples:
        assert re.findall(r"(\w+)\s*(?:,|$)", body) == members(structs[name]), name
