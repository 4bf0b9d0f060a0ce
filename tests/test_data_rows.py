"""Documents -> rows -> batches: no token is lost, duplicated or mislabelled, for any division of the batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import Batches, Tokenizer, packing, prepare
from fastlm.data.layouts import MIN_PIECE, MaskedRows
from fastlm.data.packing import PADDING_SAMPLE, encode_documents, pack

TEXTS = [
    f"Document {i}: " + " ".join(f"word{j % 7} and" for j in range(length)) + f" the end of {i}."
    for i, length in enumerate([40, 1, 0, 3, 200, 2, 0, 0, 5, 90, 1, 1, 1, 1, 33])
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.txt").write_text("\n".join(TEXTS))
    # seven rows a shard: several shards, the last one short
    return prepare([folder / "a.txt"], "train:200", folder / "out", documents="line", row_tokens=16, shard_rows=7)


# 7 | 8 | 9 around MIN_PIECE, 8 the shortest row, 9 and 31 odd, 255 and 256 and 257 around the token types
@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 70) | st.integers(1, 3) | st.sampled_from([5, 6, 7, 8, 9, 14, 29]), max_size=20),
    row_tokens=st.sampled_from([8, 9, 16, 31, 64]),
    shard_rows=st.integers(1, 5),
    vocab_size=st.sampled_from([256, 257, 65536, 65537]),
)
def test_packing_loses_nothing(lengths, row_tokens, shard_rows, vocab_size):
    rng = np.random.default_rng(0)
    tokenizer = SimpleNamespace(vocab_size=vocab_size, pad_id=0, cls_id=1, sep_id=2)
    documents = [rng.integers(3, vocab_size, length) for length in lengths]
    layout = MaskedRows(row_tokens)
    shards = list(pack(documents, tokenizer, layout, shard_rows))
    assert all(len(shard.tokens) == shard_rows for shard in shards[:-1])
    rows = []
    for shard in shards:
        assert shard.tokens.dtype == {256: "uint8", 257: "uint16", 65536: "uint16", 65537: "uint32"}[vocab_size]
        assert shard.tokens.shape[1] == row_tokens
        bounds = shard.offsets.tolist()
        rows += [
            (row, shard.pieces[a:b].tolist()) for row, a, b in zip(shard.tokens, bounds[:-1], bounds[1:], strict=True)
        ]
    read = {}
    for number, (row, pieces) in enumerate(rows):
        real = [piece for piece in pieces if piece[0] != PADDING_SAMPLE]
        assert 1 <= len(real) <= layout.max_pieces
        assert pieces[: len(real)] == real, "padding comes last"
        assert pieces[0][1] == 0
        ends = [start for _, start in pieces[1:]] + [row_tokens]
        for (sample, start), end in zip(pieces, ends, strict=True):
            if sample == PADDING_SAMPLE:
                assert (row[start:] == 0).all()
                full, last = len(real) == layout.max_pieces, number == len(rows) - 1
                assert last or full or end - start < MIN_PIECE, "a useful piece would have fitted"
            else:
                assert (row[start], row[end - 1]) == (1, 2)
                assert end - start >= 3
                assert sample not in read, "sample ids are unique"
                read[sample] = row[start + 1 : end - 1]
    assert list(read) == sorted(read)
    for ordinal, document in enumerate(documents):
        pieces = [read.pop(sample) for sample in sorted(read) if sample >> 24 == ordinal]
        assert np.array_equal(np.concatenate(pieces), document)
    assert not read


def test_pieces_are_numbered_within_a_document_and_bounded(monkeypatch):
    tokenizer = SimpleNamespace(vocab_size=10, pad_id=0, cls_id=1, sep_id=2)
    document = np.full(6 * 4, 5)
    (shard,) = pack([document, document], tokenizer, MaskedRows(8), 100)
    assert shard.pieces[:, 0].tolist() == [0, 1, 2, 3, (1 << 24), (1 << 24) + 1, (1 << 24) + 2, (1 << 24) + 3]
    monkeypatch.setattr(packing, "PIECE_BITS", 2)
    (shard,) = pack([document], tokenizer, MaskedRows(8), 100)
    with pytest.raises(ValueError, match=r"document 1 has more than 2\^2 pieces of row_tokens=8; split it"):
        list(pack([document, np.full(6 * 4 + 1, 5)], tokenizer, MaskedRows(8), 100))


def test_long_documents_are_tokenised_in_cuts_as_if_whole(monkeypatch):
    tokenizer = Tokenizer.train(lambda: TEXTS, 200)
    monkeypatch.setattr("fastlm.data.tokenizer._CHUNK_CHARS", 64)
    monkeypatch.setattr(packing, "_BATCH_CHARS", 256)
    assert Tokenizer.train(lambda: TEXTS, 200).hash == tokenizer.hash
    texts = [*TEXTS, "x" * 200, "one\n\ntwo " * 50]
    batches = list(packing._batches(texts))
    assert max(sum(len(chunk) for chunk, _ in batch) for batch in batches) < 256 + 64
    assert "".join(chunk for batch in batches for chunk, _ in batch) == "".join(texts)
    found = list(encode_documents(texts, tokenizer))
    whole = tokenizer.encode_batch(texts)
    assert len(found) == len(texts)
    for i in range(len(texts)):
        if i != len(TEXTS):  # 200 letters without a space have to be cut somewhere
            assert found[i].tolist() == whole[i]


def test_an_epoch_is_the_corpus(dataset):
    """Every document, put together again from one epoch of batches, is what the tokenizer makes of its text."""
    batches = Batches(dataset, batch_rows=1, seed=3)
    pieces = {}
    real = 0
    for step in range(dataset.rows):
        batch = batches.at(step)
        assert batch.epochs.eq(0).all()
        real += batch.tokens
        for sample in batch.sample_ids.unique().tolist():
            assert sample == PADDING_SAMPLE or sample not in pieces
            pieces[sample] = batch.input_ids[batch.sample_ids == sample].tolist()
    assert set(pieces.pop(PADDING_SAMPLE)) == {dataset.tokenizer.pad_id}
    assert real == sum(map(len, pieces.values()))
    cls, sep = dataset.tokenizer.cls_id, dataset.tokenizer.sep_id
    documents = {}
    for sample in sorted(pieces):
        assert (pieces[sample][0], pieces[sample][-1]) == (cls, sep)
        documents.setdefault(sample >> 24, []).extend(pieces[sample][1:-1])
    assert [documents[i] for i in range(len(TEXTS))] == dataset.tokenizer.encode_batch(TEXTS)
    assert len(documents) == len(TEXTS) == dataset.manifest["documents"]
    assert dataset.manifest["text_tokens"] == sum(map(len, documents.values()))


PER_TOKEN = ("input_ids", "positions", "sample_ids", "epochs")


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in PER_TOKEN)


@settings(deadline=None, max_examples=25)
@given(
    batch_rows=st.sampled_from([1, 2, 6, 12, 60]),
    step=st.integers(0, 40),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_batch_is_well_formed_and_splits(dataset, batch_rows, step, seed):
    batches = Batches(dataset, batch_rows=batch_rows, seed=seed)
    batch = batches.at(step)
    total = batch_rows * 16
    for name in PER_TOKEN:
        tensor = getattr(batch, name)
        assert (tensor.shape, tensor.dtype) == ((total,), torch.int64)
    cu = batch.cu_seqlens
    assert (cu.shape, cu.dtype) == ((batch_rows * dataset.max_pieces + 1,), torch.int32)
    assert cu[0] == 0
    pieces = int((cu < total).sum())
    assert cu[pieces:].eq(total).all()
    assert cu[: pieces + 1].diff().min() > 0
    assert cu.diff().max() <= batch.max_seqlen == 16
    real = 0
    for start, end in zip(cu[:pieces].tolist(), cu[1 : pieces + 1].tolist()):
        assert start // 16 == (end - 1) // 16, "a piece lies in one row"
        assert batch.positions[start:end].tolist() == list(range(end - start))
        (sample,) = batch.sample_ids[start:end].unique().tolist()
        padding = batch.input_ids[start:end].eq(dataset.tokenizer.pad_id)
        assert padding.all() if sample == PADDING_SAMPLE else not padding.any()
        real += 0 if sample == PADDING_SAMPLE else end - start
    assert batch.tokens == real
    rows = torch.arange(step * batch_rows, (step + 1) * batch_rows)
    assert batch.epochs.view(-1, 16)[:, 0].tolist() == (rows // dataset.rows).tolist()

    for micro_count in (m for m in (2, 3, 6, batch_rows) if batch_rows % m == 0):
        parts = [batches.at(step, micro, micro_count) for micro in range(micro_count)]
        assert sum(part.tokens for part in parts) == batch.tokens
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in PER_TOKEN}
        assert same(batch, SimpleNamespace(**joined))


def test_cu_seqlens_has_no_more_places_than_the_fullest_row_needs(dataset):
    batches = Batches(dataset, batch_rows=1, seed=0)
    counts = [int((batches.at(step).cu_seqlens < 16).sum()) for step in range(dataset.rows)]
    assert max(counts) == dataset.max_pieces > min(counts)
    fullest = batches.at(counts.index(max(counts))).cu_seqlens
    assert fullest[-1] == 16 > fullest[-2]


def test_batches_hold_no_state(dataset):
    """A seek, a second look, and the batches before change nothing: resume is at(step)."""
    batches = Batches(dataset, batch_rows=6, seed=1)
    forward = [batches.at(step) for step in range(12)]
    assert all(same(batches.at(step), forward[step]) for step in (11, 0, 5, 5))
    assert same(Batches(dataset, batch_rows=6, seed=1).at(11), forward[11])
    assert not same(Batches(dataset, batch_rows=6, seed=2).at(11), forward[11])
    far = 10**9
    assert batches.at(far).epochs.max() == (6 * far + 5) // dataset.rows


def test_the_order_is_the_designs(dataset):
    from fastlm.data.order import perm

    batches = Batches(dataset, batch_rows=6, seed=9)
    rows = np.concatenate([batches.at(step).input_ids.view(6, 16).numpy() for step in range(20)])
    expected = [int(perm(g % dataset.rows, dataset.rows, g // dataset.rows, 9)) for g in range(120)]
    assert np.array_equal(rows, dataset.gather(np.array(expected))[0])


def test_bad_arguments(dataset):
    with pytest.raises(ValueError, match="batch_rows: expected an integer of at least 1, got 0"):
        Batches(dataset, batch_rows=0, seed=0)
    for seed in (1.5, 2**64, None):
        with pytest.raises(ValueError, match="seed: expected an integer from"):
            Batches(dataset, batch_rows=6, seed=seed)
    batches = Batches(dataset, batch_rows=6, seed=0)
    with pytest.raises(ValueError, match="micro_count: expected a divisor of batch_rows=6, got 4; choose"):
        batches.at(0, 0, 4)
    with pytest.raises(ValueError, match="micro: expected an integer from 0 to 1, got 2"):
        batches.at(0, 2, 2)
    last = batches._last_step
    for step in (-1, 1.0, last + 1, 2**70):
        with pytest.raises(ValueError, match=f"step: expected an integer from 0 to {last}, got {step}"):
            batches.at(step)
    assert (6 * last + 5 + 4096) // dataset.rows <= 2**32
    assert batches.at(last).epochs.max() < 2**32


def test_numpy_integers_are_integers(dataset):
    """A seed of np.int32 must not be shifted as 32 bits, and a negative one is its 64 bits."""
    expected = Batches(dataset, batch_rows=6, seed=5).at(3, 1, 2)
    given = Batches(dataset, batch_rows=np.int32(6), seed=np.int32(5)).at(np.int16(3), np.int8(1), np.uint8(2))
    assert same(given, expected)
    assert same(Batches(dataset, batch_rows=6, seed=-1).at(0), Batches(dataset, batch_rows=6, seed=2**64 - 1).at(0))
