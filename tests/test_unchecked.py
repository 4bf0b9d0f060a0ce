"""Arguments that no device checks, since reading their values would stall: a wrong one gives NaN, never a number.

The kernels run on the PTX interpreter over CPU tensors, where the ops check the values; the checks are turned off here.
"""

import ptx
import pytest
import torch

from fastlm import ops
from fastlm.ops import _registry

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(_registry.column("attention", "triton"), "check_cu_seqlens", lambda args: None)


def packed(offsets, *, max_seqlen=8, dtype=torch.float32, **options):
    """(out, lse, dq, dk, dv) of 12 packed tokens, of the named backend "triton"."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, 2, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    cu = torch.tensor(offsets, dtype=torch.int32)
    with ptx.triton_on_ptx():
        out, lse = ops.attention(
            q, k, v, cu_seqlens_q=cu, max_seqlen_q=max_seqlen, return_lse=True, backend="triton", **options
        )
        gradients = torch.autograd.grad(out.square().sum() + lse.square().sum(), (q, k, v))
    return out, lse.t(), *gradients


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("offsets", "lost"), [([0, 5, 9], [9, 10, 11]), ([2, 5, 12], [0, 1])], ids=["tail", "head"])
def test_rows_of_no_sequence(offsets, lost, causal, unchecked):
    for name, tensor in zip(("out", "lse", "dq", "dk", "dv"), packed(offsets, causal=causal)):
        rows = tensor[lost].detach()
        assert bool((rows.isnan() | (rows == 0)).all()), name
        if name in ("out", "lse", "dk", "dv"):
            assert bool(rows.isnan().all()), name


def test_rows_of_a_sequence_keep_their_output(unchecked):
    """With a hole at the end, the output of the other rows is that of their sequences."""
    whole, tail = packed([0, 5, 9, 12]), packed([0, 5, 9])
    assert torch.equal(whole[0][:9], tail[0][:9])
    assert torch.equal(whole[1][:9], tail[1][:9])
    assert all(tensor.isfinite().all() for tensor in whole)


@pytest.mark.parametrize(("max_seqlen", "finite"), [(7, True), (6, False)])
def test_a_sequence_longer_than_max_seqlen(max_seqlen, finite, unchecked):
    """Only the gradient of the table depends on max_seqlen."""
    table = torch.linspace(-1, 1, 16).view(8, 2).requires_grad_()
    q = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    with ptx.triton_on_ptx():
        bias = ops.RelativeBias(table, max_distance=9)
        out = ops.attention(q, q, q, cu_seqlens_q=cu, max_seqlen_q=max_seqlen, relative_bias=bias, backend="triton")
        (dtable,) = torch.autograd.grad(out.square().sum(), table)
    assert out.isfinite().all()
    assert bool(dtable.isfinite().all()) == finite
    assert bool(dtable.isnan().all()) != finite


@pytest.mark.parametrize("weight", [None, torch.linspace(0.5, 1.5, 16)], ids=["sum", "norm"])
@pytest.mark.parametrize("name", ["input_ids", "positions", "token_type_ids"])
@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_ids_outside_their_table(name, bad, weight):
    tables = [torch.randn(7, 16, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    ids = {key: torch.tensor([[0, 3, 6], [1, 2, 4]]) for key in ("input_ids", "positions", "token_type_ids")}
    with ptx.triton_on_ptx():
        want = ops.embedding(
            word=tables[0], position=tables[1], token_type=tables[2], weight=weight, **ids, backend="triton"
        )
        ids[name][1, 0] = bad
        got = ops.embedding(
            word=tables[0], position=tables[1], token_type=tables[2], weight=weight, **ids, backend="triton"
        )
        loss = got.square().sum()
        gradients = torch.autograd.grad(loss, tables)
    here = torch.zeros(2, 3, dtype=torch.bool)
    here[1, 0] = True
    assert got[here].isnan().all()
    assert torch.equal(got[~here], want[~here])
    assert loss.isnan()
    for key, table, gradient in zip(("input_ids", "positions", "token_type_ids"), tables, gradients):
        touched = gradient.new_zeros(7, dtype=torch.bool)
        inside = ids[key][here]
        touched[inside[(inside >= 0) & (inside < 7)]] = True
        assert gradient[touched].isnan().all(), key
        assert gradient[~touched].isfinite().all(), key
        assert table.shape == gradient.shape
