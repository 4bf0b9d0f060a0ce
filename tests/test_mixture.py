"""Prepared datasets mixed by weight: within a row of the weights, each row once an epoch, resumed to the bit."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import corpus, small

from fastlm.data import Batches, Mixture, open_dataset, prepare
from fastlm.data.contents import counted
from fastlm.data.layouts import CausalRows, SpanRows
from fastlm.data.mixture import Joined, parse_weights, schedule
from fastlm.data.order import perm
from fastlm.data.packing import PADDING_SAMPLE
from fastlm.run.directory import prepare_for
from fastlm.run.metrics import read_metrics
from fastlm.run.recipe import Recipe, load_recipe
from fastlm.run.summary import summary_table
from fastlm.tasks import find_task
from fastlm.train import loop, pretrain
from fastlm.train.spikes import batch_rows

CPU = torch.device("cpu")
SIZES = {"a": 200, "b": 31, "c": 90}  # lines of each source


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Prepared sources a, b and c of one tokenizer."""
    out = tmp_path_factory.mktemp("sources")
    tokenizer = "train:200"
    for name, lines in SIZES.items():
        text = out / f"{name}.txt"
        text.write_text("\n".join(f"{name} says: {line}" for line in corpus(text, lines).read_text().splitlines()))
        prepare(text, tokenizer, out / name, row_tokens=32, documents="line", validation_share=0.1, shard_rows=40)
        tokenizer = out / "a" / "tokenizer"
    return out


def fake(rows):
    """What `Mixture` asks of a source whose rows are not read."""
    return SimpleNamespace(
        rows=rows,
        documents=rows,
        directory="x",
        text_bytes=0,
        text_tokens=0,
        row_tokens=8,
        width=8,
        layout="masked",
        max_pieces=1,
        fill=[1.0],
        tokenizer=SimpleNamespace(hash="same"),
    )


# ---- the mix


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 60) | st.integers(1, 3) | st.just(997), min_size=1, max_size=9))
def test_the_first_n_rows_are_within_one_row_of_the_weights(weights):
    divisor = math.gcd(*weights)
    turn = schedule([weight // divisor for weight in weights])
    total = sum(weights) // divisor
    assert len(turn) == total
    counts = np.cumsum(turn[:, None] == np.arange(len(weights)), axis=0)
    # |count - n·w/W| < 1 in integers; the schedule repeats, and a whole one is exact
    n = np.arange(1, total + 1)[:, None]
    assert (abs(counts * sum(weights) - n * np.array(weights)) < sum(weights)).all()
    assert (counts[-1] * divisor == weights).all()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(0, 2**31),
    st.integers(0, 2**64 - 1),
)
def test_every_row_of_a_source_once_in_each_of_its_epochs(sources, start, seed):
    mixture = Mixture([fake(n) for n, _ in sources], ",".join(str(weight) for _, weight in sources))
    sizes = [n for n, _ in sources]
    begin, span = np.array(mixture.counts(start)), 3 * max(sizes) * sum(mixture.weights)
    assert begin.sum() == start
    epoch, row = mixture.order(np.arange(start, start + span), seed)
    assert (np.diff([0, *np.cumsum(sizes)]) == sizes).all()
    for source, at, local in mixture.split(row):
        n, seen = sizes[source], epoch[at]
        k = begin[source] + np.arange(len(at))
        assert np.array_equal(seen, k // n)  # one after another, from where the rows before have come to
        assert np.array_equal(local, perm(k % n, n, k // n, seed, source))
        whole = [local[seen == e] for e in np.unique(seen)[1:-1]]
        assert all(np.array_equal(np.sort(rows), np.arange(n)) for rows in whole)
    assert [int(begin[s]) + len(at) for s, at, _ in mixture.split(row)] == mixture.counts(start + span)
    some = np.array([span - 1, 0, span // 2])
    again = mixture.order(start + some, seed)  # in any order, on their own
    assert np.array_equal(again[0], epoch[some])
    assert np.array_equal(again[1], row[some])


def test_weights():
    assert parse_weights("0.7, 0.3") == (7, 3)
    assert parse_weights("70,30") == (7, 3)
    assert parse_weights("1/3,2/3") == (1, 2)
    assert parse_weights("5") == (1,)
    for wrong in ("", "1,", "1,x", "0,1", "-1,2", "1/0", "nan,1", "inf"):
        with pytest.raises(ValueError, match="weights: expected positive numbers by commas"):
            parse_weights(wrong)
    with pytest.raises(
        ValueError, match=r"weights: expected multiples of a 1,000,000th .* which are finer; round them"
    ):
        parse_weights("0.1234567,0.8765433")
    for huge in ("1e-5000,1", "1E+999999999,1"):
        with pytest.raises(ValueError, match="weights: expected numbers with an exponent of two digits at most"):
            parse_weights(huge)
    with pytest.raises(ValueError, match=r"weights: expected multiples of a 1,000,000th"):
        parse_weights(",".join(["1e-99"] * 60 + [f"1/{10**70 + n}" for n in range(80)]))
    with pytest.raises(ValueError, match=r"weights: expected 2, one for each of x x, got '1,2,3'"):
        Mixture([fake(3), fake(4)], "1,2,3")
    recipe = small()
    assert recipe.with_settings(["data.weights=0.7,0.3"]).data.weights == "0.7,0.3"
    assert recipe.with_settings(["data.weights=[7, 3]"]).data.weights == "7,3"
    assert recipe.with_settings(["data.weights=1"]).data.weights == "1"
    with pytest.raises(ValueError, match=r"data\.weights: expected positive numbers"):
        recipe.with_settings(["data.weights=[1, 0]"])


def test_a_recipe_file_has_lists(tmp_path):
    (tmp_path / "a.toml").write_text('[data]\nweights = [0.7, 0.3]\nfilters = ["gopher", "c4"]\n')
    data = load_recipe(tmp_path / "a.toml").data
    assert (data.weights, data.filters) == ("0.7,0.3", "gopher,c4")


def test_the_order_ends_where_an_epoch_would_not_fit_32_bits():
    mixture = Mixture([fake(2), fake(3)], "3,1")
    last = mixture.endless_rows - 1
    assert mixture.order([last], 0)[0] < 2**32
    assert mixture.counts(last + 9)[0] // 2 >= 2**32
    with pytest.raises(ValueError, match=r"step: expected an integer from 0 to"):
        Batches(mixture, batch_rows=8, seed=0).at(last // 8)


# ---- rows


def test_samples_of_different_sources_do_not_collide(rows):
    sources = [open_dataset(rows / name) for name in SIZES]
    joined = Joined(sources)
    assert joined.rows == sum(source.rows for source in sources)
    order = np.random.default_rng(0).permutation(joined.rows)
    tokens, counts, pieces = joined.gather(order)
    ends = np.cumsum(counts)
    first, documents, seen = 0, 0, set()
    for source in sources:
        theirs = source.gather(np.arange(source.rows))
        bounds = np.cumsum(theirs[1])
        for row in range(source.rows):
            at = int(np.flatnonzero(order == first + row)[0])
            assert np.array_equal(tokens[at], theirs[0][row])
            found = pieces[ends[at] - counts[at] : ends[at]].copy()
            real = found[:, 0] != PADDING_SAMPLE
            seen |= set(found[real, 0].tolist())
            found[real, 0] -= documents << 24
            assert np.array_equal(found, theirs[2][bounds[row] - theirs[1][row] : bounds[row]])
        first, documents = first + source.rows, documents + source.documents
    for found, expected in zip(joined.gather(order[:0]), sources[0].gather(order[:0]), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert len(seen) == (pieces[:, 0] != PADDING_SAMPLE).sum()
    assert {sample >> 24 for sample in seen} == set(range(documents))


def test_a_batch_is_the_sources_rows(rows):
    sources = [open_dataset(rows / name) for name in "ab"]
    mixture = Mixture(sources, "2,1")
    batch = Batches(mixture, batch_rows=6, seed=3).at(1)
    ids = batch.input_ids.reshape(6, -1)
    counts = mixture.counts(6)
    assert counts == [4, 2]
    expected = []
    for number, (source, count) in enumerate(zip(sources, counts)):
        k = np.arange(count, 2 * count)
        expected += source.gather(perm(k % source.rows, source.rows, k // source.rows, 3, number))[0].tolist()
    assert sorted(ids.tolist()) == sorted(expected)
    batches = Batches(mixture, batch_rows=6, seed=3)
    parts = [batches.at(1, m, 3) for m in range(3)]  # for any division among micro-batches and processes
    for name in ("input_ids", "sample_ids", "epochs", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert batch_rows(1, 6, mixture, 3).startswith(f"{rows / 'a'}: epoch 0: rows ")
    assert f"; {rows / 'b'}: epoch 0: rows " in batch_rows(1, 6, mixture, 3)


@pytest.mark.parametrize("kind", [CausalRows, SpanRows])
def test_the_other_layouts_and_held_out_text(kind, tmp_path):
    task = {"causal": "causal_lm", "span": "span_corruption"}[kind.name]
    layout, tokenizer = kind(32), "train:400"
    for name, lines in (("a", 60), ("b", 40)):
        corpus(tmp_path / f"{name}.txt", lines)
        prepare(
            tmp_path / f"{name}.txt", tokenizer, tmp_path / name, layout=layout, documents="line", validation_share=0.2
        )
        tokenizer = tmp_path / "a" / "tokenizer"
    sources = [[open_dataset(tmp_path / name, split=split) for name in "ab"] for split in ("train", "validation")]
    content = {"task": task, "data": {"row_tokens": 32}, "train": {"batch_tokens": 256, "eval_tokens": 0}}
    recipe = Recipe.from_dict(content)
    made = find_task(task)(recipe, Mixture(sources[0], "3,1"), CPU, Joined(sources[1]))
    assert made.micro(2, 0).counts.predicted > 0
    whole = list(made.evaluation())
    text = [find_task(task)(recipe, one, CPU, one).evaluation() for one in sources[1]]
    # span corruption draws by sample: its second source has other spans here, but as many tokens
    assert sum(m.counts.predicted for m in whole) == sum(m.counts.predicted for each in text for m in each)
    if kind is CausalRows:
        assert made.evaluated(1.0)["val_bits_per_byte"] > 0


# ---- runs


def recipe(**settings):
    return small(data__validation_share=0.1, data__weights="3,1", train__eval_every=6, **settings)


@pytest.fixture(scope="module")
def run(rows):
    pretrain(recipe(), [rows / "a", rows / "b"], rows / "run")
    return rows / "run"


def test_a_run_says_its_mix(rows, run):
    summary = json.loads((run / "summary.json").read_text())
    sources = [open_dataset(rows / name) for name in "ab"]
    assert [part["rows"] for part in summary["mix"]] == [72, 24]  # of 12 steps of 8 rows
    assert [part["data"] for part in summary["mix"]] == [str(rows / "a"), str(rows / "b")]
    assert [part["weight"] for part in summary["mix"]] == [0.75, 0.25]
    assert [part["epochs"] for part in summary["mix"]] == [
        pytest.approx(n / s.rows, abs=1e-4) for n, s in zip((72, 24), sources)
    ]
    assert sum(part["tokens"] for part in summary["mix"]) == pytest.approx(summary["tokens"], rel=0.02)
    assert f"mix           {rows / 'a'} 0.75: 72 rows, about " in summary_table(summary, run / "hf")
    assert [counted(n, "row") for n in (0, 1, 2345)] == ["0 rows", "1 row", "2,345 rows"]
    held = [row["val_loss"] for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row]
    assert len(held) == 2


def stopped(recipe, data, out, after, monkeypatch):
    original, steps = loop.train_step, []

    def step(*args, **arguments):
        steps.append(1)
        if len(steps) == after:
            raise KeyboardInterrupt
        return original(*args, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, data, out)


def test_resumed_in_the_middle_it_gives_the_same_losses(rows, run, tmp_path, monkeypatch, capfd):
    data = [rows / "a", rows / "b"]
    stopped(recipe(), data, tmp_path / "run", 7, monkeypatch)
    for changed, message in (
        (small(data__validation_share=0.1, data__weights="1,1"), r"data\.weights is '1,1', was '3,1'"),
        (small(data__validation_share=0.1), r"data\.weights is '', was '3,1'"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(changed, data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"/b is not what the run was started on: .* its text has"):
        pretrain(recipe(), [rows / "b", rows / "a"], tmp_path / "run")
    capfd.readouterr()
    pretrain(recipe(), data, tmp_path / "run")
    assert "mix until now: " in capfd.readouterr().err
    keys = ("step", "loss", "grad_norm", "val_loss")
    found, expected = (read_metrics(out / "metrics.jsonl") for out in (tmp_path / "run", run))
    assert [[row.get(key) for key in keys] for row in found] == [[row.get(key) for key in keys] for row in expected]


def test_what_does_not_mix(rows, tmp_path):
    a, b, text = rows / "a", rows / "b", rows / "a.txt"
    with pytest.raises(ValueError, match=r"data\.weights: expected 2 numbers by commas, one for each of .*; 1,1 mixes"):
        pretrain(small(), [a, b], tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.weights: expected 2, one for each of .*, got '1,2,3'"):
        pretrain(small(data__weights="1,2,3"), [a, b], tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.weights: expected 1, one for each of .*, got '1,2'"):
        pretrain(small(data__weights="1,2"), a, tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"data\.weights: expected prepared directories to mix, got text, .*a\.txt, and"
    ):
        pretrain(small(data__weights="1"), [text], tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.weights: expected none while text is prepared, got 1,2"):
        prepare_for("masked_lm", small(data__weights="1,2").data, [text], tmp_path / "run")
    for data, weights in (([a, text], ""), ([a, text], "1,2")):
        with pytest.raises(ValueError, match=r"data: expected text alone, or prepared .* of which .*a\.txt is text"):
            pretrain(small(data__weights=weights), data, tmp_path / "run")
    other = prepare(text, "train:180", tmp_path / "other", row_tokens=32, documents="line", validation_share=0.1)
    with pytest.raises(ValueError, match=r"one tokenizer, but that of .*other is not that of .*/a; prepare it again"):
        pretrain(small(data__weights="1,1"), [a, other.directory], tmp_path / "run")
    prepare(text, a / "tokenizer", tmp_path / "long", row_tokens=64, documents="line")
    with pytest.raises(ValueError, match=r"data\.row_tokens: .*long was prepared with 64, the recipe says 32"):
        pretrain(small(data__weights="1,1"), [a, tmp_path / "long"], tmp_path / "run")
    with pytest.raises(ValueError, match=r"one row_tokens, but .*long has 64, .*/a 32"):
        Mixture([open_dataset(a), open_dataset(tmp_path / "long")], "1,1")
    assert not (tmp_path / "run").exists()
