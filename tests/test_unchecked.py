"""Arguments that no device checks, since reading their values would stall: a wrong one gives NaN, never a number.

The kernels run on the PTX interpreter over CPU tensors, where the ops check the values; the checks are turned off here.
"""

import ptx
import pytest
import torch
from attention_checks import WRONG, judge_wrong_offsets

import fastlm.nn as nn
from fastlm import ops
from fastlm.models._inputs import Sequences
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


@pytest.mark.parametrize(
    ("offsets", "max_seqlen", "lost"),
    [([0, 5, 9], 5, [9, 10, 11]), ([2, 5, 12], 7, [0, 1]), ([0, 5, 12], 6, list(range(5, 12))), ([0, 5, 12], 7, [])],
    ids=["tail", "head", "longer", "right"],
)
def test_the_reference_of_packed_rows(offsets, max_seqlen, lost):
    """As on a device: the public function checks on the CPU."""
    q, k, v = (torch.randn(12, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    cu = torch.tensor(offsets, dtype=torch.int32)
    out, lse = ops.attention_reference(q, k, v, cu_seqlens_q=cu, max_seqlen_q=max_seqlen)
    gradients = torch.autograd.grad(out.square().nansum(), (q, k, v))
    missing = torch.zeros(12, dtype=torch.bool)
    missing[lost] = True
    for tensor in (out, lse.t()):
        assert tensor[missing].isnan().all()
        assert tensor[~missing].isfinite().all()
    for gradient in gradients:
        rows = gradient[missing]
        assert bool((rows.isnan() | (rows == 0)).all())


@pytest.mark.parametrize(("offsets_q", "offsets_k"), WRONG.values(), ids=WRONG)
def test_the_reference_of_wrong_offsets(offsets_q, offsets_k):
    """Nothing is indexed outside the tensors, which would be an error; on a GPU, one that ends the process."""
    q, k, v = (torch.randn(12, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (offsets_q, offsets_k or offsets_q))
    out, lse = ops.attention_reference(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=12, max_seqlen_k=12)
    gradients = torch.autograd.grad(out.square().sum() + lse.exp().sum(), (q, k, v))
    judge_wrong_offsets(offsets_q, offsets_k or offsets_q, 12, 12, out, lse, *gradients)


@pytest.mark.parametrize("offsets", [pair[0] for pair in WRONG.values()], ids=WRONG)
def test_a_model_indexes_nothing_outside(offsets):
    """What models compute from cu_seqlens; their attention then gives NaN."""
    ids = torch.arange(12)
    packed = Sequences(ids, torch.tensor(offsets, dtype=torch.int32), 12, None)
    assert packed.positions().min() >= 0
    assert ids[packed.first()].shape == (len(offsets) - 1,)
    assert packed.next_tokens(ids).shape == packed.shift_right(ids, 0, 0).shape == ids.shape
    assert packed.padded(ids, 0).shape == (len(offsets) - 1, 12)


def test_wrong_offsets_in_a_compiled_call():
    """Compiled code cannot raise for a value."""
    q = torch.randn(12, 2, 4, requires_grad=True)

    @torch.compile(backend="eager", fullgraph=True)
    def attend(cu):
        return ops.attention(q, q, q, cu_seqlens_q=cu, max_seqlen_q=12, return_lse=True, backend="reference")

    assert all(x.isfinite().all() for x in attend(torch.tensor([0, 5, 9, 12], dtype=torch.int32)))
    for offsets in ([0, 9, 5, 12], [0, 5, 30, 12], [-3, 5, 9, 12]):
        out, lse = attend(torch.tensor(offsets, dtype=torch.int32))
        (dq,) = torch.autograd.grad(out.square().sum(), q)
        assert out.isnan().all()
        assert lse.isnan().all()
        assert bool((dq.isnan() | (dq == 0)).all())


def test_other_values_of_a_padding_mask():
    """A compiled call cannot raise either: the sequence with such a mask is NaN, the other is not."""
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    compiled = torch.compile(
        lambda x, mask: attention(x, x, x, mask, need_weights=False)[0], backend="eager", fullgraph=True
    )
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5)
    mask[:, 4] = -torch.inf
    assert torch.equal(compiled(x, mask), attention(x, x, x, mask, need_weights=False)[0])
    mask[1, 2] = 0.5
    y = compiled(x, mask)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
