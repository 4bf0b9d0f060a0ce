"""Causal language modelling and span corruption: what is predicted, from what, and how well; held-out text; --init."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import corpus

from fastlm.data import Batches, Tokenizer, open_dataset, prepare
from fastlm.data.batches import make_batch
from fastlm.data.layouts import NO_NEXT, CausalRows, Corruption, SpanRows
from fastlm.data.packing import PADDING_SAMPLE, lay_rows, pack
from fastlm.data.spans import corrupt, pad
from fastlm.models import GPT2, T5
from fastlm.run.metrics import read_metrics
from fastlm.run.recipe import Recipe
from fastlm.tasks import find_task
from fastlm.train import pretrain

CPU = torch.device("cpu")
TEXTS = [f"Document {i} of the corpus: " + "the cat sat on a mat, " * (i % 7) + "the end." for i in range(60)]
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5_SIZES = {"architecture": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
TRAIN = {"batch_tokens": 256, "max_steps": 24, "warmup_steps": 2, "lr": 1e-2, "eval_every": 10, "dtype": "float32"}
RECIPES = {
    "causal_lm": {
        "task": "causal_lm",
        "model": {**GPT2_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "data": {"tokenizer": "chars", "row_tokens": 32, "documents": "line", "validation_share": 0.2},
        "train": TRAIN,
    },
    "span_corruption": {
        "task": "span_corruption",
        "model": {**T5_SIZES, "dropout_rate": 0.0},
        "data": {"tokenizer": "train:400", "row_tokens": 32, "documents": "line", "validation_share": 0.2},
        "train": TRAIN,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each task."""
    out = tmp_path_factory.mktemp("runs")
    text = corpus(out / "corpus.txt")
    for name, content in RECIPES.items():
        pretrain(Recipe.from_dict(content), text, out / name)
    return out


# ---- layouts


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 90) | st.integers(1, 3) | st.sampled_from([7, 8, 9, 31, 32]), max_size=15),
    row_tokens=st.sampled_from([8, 9, 31, 64]),
)
def test_causal_rows_predict_every_token_once(lengths, row_tokens):
    tokenizer = SimpleNamespace(vocab_size=300, pad_id=None, bos_id=1, eos_id=2)
    documents = [np.arange(length) % 200 + 3 for length in lengths]
    inputs, targets = {}, {}
    for shard in pack(documents, tokenizer, CausalRows(row_tokens), 3):
        dataset = SimpleNamespace(
            gather=lambda rows, shard=shard: (shard.tokens, np.diff(shard.offsets), shard.pieces),
            width=row_tokens,
            max_pieces=int(np.diff(shard.offsets).max()),
            layout="causal",
        )
        rows = np.arange(len(shard.tokens))
        batch = make_batch(dataset, np.zeros_like(rows), rows)
        for sample in batch.sample_ids.unique().tolist():
            here = batch.sample_ids == sample
            if sample == PADDING_SAMPLE:
                assert batch.targets[here].eq(NO_NEXT).all()
                continue
            assert sample not in inputs
            inputs[sample], targets[sample] = batch.input_ids[here].tolist(), batch.targets[here].tolist()
    for ordinal, document in enumerate(documents):
        samples = [sample for sample in sorted(inputs) if sample >> 24 == ordinal]
        assert [t for s in samples for t in inputs[s]] == [1, *document.tolist()]
        assert [t for s in samples for t in targets[s]] == [*document.tolist(), 2]


CORRUPTIONS = [Corruption(), Corruption(0.5, 3.0), Corruption(0.15, 1.0), Corruption(0.9, 10.0), Corruption(0.05, 20.0)]


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=str)
def test_lengths_of_corrupted_pieces(corruption):
    tokens = np.arange(2, 2000)
    noise, spans = corruption.counts(tokens)
    assert (noise >= 1).all()
    assert (tokens - noise >= spans).all()
    assert (noise >= spans).all()
    wanted = tokens * corruption.noise_density
    possible = (wanted >= 1) & (tokens - wanted >= np.maximum(spans, 1))  # else a span and what is kept need more
    assert (np.abs(noise - wanted) <= 0.5)[possible].all()
    encoder, decoder = corruption.lengths(np.arange(2000))
    assert (np.diff(encoder) >= 0).all()  # so that a row can be filled by bisection
    assert (np.diff(decoder) >= 0).all()


def test_lengths_are_those_of_t5():
    """T5's own: 568 tokens make 512 of the encoder and 114 of the decoder (Raffel et al. 2020)."""
    layout = SpanRows(512)
    assert (layout.fits((0, 0)), layout.target_tokens, layout.width) == (568, 114, 568)
    assert layout.add((0, 0), 568) == (512, 114)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 300) | st.integers(1, 9), min_size=1, max_size=15),
    row_tokens=st.sampled_from([16, 64, 128]),
    target_tokens=st.sampled_from([0, 12, 40]),
    corruption=st.sampled_from(CORRUPTIONS),
)
def test_span_rows_fit_both_sides(lengths, row_tokens, target_tokens, corruption):
    try:
        layout = SpanRows(row_tokens, target_tokens, corruption)
    except ValueError:
        assert corruption.lengths(8)[0] > row_tokens or corruption.lengths(8)[1] > (target_tokens or row_tokens)
        return
    documents = [np.arange(length) for length in lengths]
    seen = dict.fromkeys(range(len(lengths)), 0)
    for row in lay_rows(documents, layout):
        sizes = np.array([len(piece.ids) for piece in row.pieces])
        assert sizes.sum() <= layout.width
        for side, used, capacity in zip(corruption.lengths(sizes), row.used, layout.capacity()):
            assert side.sum() == used <= capacity
        for piece in row.pieces:
            assert np.array_equal(
                piece.ids, documents[piece.sample >> 24][seen[piece.sample >> 24] :][: len(piece.ids)]
            )
            seen[piece.sample >> 24] += len(piece.ids)
    assert list(seen.values()) == lengths


def test_span_rows_that_hold_no_piece_are_refused():
    """They were laid without end."""
    for row_tokens, target_tokens, held in ((8, 0, 7), (64, 2, 1)):
        with pytest.raises(ValueError, match=rf"row_tokens: expected rows that hold .* 8 .* which hold {held};"):
            SpanRows(row_tokens, target_tokens)
    assert SpanRows(9).fits((0, 0)) == 8


# ---- spans


@pytest.fixture(scope="module")
def span_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans")
    (folder / "a.txt").write_text("\n".join(TEXTS))
    return prepare(folder / "a.txt", "bpe:400", folder / "out", documents="line", layout=SpanRows(32), shard_rows=5)


def whole(pair, k, sentinels):
    """Piece k, put together again from both sides."""
    encoder, decoder = (
        ids[starts[k] : starts[k + 1]].tolist()
        for ids, starts in ((pair.input_ids, pair.cu_seqlens), (pair.labels, pair.decoder_cu_seqlens))
    )
    spans, current = {}, None
    for token in decoder[:-1]:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert encoder[-1] == decoder[-1]
    assert list(spans) == [token for token in encoder if token in sentinels] == list(sentinels[: len(spans)])
    assert all(spans.values())
    return [t for token in encoder[:-1] for t in spans.get(token, [token])]


def test_corruption_loses_nothing_and_depends_on_the_sample_alone(span_data):
    tokenizer, corruption = span_data.tokenizer, Corruption()
    batches = Batches(span_data, batch_rows=span_data.rows, seed=1)
    pairs, pieces = {}, {}
    for rows in (span_data.rows, 1):  # one batch, and batches of one row
        for step in range(span_data.rows // rows):
            batch = Batches(span_data, batch_rows=rows, seed=1).at(step)
            pair = corrupt(batch, corruption, tokenizer, seed=7)
            starts = batch.cu_seqlens.tolist()
            real = [k for k in range(batch.pieces) if batch.sample_ids[starts[k]] != PADDING_SAMPLE]
            assert len(pair.lengths) == len(real)
            for place, k in enumerate(real):
                text = batch.input_ids[starts[k] : starts[k + 1]].tolist()
                assert whole(pair, place, tokenizer.sentinel_ids) == text
                sample = int(batch.sample_ids[starts[k]])
                found = pair.input_ids[pair.cu_seqlens[place] : pair.cu_seqlens[place + 1]].tolist()
                assert pairs.setdefault(sample, found) == found
                pieces[sample] = text
    again = corrupt(batches.at(1), corruption, tokenizer, seed=7)  # the second epoch
    other = corrupt(batches.at(0), corruption, tokenizer, seed=8)
    first = corrupt(batches.at(0), corruption, tokenizer, seed=7)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert sorted(again.input_ids.tolist()) != sorted(first.input_ids.tolist())
    documents = {}
    for sample in sorted(pieces):
        documents.setdefault(sample >> 24, []).extend(pieces[sample])
    assert list(documents.values()) == tokenizer.encode_batch(TEXTS)


def test_every_cut_is_equally_likely():
    """Pieces of 7 tokens with 4 lost in 2 spans: 3 · 2 ways, 4000 of them; chi-squared below its 99.9% point, 20.5."""
    pieces, n = 4000, 7
    batch = SimpleNamespace(
        cu_seqlens=torch.arange(0, (pieces + 1) * n, n, dtype=torch.int32),
        pieces=pieces,
        input_ids=torch.arange(n).repeat(pieces) + 200,
        sample_ids=torch.arange(pieces).repeat_interleave(n),
        epochs=torch.zeros(pieces * n, dtype=torch.int64),
    )
    tokenizer = SimpleNamespace(sentinel_ids=tuple(range(9)), eos_id=9)
    pair = corrupt(batch, Corruption(0.5, 2.0), tokenizer, seed=3)
    ways = pair.input_ids.view(pieces, -1).unique(dim=0, return_counts=True)[1]
    assert len(ways) == 6
    expected = pieces / 6
    assert float(((ways - expected) ** 2 / expected).sum()) < 20.5


def test_padded_pairs_have_one_shape_and_the_same_loss(span_data):
    torch.manual_seed(0)
    recipe = Recipe.from_dict(RECIPES["span_corruption"])
    tokenizer, layout = span_data.tokenizer, SpanRows(32)
    task = find_task("span_corruption")
    model = task.model(recipe, tokenizer.vocab_size, tokenizer.pad_id, **task.token_ids(tokenizer)).eval()
    shapes = set()
    for step in range(3):
        batch = Batches(span_data, batch_rows=4, seed=0).at(step)
        pair = corrupt(batch, layout.corruption, tokenizer, 0)
        static = pad(pair, 4 * 32, 4 * layout.target_tokens, 4 * (layout.max_pieces + 2), layout.capacity(), 0)
        losses = [
            model(
                one.input_ids,
                cu_seqlens=one.cu_seqlens,
                max_seqlen=32,
                decoder_cu_seqlens=one.decoder_cu_seqlens,
                decoder_max_seqlen=layout.target_tokens,
                labels=one.labels,
                reduction="sum",
            )
            for one in (pair, static)
        ]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        assert static.cu_seqlens.diff().max() <= 32
        shapes.add(tuple(t.shape for t in (static.input_ids, static.labels, static.cu_seqlens)))
    assert len(shapes) == 1


# ---- tokenizers


@pytest.mark.parametrize("purpose", ["masked", "causal", "span"])
@pytest.mark.parametrize("kind", ["bpe", "chars"])
def test_trained_tokenizers_are_transformers_too(kind, purpose, tmp_path):
    texts = [*TEXTS, "naïve café 你好\n\n  indented\ttabs"]
    tokenizer = Tokenizer.train(lambda: texts, 420, kind, purpose)
    tokenizer.check(purpose)
    assert tokenizer.hash == Tokenizer.train(lambda: texts, 420, kind, purpose).hash
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special_ids)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash
    assert len(tokenizer.sentinel_ids) == (100 if purpose == "span" else 0)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert set(theirs.all_special_ids) == set(tokenizer.special_ids)


def test_word_starts():
    for kind in ("wordpiece", "bpe"):
        tokenizer = Tokenizer.train(lambda: TEXTS, 300, kind)
        words = "".join(" " if letter in ":,." else letter for letter in TEXTS[5]).split()
        ids = tokenizer.encode_batch([" ".join(words)])[0]
        starts = tokenizer.word_starts()[ids]
        starts[0] = True  # the first word has no space before it
        assert starts.sum() == len(words)
        assert tokenizer.word_starts()[list(tokenizer.special_ids)].all()


# ---- runs


def test_gpt2s_export_has_the_same_loss(runs):
    transformers = pytest.importorskip("transformers")
    out = runs / "causal_lm"
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 1.0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "hf").eval()
    dataset = open_dataset(out / "data")
    task = find_task("causal_lm")(Recipe.from_dict(RECIPES["causal_lm"]), dataset, CPU)
    inputs = task.micro(0, 0).inputs
    ours = GPT2.from_pretrained(out / "hf").eval()
    with torch.no_grad():
        loss = ours(**inputs)
        starts = inputs["cu_seqlens"].unique().tolist()
        logits = torch.cat([theirs(inputs["input_ids"][None, a:b]).logits[0] for a, b in pairwise(starts)])
        expected = torch.nn.functional.cross_entropy(logits, inputs["shift_labels"], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert theirs.config.eos_token_id == dataset.tokenizer.eos_id


def test_t5s_export_has_the_same_loss(runs):
    transformers = pytest.importorskip("transformers")
    out = runs / "span_corruption"
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(out / "hf").eval()
    dataset = open_dataset(out / "data")
    inputs = find_task("span_corruption")(Recipe.from_dict(RECIPES["span_corruption"]), dataset, CPU).micro(0, 0).inputs
    ours = T5.from_pretrained(out / "hf").eval()
    cu, target = inputs["cu_seqlens"].tolist(), inputs["decoder_cu_seqlens"].tolist()
    with torch.no_grad():
        loss, expected = ours(**inputs), 0.0
        for k in range(len(cu) - 1):
            ids, labels = (
                inputs["input_ids"][None, cu[k] : cu[k + 1]],
                inputs["labels"][None, target[k] : target[k + 1]],
            )
            expected += theirs(input_ids=ids, labels=labels).loss * labels.numel()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_held_out_text_is_not_trained_on_and_evaluated(runs, name):
    out = runs / name
    train, held = open_dataset(out / "data"), open_dataset(out / "data", split="validation")
    texts = corpus(out.parent / "again.txt").read_text().splitlines()
    assert 0.05 < held.documents / (train.documents + held.documents) < 0.4
    assert train.text_bytes + held.text_bytes == sum(len(text.encode()) for text in set(texts))
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20, 24]
    last = rows[-1]
    assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert json.loads((out / "summary.json").read_text())["val_loss"] == last["val_loss"]
    if name == "causal_lm":
        bits = last["val_loss"] * (held.text_tokens + held.documents) / (held.text_bytes * math.log(2))
        assert last["val_bits_per_byte"] == pytest.approx(bits)
        assert held.text_tokens == held.text_bytes  # characters of ASCII


@pytest.mark.parametrize("task", RECIPES)
def test_golden_losses(runs, task):
    """A refactor changes no loss. Recorded on a Xeon with AMX, as float.hex."""
    golden = json.loads((Path(__file__).parent / "golden_losses.json").read_text())[task]
    found = [row["loss"] for row in read_metrics(runs / task / "metrics.jsonl")][: len(golden)]
    assert found == pytest.approx([float.fromhex(loss) for loss in golden], rel=1e-4)


@pytest.mark.parametrize("task", RECIPES)
def test_resume_is_exact(runs, tmp_path, task):
    recipe, text = Recipe.from_dict(RECIPES[task]), runs / "corpus.txt"
    stop = recipe.with_values({"train.checkpoint_every": 7})

    class Killed(Exception):
        pass

    from fastlm.train import loop

    original, steps = loop.train_step, []

    def killed(*args, **arguments):
        steps.append(1)
        if len(steps) == 17:
            raise Killed
        return original(*args, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", killed)
        with pytest.raises(Killed):
            pretrain(stop, text, tmp_path / "run")
    pretrain(stop, text, tmp_path / "run")
    found, expected = (
        [(row["loss"], row.get("val_loss")) for row in read_metrics(path / "metrics.jsonl")]
        for path in (tmp_path / "run", runs / task)
    )
    assert found == expected


def test_a_run_killed_before_its_summary_has_the_evaluation_in_it(runs, tmp_path):
    shutil.copytree(runs / "causal_lm", tmp_path / "run")
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").unlink()
    summary = pretrain(Recipe.from_dict(RECIPES["causal_lm"]), runs / "corpus.txt", tmp_path / "run").summary
    names = ("val_loss", "val_perplexity", "val_bits_per_byte", "final_loss", "tokens")
    assert [summary[name] for name in names] == [before[name] for name in names]


# ---- continued pretraining


@pytest.mark.parametrize("task", RECIPES)
def test_a_run_starts_from_another_runs_weights(runs, tmp_path, task):
    content = RECIPES[task]
    recipe = Recipe.from_dict({**content, "data": {**content["data"], "row_tokens": 16}})  # another length
    recipe = recipe.with_values({"train.max_steps": 3, "train.lr": 1e-4, "train.warmup_steps": 0})
    final = read_metrics(runs / task / "metrics.jsonl")[-1]["loss"]
    (checkpoint,) = sorted((runs / task / "checkpoints").iterdir())[-1:]
    results = []
    for init in (runs / task, runs / task / "hf", checkpoint):
        out = tmp_path / init.name
        result = pretrain(recipe, runs / "corpus.txt", out, init=init)
        results.append([row["loss"] for row in read_metrics(out / "metrics.jsonl")])
        assert results[-1][0] < final + 0.7
        assert result.summary["steps"] == 3
        assert open_dataset(out / "data").tokenizer.hash == open_dataset(runs / task / "data").tokenizer.hash
    assert results[0] == results[1] == results[2]
    with pytest.raises(ValueError, match="init: the data was prepared with another tokenizer"):
        pretrain(recipe, prepared_otherwise(recipe, runs, tmp_path), tmp_path / "other", init=runs / task)
    with pytest.raises(ValueError, match=r"init: expected the directory of a model .* of a run, or of a checkpoint"):
        pretrain(recipe, runs / "corpus.txt", tmp_path / "no", init=tmp_path)


def prepared_otherwise(recipe, runs, tmp_path):
    layout = find_task(recipe.task).layout(recipe.data)
    out = tmp_path / f"bpe-{recipe.task}"
    prepare(runs / "corpus.txt", "bpe:380", out, layout=layout, documents="line", validation_share=0.2)
    return out


def test_bad_held_out_text_and_layouts(runs, tmp_path):
    text, recipe = runs / "corpus.txt", Recipe.from_dict(RECIPES["causal_lm"])
    for options, message in (
        ({"validation_share": 1.0}, "validation_share: expected a share from 0 up to, but not, 1"),
        (
            {"validation_share": 0.5, "validation": text},
            "validation_share: expected .* 0 where validation names a text",
        ),
        ({"validation_share": 1e-9}, "validation_share: none of the .* documents falls into a share of 1e-09; give"),
        ({"validation_share": 1 - 1e-9}, "validation_share: all .* documents in .* are held out; give a smaller"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(text, "train:200", tmp_path / "out", documents="line", **options)
    assert not (tmp_path / "out").exists()
    prepare(text, "train:200", tmp_path / "masked", documents="line", row_tokens=32)
    with pytest.raises(ValueError, match=r"data: .*masked was prepared with masked rows, task causal_lm needs causal"):
        pretrain(recipe, tmp_path / "masked", tmp_path / "run")
    with pytest.raises(ValueError, match="tokenizer: expected one with a eos_token for causal rows, found none; train"):
        prepare(text, tmp_path / "masked" / "tokenizer", tmp_path / "x", layout=CausalRows(32))
    with pytest.raises(ValueError, match="tokenizer: expected bpe, unigram or chars for span rows, got wordpiece"):
        prepare(text, "wordpiece:200", tmp_path / "x", layout=SpanRows(32))
    with pytest.raises(ValueError, match=r"data: .*masked holds no validation rows; prepare it again with"):
        open_dataset(tmp_path / "masked", split="validation")
    with pytest.raises(ValueError, match=r"data\.validation_share: expected 0 with data\.validation='x', got 0\.2"):
        recipe.with_values({"data.validation": "x"})


def test_a_validation_path(runs, tmp_path):
    (tmp_path / "held.txt").write_text("\n".join(TEXTS))
    dataset = prepare(
        runs / "corpus.txt", "train:400", tmp_path / "out", layout=CausalRows(32), validation=tmp_path / "held.txt"
    )
    held = open_dataset(dataset.directory, split="validation")
    assert (held.documents, held.text_bytes) == (1, len("\n".join(TEXTS)))
    assert dataset.documents == 1
