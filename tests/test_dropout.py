"""Dropout of the row ops, forward and backward, bit for bit against NumPy code written from the definition."""

import numpy as np
import numpy_philox
import pytest
import torch

from fastlm import ops

BACKENDS = ("cpu", "reference")


def numpy_keep(rows, cols, p, seed, step, site):
    """True where an element of (rows, cols) stays."""
    step %= 2**64
    counter = step % 2**32, step >> 32, site, 0
    k0, k1, _, _ = numpy_philox.words(counter, numpy_philox.domain_key(seed, 0x504F5244))
    col, row = np.arange(cols)[None], np.arange(rows)[:, None]
    words = numpy_philox.words((col // 4, row, row >> 32, 0), (int(k0), int(k1)))
    return np.choose(col % 4, words) >= np.uint64(int(p * 2**32))


def layer_norm(rows, cols, norm=ops.layer_norm, **arguments):
    x = torch.ones(rows, cols, requires_grad=True)
    _, h = norm(x, residual=torch.zeros(rows, cols), return_residual=True, **arguments)
    return h, torch.autograd.grad(h, x, torch.ones_like(h))[0]


def rms_norm(rows, cols, **arguments):
    return layer_norm(rows, cols, norm=ops.rms_norm, **arguments)


def embedding(rows, cols, **arguments):
    word = torch.ones(rows, cols, requires_grad=True)
    y = ops.embedding(torch.arange(rows), word, **arguments)
    return y, torch.autograd.grad(y, word, torch.ones_like(y))[0]


def dropout(rows, cols, dropout_p, relu=False, **arguments):
    x = torch.ones(rows, cols, requires_grad=True)
    y = ops.dropout(x, dropout_p, relu=relu, **arguments)
    return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]


def relu_dropout(*arguments, **options):
    return dropout(*arguments, relu=True, **options)


OPS = {op.__name__: op for op in (layer_norm, rms_norm, embedding, dropout, relu_dropout)}
CALLS = [  # seed, step, site, p
    (0, 0, 0, 0.5),
    (-1, 2**32 + 1, 3, 0.1),
    (0x0123456789ABCDEF, -(2**63), 2**32 - 1, 0.9),
    (5, 7, 1, 1e-3),
    (5, 7, 1, 1.0),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("seed", "step", "site", "p"), CALLS)
def test_bits(op, backend, seed, step, site, p):
    """Widths on both sides of a word, of the vectors and of the 1024 columns that one pass of Philox covers."""
    rng = torch.tensor([seed, step])
    for rows, cols in ((3, 1), (5, 4), (67, 63), (2, 1024), (3, 1030), (2, 2600)):
        got, gradient = OPS[op](rows, cols, dropout_p=p, rng=rng, site=site, backend=backend)
        keep = numpy_keep(rows, cols, p, seed, step, site)
        scale = np.float32(1 / (1 - p)) if p < 1 else np.float32(0)
        want = np.where(keep, scale, np.float32(0))
        np.testing.assert_array_equal(got.detach().numpy(), want)
        np.testing.assert_array_equal(gradient.numpy(), want)
    assert rng.tolist() == [seed, step]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_no_dropout_and_no_rng(op, backend):
    """p = 0 changes nothing; without rng torch's generator decides, and its seed reproduces the call."""
    got, _ = OPS[op](4, 9, dropout_p=0.0, backend=backend)
    assert torch.equal(got, torch.ones(4, 9))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(OPS[op](50, 64, dropout_p=0.5, backend=backend)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_streams_steps_and_seeds_are_independent():
    """Two calls that differ in one of the three agree on half of the elements at p = 1/2, and each keeps half."""
    masks = [numpy_keep(200, 512, 0.5, *call) for call in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))]
    sigma = 0.5 / np.sqrt(masks[0].size)
    for i, a in enumerate(masks):
        assert abs(a.mean() - 0.5) < 5 * sigma
        for b in masks[:i]:
            assert abs((a == b).mean() - 0.5) < 5 * sigma


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dropout_p": 1.1}, "p: expected a probability"),
        ({"site": -1}, "site: expected an integer"),
        ({"rng": torch.zeros(3, dtype=torch.int64)}, r"rng: expected shape \(2,\), got \(3,\)"),
        ({"rng": torch.zeros(2)}, "rng: expected torch.int64"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_bad_input(op, wrong, message):
    with pytest.raises(ValueError, match=message):
        OPS[op](2, 3, **{"dropout_p": 0.5, **wrong})


def test_a_raw_op_takes_an_rng_with_any_stride():
    """The public functions make it contiguous; a raw op's caller need not."""
    x, wide = torch.ones(4, 9), torch.tensor([3, 99, 5, 99])
    want = torch.ops.fastlm.dropout_fwd(x, 0.5, torch.tensor([3, 5]), 1, False, "cpu")
    assert torch.equal(torch.ops.fastlm.dropout_fwd(x, 0.5, wide[::2], 1, False, "cpu"), want)
