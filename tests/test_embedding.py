"""embedding beyond its OpCase, which tests/test_ops.py tests."""

import pytest
import torch

from fastlm import ops
from fastlm.ops._cpu.embedding import _used_rows
from fastlm.ops.embedding import Lookup

BACKENDS = ("cpu", "reference")
IDS = torch.tensor([[3, 0, 3], [1, 4, 0]])


def tables(dtype=torch.float32, cols=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, cols, generator=generator).to(dtype).requires_grad_() for n in (5, 4, 2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_are_the_column_and_type_0(backend):
    word, position, token_type = tables()
    given = ops.embedding(
        IDS.int(),
        word,
        position,
        token_type,
        positions=torch.arange(3).expand(2, 3).int(),
        token_type_ids=torch.zeros(2, 3, dtype=torch.int32),
        backend=backend,
    )
    default = ops.embedding(IDS, word, position, token_type, backend=backend)
    assert torch.equal(given, default)
    assert torch.equal(default, word[IDS] + position[:3] + token_type[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [3, -2])
def test_padding_idx_gets_no_gradient(backend, padding_idx):
    word, _, _ = tables()
    y = ops.embedding(IDS, word, padding_idx=padding_idx, backend=backend)
    assert torch.equal(y, word[IDS])
    (gradient,) = torch.autograd.grad(y.sum(), word)
    assert gradient[:, 0].tolist() == [2, 1, 0, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [None, 3, -2])
def test_a_sparse_gradient_has_a_row_for_each_token(backend, padding_idx):
    word, _, _ = tables()
    given, dy = {"padding_idx": padding_idx, "backend": backend}, torch.randn(2, 3, 6)
    (rows,) = torch.autograd.grad(ops.embedding(IDS, word, sparse=True, **given), word, dy)
    (want,) = torch.autograd.grad(ops.embedding(IDS, word, **given), word, dy)
    assert rows.layout == torch.sparse_coo
    assert rows.shape == word.shape
    torch.testing.assert_close(rows.to_dense(), want)


@pytest.mark.parametrize("padding_idx", [None, 3, -47])
def test_a_16_bit_vocabulary_gets_the_float32_sum_rounded(padding_idx):
    """Its kernel sums the rows that tokens take alone: some tokens of many rows, or of few."""
    for rows, ids in ((50, IDS), (50, torch.zeros(4, 200, dtype=torch.long)), (1000, torch.arange(600).view(2, 300))):
        word = torch.randn(rows, 6).bfloat16().requires_grad_()
        exact = word.detach().float().requires_grad_()
        dy = torch.randn(*ids.shape, 6).bfloat16()
        given = {"padding_idx": padding_idx, "backend": "cpu"}
        (got,) = torch.autograd.grad(ops.embedding(ids, word, **given), word, dy)
        (want,) = torch.autograd.grad(ops.embedding(ids, exact, **given), exact, dy.float())
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=0.0)


@pytest.mark.parametrize(
    ("rows", "dtype", "summed"), [(901, "bfloat16", True), (900, "bfloat16", False), (901, "float32", False)]
)
def test_rows_in_use_are_summed_where_that_is_faster(rows, dtype, summed):
    word = torch.zeros(rows, 6, dtype=getattr(torch, dtype))
    assert (_used_rows(Lookup(torch.arange(600), word, None, None, None, None)) is not None) == summed


@pytest.mark.parametrize("sparse", [False, True])
def test_a_16_bit_vocabulary_and_ids_of_any_layout(sparse):
    """Strided rows; strided, int32 and no ids: the bits of the gradient of contiguous ones."""
    table = torch.randn(50, 13).bfloat16()[:, 2:8]
    for ids in (IDS.t(), IDS[:, ::2], IDS.int(), IDS[:, 1], IDS[:0]):
        found, dy = [], torch.randn(*ids.shape, 6).bfloat16()
        for word, input_ids in ((table, ids), (table.contiguous(), ids.long().contiguous())):
            word = word.detach().requires_grad_()
            y = ops.embedding(input_ids, word, padding_idx=3, sparse=sparse, backend="cpu")
            (gradient,) = torch.autograd.grad(y, word, dy)
            found.append(gradient.to_dense() if sparse else gradient)
        assert found[0].dtype == torch.bfloat16
        assert torch.equal(*found)


def test_a_frozen_table_gets_no_gradient():
    word, position, token_type = tables()
    word.requires_grad_(False)
    weight = torch.ones(6, requires_grad=True)
    y = ops.embedding(IDS, word, position, token_type, weight=weight, backend="cpu")
    y.square().sum().backward()
    assert word.grad is None
    assert position.grad is not None
    assert token_type.grad is not None
    assert weight.grad is not None


def test_long_sums_of_a_small_table():
    """A type that every token has: a sum over 20000 tokens errs by 1e-7 at most (added one by one: 5e-6)."""
    torch.manual_seed(0)
    word, _, token_type = tables(cols=20)
    ids = torch.randint(5, (40, 500))
    dy = torch.rand(40, 500, 20)
    y = ops.embedding(ids, word, None, token_type, backend="cpu")
    _, got = torch.autograd.grad(y, (word, token_type), dy)
    exact = dy.double().sum((0, 1))
    assert (got[0] / exact - 1).abs().max() < 1.2e-7
    assert not got[1].any()


def test_dtypes_promote():
    word, position, token_type = tables(torch.bfloat16)
    assert ops.embedding(IDS, word, position, token_type).dtype == torch.bfloat16
    y = ops.embedding(IDS, word, position.float(), token_type)
    assert y.dtype == torch.float32
    assert torch.autograd.grad(y.sum(), word)[0].dtype == torch.bfloat16


BAD = [
    ({"input_ids": IDS.float()}, "input_ids: expected torch.int64 or torch.int32, got torch.float32"),
    ({"input_ids": IDS[None]}, r"input_ids: .*got shape \(1, 2, 3\)"),
    ({"input_ids": IDS + 1}, r"input_ids: expected ids in \[0, rows of word = 5\), got 5"),
    ({"input_ids": IDS - 1}, "input_ids: .*got -1"),
    ({"word": torch.zeros(5, 6, dtype=torch.int64)}, "word: expected a floating-point tensor"),
    ({"word": torch.zeros(5)}, r"word: expected shape \(\*, \*\), got \(5,\)"),
    ({"word": torch.zeros(5, 0)}, "word: .*cols > 0"),
    ({"word": torch.zeros(5, 6, device="meta")}, "word: expected on cpu.*got meta"),
    ({"position": torch.zeros(4, 7)}, r"position: expected shape \(\*, 6\), got \(4, 7\)"),
    ({"position": torch.zeros(2, 6)}, "position: expected at least 3 rows .*got 2"),
    ({"position": None, "positions": IDS}, "positions: given without its table; give `position` too"),
    ({"positions": IDS[0]}, r"positions: expected shape \(2, 3\), got \(3,\)"),
    ({"positions": IDS}, r"positions: expected ids in \[0, rows of position = 4\), got 4"),
    ({"input_ids": IDS.flatten()}, "positions: expected like input_ids for packed tokens"),
    ({"token_type": torch.zeros(0, 6)}, "token_type: expected at least one row"),
    ({"token_type": None, "token_type_ids": IDS}, "token_type_ids: given without its table"),
    ({"token_type_ids": IDS}, r"token_type_ids: expected ids in \[0, rows of token_type = 2\), got 4"),
    ({"weight": torch.ones(5)}, r"weight: expected shape \(6,\), got \(5,\)"),
    ({"bias": torch.ones(6)}, "bias: given without a weight"),
    ({"padding_idx": 5}, "padding_idx: expected an id of the 5 rows of word, got 5"),
    ({"backend": "cuda"}, 'backend="cuda" cannot run embedding'),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[f"{next(iter(w))}-{k}" for k, (w, _) in enumerate(BAD)])
def test_bad_input(wrong, message, backend):
    word, position, token_type = tables()
    good = {"input_ids": IDS, "word": word, "position": position, "token_type": token_type, "backend": backend}
    with pytest.raises(ValueError, match=message):
        ops.embedding(**{**good, **wrong})
