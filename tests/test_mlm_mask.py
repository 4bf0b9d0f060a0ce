"""mlm_mask: bit for bit against NumPy code written from the definition token by token; arguments and errors."""

import math

import numpy as np
import numpy_philox
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.ops import mlm_mask
from fastlm.ops.mlm_mask import default_capacity

BACKENDS = ("cpu", "reference")
BERT = {"mask_token_id": 4, "vocab_size": 97, "special_ids": (0, 1, 2, 3), "seed": 7}


def numpy_mask(
    ids,
    *,
    mask_token_id,
    vocab_size,
    special_ids,
    seed,
    epoch=0,
    sample_ids=None,
    positions=None,
    special_tokens_mask=None,
    mlm_probability=0.15,
    mask_replace_prob=0.8,
    random_replace_prob=0.1,
    word_starts=None,
    capacity=None,
):
    """The five outputs for ids of (B, S) or (T,), as lists of Python integers."""
    shape = ids.shape
    rows = shape if ids.ndim == 2 else (1, *shape)

    def per_token(value, default):
        value = default if value is None else np.asarray(value)
        if value.ndim == 1 and ids.ndim == 2:
            value = value[:, None]
        return np.broadcast_to(value.reshape(rows) if value.shape == shape else value, rows)

    sample = per_token(sample_ids, np.arange(rows[0])[:, None])
    position = per_token(positions, np.arange(rows[1])[None])
    epoch = per_token(epoch, None)
    counter = position, epoch, sample, sample >> 32
    r0, r1, r2, _ = numpy_philox.words(counter, numpy_philox.domain_key(seed, 0x4B53414D))
    ids = ids.reshape(rows)
    pool = [i for i in range(vocab_size) if i != mask_token_id and i not in set(special_ids)]
    select_below = math.floor(mlm_probability * 2**32)
    mask_below = math.floor(mask_replace_prob * 2**32)
    replace_below = math.floor((mask_replace_prob + random_replace_prob) * 2**32)
    special = np.isin(ids, list(special_ids))
    if special_tokens_mask is not None:
        special = np.asarray(special_tokens_mask).reshape(rows)

    out, labels, index, targets = ids.copy(), np.full(rows, -100), [], []
    for b in range(rows[0]):
        word = 0
        for s in range(rows[1]):
            first = s == 0 or (sample[b, s], epoch[b, s]) != (sample[b, s - 1], epoch[b, s - 1])
            if word_starts is None or first or special[b, s - 1] or np.asarray(word_starts).reshape(rows)[b, s]:
                word = int(r0[b, s])
            if special[b, s] or word >= select_below:
                continue
            labels[b, s] = ids[b, s]
            index.append(b * rows[1] + s)
            targets.append(int(ids[b, s]))
            if int(r1[b, s]) < mask_below:
                out[b, s] = mask_token_id
            elif int(r1[b, s]) < replace_below:
                out[b, s] = pool[int(r2[b, s]) * len(pool) >> 32]
    count = len(index)
    if capacity is None:
        p, tokens = mlm_probability, ids.size
        capacity = min(tokens, math.ceil((p * tokens + 6 * math.sqrt(tokens * p * (1 - p))) / 128) * 128)
        capacity = tokens if word_starts is not None else capacity
    index, targets = ((values + [fill] * capacity)[:capacity] for values, fill in ((index, 0), (targets, -100)))
    return out.ravel().tolist(), labels.ravel().tolist(), index, targets, [count]


def assert_equals_numpy(ids, **arguments):
    want = numpy_mask(ids.numpy(), **arguments)
    for backend in BACKENDS:
        got = mlm_mask(ids, **arguments, backend=backend)
        for name, tensor, values in zip(got._fields, got, want):
            assert tensor.dtype == torch.int64
            assert tensor.flatten().tolist() == values, f"{backend}: {name}"
        assert got.input_ids.shape == got.labels.shape == ids.shape
        assert got.count.shape == ()


def draw(seed, rows, cols, vocab=97, low=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, vocab, (rows, cols), generator=generator), generator


@pytest.mark.parametrize("seed", [0, 7, -1, 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("epoch", [0, 2**32 - 1])
def test_seed_and_epoch(seed, epoch):
    ids, _ = draw(0, 6, 50)
    assert_equals_numpy(ids, **{**BERT, "seed": seed}, epoch=epoch, mlm_probability=0.5)


@pytest.mark.parametrize("select", [0.0, 0.15, 1.0])
@pytest.mark.parametrize(("mask", "random"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.8, 0.2), (0.3, 0.3)])
def test_probabilities(select, mask, random):
    ids, _ = draw(1, 4, 70)
    probabilities = {"mlm_probability": select, "mask_replace_prob": mask, "random_replace_prob": random}
    assert_equals_numpy(ids, **BERT, **probabilities)
    out = mlm_mask(ids, **BERT, **probabilities)
    special = torch.isin(ids, torch.tensor(BERT["special_ids"]))
    if select == 0.0:
        assert out.count == 0
        assert torch.equal(out.input_ids, ids)
        assert out.index.numel() == 0
    if select == 1.0:
        assert torch.equal(out.labels, torch.where(special, -100, ids))
    if mask == 1.0:
        assert torch.equal(out.input_ids, torch.where(out.labels != -100, 4, ids))


@pytest.mark.parametrize("form", ["row", "token"])
def test_samples_positions_epochs(form):
    """One number per row or per token, each of any integer type and any strides."""
    ids, generator = draw(2, 5, 40)
    shape = (5,) if form == "row" else (5, 40)
    sample_ids = torch.randint(2**63 - 1, shape, generator=generator)
    epoch = torch.randint(2**31, shape, generator=generator)
    positions = torch.randint(2**31, (40, 5), generator=generator).T
    assert_equals_numpy(ids, **BERT, sample_ids=sample_ids, epoch=epoch, positions=positions, mlm_probability=0.4)
    want = mlm_mask(ids, **BERT, sample_ids=sample_ids, epoch=epoch, positions=positions)
    got = mlm_mask(ids.int(), **BERT, sample_ids=sample_ids, epoch=epoch.int(), positions=positions.int())
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize(
    "special_ids",
    [(), (96, 3, 3, 0, 17), (5,), tuple(range(0, 97, 2)), [*range(4), *range(5, 96)], np.array([9, 2]), {8, 1}],
)
def test_special_ids(special_ids):
    """Any order, repeats, none, next to each other, all but one; the random id is drawn from what is left."""
    ids, _ = draw(3, 6, 60)
    arguments = {**BERT, "special_ids": special_ids, "mlm_probability": 0.6, "random_replace_prob": 0.7}
    arguments["mask_replace_prob"] = 0.2
    assert_equals_numpy(ids, **arguments)
    special_mask = torch.rand(6, 60) < 0.3
    assert_equals_numpy(ids, **arguments, special_tokens_mask=special_mask)


def test_whole_words():
    """Rows longer than a block of the C++ kernel, so that words and samples cross from one block to the next."""
    ids, generator = draw(4, 3, 3001)
    starts = torch.rand(3, 3001, generator=generator) < 0.3
    sample_ids = (torch.rand(3, 3001, generator=generator) < 0.01).cumsum(-1)
    epoch = (torch.rand(3, 3001, generator=generator) < 0.01).cumsum(-1)
    for word_starts in (starts, torch.zeros_like(starts), torch.ones_like(starts)):
        arguments = {**BERT, "word_starts": word_starts, "epoch": epoch, "sample_ids": sample_ids}
        assert_equals_numpy(ids, **arguments)
        flat = {name: v.flatten() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
        flat["positions"] = torch.arange(3 * 3001)
        assert_equals_numpy(ids.flatten(), **flat)
    long = torch.full((9000,), 50)  # one word over three blocks
    out = mlm_mask(long, **BERT, word_starts=torch.zeros(9000, dtype=torch.bool), mlm_probability=0.5)
    assert out.count in (0, 9000)
    assert_equals_numpy(long, **BERT, word_starts=torch.zeros(9000, dtype=torch.bool), mlm_probability=0.5)


def test_a_special_token_ends_a_word():
    ids = torch.tensor([[1, 10, 11, 2, 12, 13, 2]])  # the word of 10 and 11; then, though not said, one of 12 and 13
    starts = torch.tensor([[False, True, False, False, False, False, False]])
    seen = set()
    for seed in range(60):
        selected = mlm_mask(ids, **{**BERT, "seed": seed}, word_starts=starts, mlm_probability=0.5).labels[0] != -100
        assert not selected[[0, 3, 6]].any()
        assert selected[1] == selected[2]
        assert selected[4] == selected[5]
        seen.add((selected[1].item(), selected[4].item()))
    assert len(seen) == 4


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_batch_split(data):
    """A token's mask depends on (seed, epoch, sample, position) alone: any grouping of the samples gives the same."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    seed = data.draw(st.integers(-(2**63), 2**64 - 1))
    ids, generator = draw(data.draw(st.integers(0, 100)), 1, sum(lengths))
    starts = torch.rand(sum(lengths), generator=generator) < 0.5
    pieces = [
        {
            "input_ids": ids[0, end - n : end],
            "sample_ids": torch.full((n,), 2**24 * (k + 1) + 1),
            "positions": torch.arange(n),
            "epoch": torch.full((n,), k % 3),
            "word_starts": starts[end - n : end],
        }
        for k, (n, end) in enumerate(zip(lengths, np.cumsum(lengths).tolist()))
    ]
    arguments = {**BERT, "seed": seed, "mlm_probability": 0.4}
    for words in (False, True):
        backend = data.draw(st.sampled_from(BACKENDS))
        order = data.draw(st.permutations(range(len(pieces))))
        cut = data.draw(st.integers(0, len(pieces)))
        alone = [mlm_mask(**{k: v for k, v in p.items() if words or k != "word_starts"}, **arguments) for p in pieces]
        for batch in (order[:cut], order[cut:]):
            if not batch:
                continue
            joined = {name: torch.cat([pieces[k][name] for k in batch]) for name in pieces[0]}
            if not words:
                del joined["word_starts"]
            out = mlm_mask(**joined, **arguments, backend=backend)
            assert torch.equal(out.input_ids, torch.cat([alone[k].input_ids for k in batch]))
            assert torch.equal(out.labels, torch.cat([alone[k].labels for k in batch]))
            assert out.count == sum(alone[k].count for k in batch)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 5), cols=st.integers(0, 90), p=st.floats(0, 1), capacity=st.integers(0, 400))
def test_capacity(rows, cols, p, capacity):
    """index and targets are the first selected tokens; nothing else depends on the capacity."""
    ids, _ = draw(5, rows, cols)
    assert_equals_numpy(ids, **BERT, mlm_probability=p, capacity=capacity)
    for backend in BACKENDS:
        out = mlm_mask(ids, **BERT, mlm_probability=p, capacity=capacity, backend=backend)
        full = mlm_mask(ids, **BERT, mlm_probability=p, backend=backend)
        assert torch.equal(out.labels, full.labels)
        assert torch.equal(out.input_ids, full.input_ids)
        assert out.count == full.count == (full.labels != -100).sum()
        n = min(capacity, int(out.count))
        assert torch.equal(out.targets[:n], out.labels.flatten()[out.index[:n]])
        assert (out.index[n:] == 0).all()
        assert (out.targets[n:] == -100).all()


def test_default_capacity():
    assert default_capacity(131072, 0.15) == 20480  # 19660.8 + 6·129.3 = 20436.5
    assert [default_capacity(t, 0.15) for t in (0, 100, 200, 10_000)] == [0, 100, 128, 1792]
    assert default_capacity(1000, 1.0) == default_capacity(1000, 0.0, whole_words=True) == 1000


def test_rates():
    """Each rate within five standard deviations over a million tokens; random ids uniform over what is left."""
    ids = torch.full((1000, 1000), 50)
    out = mlm_mask(ids, **BERT)
    selected = out.labels != -100
    masked = (out.input_ids == 4) & selected
    replaced = (out.input_ids != 50) & (out.input_ids != 4)
    count = int(out.count)
    pool = 97 - 5

    def within(n, p, trials):
        assert abs(n - p * trials) < 5 * math.sqrt(trials * p * (1 - p))

    within(count, 0.15, 10**6)
    within(int(masked.sum()), 0.8, count)
    within(int(replaced.sum()), 0.1 * (1 - 1 / pool), count)  # a random id is 50 itself now and then
    histogram = torch.bincount(out.input_ids[replaced], minlength=97)
    assert not histogram[:5].any()
    expected = 0.1 * count / pool
    chi_square = float(((histogram[5:].double() - expected).square() / expected)[torch.arange(5, 97) != 50].sum())
    assert chi_square < 91 + 5 * math.sqrt(2 * 91)
    other = mlm_mask(ids, **BERT, epoch=1).labels != -100
    within(int((selected & other).sum()), 0.15**2, 10**6)  # another epoch is another mask


IDS = torch.full((2, 8), 50)
T, F = torch.ones(2, 8, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
BAD = [
    ({"input_ids": [1, 2]}, "input_ids: expected a tensor, got list"),
    ({"input_ids": IDS.float()}, "input_ids: expected torch.int64 or torch.int32, got torch.float32"),
    ({"input_ids": IDS[None]}, r"input_ids: .*got shape \(1, 2, 8\)"),
    ({"input_ids": IDS + 47}, r"input_ids: .*vocab_size = 97.*97"),
    ({"input_ids": IDS - 51}, r"input_ids: .*vocab_size = 97.*-1"),
    ({"mask_token_id": 97}, r"mask_token_id: .*\[0, 97\), got 97"),
    ({"mask_token_id": None}, "mask_token_id: .*got None"),
    ({"vocab_size": 0}, "vocab_size: .*got 0"),
    ({"vocab_size": 2**31}, "vocab_size: .*got 2147483648"),
    ({"special_ids": (0, 97, -1)}, r"special_ids: .*\[-1, 97\].*len\(tokenizer\)"),
    ({"special_ids": range(97)}, "special_ids: all 97 ids"),
    ({"seed": 2**64}, "seed: "),
    ({"seed": 0.5}, "seed: expected an integer"),
    ({"epoch": -1}, "epoch: .*got -1"),
    ({"epoch": torch.zeros(8, dtype=torch.int64)}, r"epoch: expected shape \(2, 8\).* or \(2,\).*got \(8,\)"),
    ({"epoch": torch.zeros(2)}, "epoch: expected torch.int64 or torch.int32"),
    ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, r"sample_ids: expected shape .*got \(3,\)"),
    ({"sample_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, "sample_ids: expected on cpu.*got meta"),
    ({"positions": torch.zeros(2, dtype=torch.int64)}, r"positions: expected shape \(2, 8\).*got \(2,\)"),
    ({"special_tokens_mask": T.int()}, "special_tokens_mask: expected torch.bool, got torch.int32"),
    ({"special_tokens_mask": F}, r"special_tokens_mask: expected shape \(2, 8\), got \(2, 4\)"),
    ({"word_starts": T.long()}, "word_starts: expected torch.bool"),
    ({"word_starts": F}, r"word_starts: expected shape \(2, 8\), got \(2, 4\)"),
    ({"mlm_probability": 1.5}, r"mlm_probability: expected a probability in \[0, 1\], got 1.5"),
    ({"mlm_probability": float("nan")}, "mlm_probability: .*nan"),
    ({"mask_replace_prob": -0.1}, "mask_replace_prob: .*-0.1"),
    ({"random_replace_prob": 0.3}, "mask_replace_prob, random_replace_prob: .*0.8 .*0.3"),
    ({"capacity": -1}, "capacity: .*got -1"),
    ({"backend": "cuda"}, 'backend="cuda" cannot run mlm_mask'),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[f"{next(iter(w))}-{k}" for k, (w, _) in enumerate(BAD)])
def test_bad_input(wrong, message, backend):
    with pytest.raises(ValueError, match=message):
        mlm_mask(**{"input_ids": IDS, **BERT, "backend": backend, **wrong})


def test_input_is_not_written_and_id_outside_is_found_in_any_block():
    ids, _ = draw(6, 40, 301)
    before = ids.clone()
    mlm_mask(ids, **BERT)
    assert torch.equal(ids, before)
    for position in (0, 4095, 4096, 12039):
        wrong = ids.clone()
        wrong.view(-1)[position] = 2**40 + 50
        with pytest.raises(ValueError, match=f"got {2**40 + 50} at position {position}"):
            mlm_mask(wrong, **BERT, backend="cpu")
