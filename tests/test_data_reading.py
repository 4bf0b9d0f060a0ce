"""Reading prepared rows: no row of a damaged shard is given out, nothing waits for shards that it does not read, and
memory does not grow with the rows."""

import errno
import gc
import json
import os
import shutil
import threading
import tracemalloc

import numpy as np
import pytest
from training import corpus, small

from fastlm.data import Batches, Mixture, mixture, open_dataset, prepare, shards
from fastlm.data.mixture import token_counts
from fastlm.data.order import rows_at
from fastlm.data.shards import verify_ahead
from fastlm.data.verification import Verification, check_ahead
from fastlm.run.directory import open_data
from fastlm.storage import json_checksum
from fastlm.train import pretrain


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    prepare(
        corpus(directory / "corpus.txt"),
        "train:200",
        directory / "rows",
        row_tokens=32,
        documents="line",
        shard_rows=10,
        validation_share=0.1,
    )
    return directory / "rows"


@pytest.fixture
def prepared(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "rows")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = r"shard 00001: checksum .*Its rows were not used. Restore it, or delete .*a new run without it starts where"


def test_a_flipped_byte_is_found_before_a_row_of_its_shard_is_used(prepared):
    flip(prepared / "00001.tokens.npy")
    dataset = open_dataset(prepared, lazy=True)
    assert list(dataset.accepted) == [shard["name"] for shard in dataset.manifest["shards"]]
    dataset.gather(np.array([0, 25]))  # of two other shards
    for rows in ([3, 14], [0]):  # once it is known, nothing more is read
        with pytest.raises(ValueError, match=DAMAGE):
            dataset.gather(np.array(rows))
    with pytest.raises(ValueError, match=DAMAGE):
        list(open_dataset(prepared, lazy=True).shards())


def test_a_thread_finds_it_ahead(prepared):
    flip(prepared / "00001.pieces.npy")
    dataset = open_dataset(prepared, lazy=True)
    verify_ahead([dataset]).join(60)
    with pytest.raises(ValueError, match=DAMAGE):
        dataset.gather(np.array([0]))


def test_a_run_stops_on_damaged_rows_and_goes_on_where_they_are_restored(prepared, whole, tmp_path):
    for path in prepared.glob("0*.tokens.npy"):
        flip(path)
    recipe = small(train__max_steps=2, train__warmup_steps=1, data__validation_share=0.1)
    with pytest.raises(ValueError, match=r"shard 0000\d: checksum .*Restore it"):
        pretrain(recipe, prepared, tmp_path / "run", device="cpu")
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    shutil.rmtree(prepared)
    shutil.copytree(whole, prepared)
    assert pretrain(recipe, prepared, tmp_path / "run", device="cpu").summary is not None


def test_no_file_stays_open_and_the_mappings_end_with_the_dataset(prepared):
    def mapped():
        with open("/proc/self/maps") as maps:
            return sum(str(prepared) in line for line in maps)

    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        dataset = open_dataset(prepared, lazy=True)
        tokens = dataset.gather(np.arange(dataset.rows))[0]
        assert np.array_equal(
            tokens, np.concatenate([np.load(path) for path in sorted(prepared.glob("0*.tokens.npy"))])
        )
        assert mapped() == 3 * len(dataset.accepted)
        # Of a mix's sources, each has its shards mapped: open files would be three for each of them.
        assert len(os.listdir("/proc/self/fd")) == before
        kept = dataset._shard(0).tokens
        assert not kept.flags.writeable
        del dataset
        assert mapped() == 1, "a cycle keeps them"
        assert np.array_equal(kept, tokens[: len(kept)])
        del kept
        assert mapped() == 0
    finally:
        gc.enable()


def test_a_file_that_shrinks_under_a_run_is_an_error(prepared):
    dataset = open_dataset(prepared)
    os.truncate(prepared / "00001.tokens.npy", 200)
    with pytest.raises(ValueError, match=r"00001\.tokens\.npy was changed while it was in use: 200 bytes, expected"):
        dataset.gather(np.array([10]))


def test_the_first_shards_header_is_checked_before_another_is_read_by_it(prepared):
    path = prepared / "00000.offsets.npy"
    data = path.read_bytes()
    assert data.count(b"'<i8'") == 1
    path.write_bytes(data.replace(b"'<i8'", b"'>i8'"))
    with pytest.raises(ValueError, match="shard 00000: checksum"):
        open_dataset(prepared, lazy=True).gather(np.array([10]))
    with pytest.raises(ValueError, match="shard 00000: checksum"):
        next(open_dataset(prepared, lazy=True).shards())


def test_a_flipped_bit_of_a_header_is_no_crash(prepared):
    entry = json.loads((prepared / "manifest.json").read_text())["shards"][1]
    path = prepared / "00001.tokens.npy"
    data = path.read_bytes()
    reasons = set()
    for bit in range(0, 128 * 8, 3):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        reasons.add(shards._missing(prepared, entry))
    assert "00001.tokens.npy: it is not the array that was written" in reasons


def test_an_error_that_may_pass_is_not_remembered_as_damage(prepared, monkeypatch):
    dataset, read, failing = open_dataset(prepared, lazy=True), shards.file_checksum, [errno.EMFILE]

    def checksum(*paths):
        if failing:
            raise OSError(failing[0], os.strerror(failing[0]))  # without a file's name, as of `read`
        return read(*paths)

    monkeypatch.setattr(shards, "file_checksum", checksum)
    with pytest.raises(OSError, match="Too many open files"):
        dataset.gather(np.array([0]))
    verify_ahead([dataset]).join(60)
    with pytest.raises(OSError, match="Too many open files"):
        dataset.gather(np.array([0]))
    failing.clear()
    dataset.gather(np.arange(dataset.rows))
    dataset = open_dataset(prepared, lazy=True)
    failing.append(errno.EIO)
    with pytest.raises(ValueError, match=r"shard 00000: one of its files: Input/output error\. Its rows were not used"):
        dataset.gather(np.array([0]))
    failing[0] = errno.EMFILE
    with pytest.raises(OSError, match="Too many open files"):
        open_dataset(prepared, lazy=True)  # of the tokenizer


def test_what_a_glance_shows_is_set_aside_at_the_start(prepared):
    os.truncate(prepared / "00001.tokens.npy", 200)
    (prepared / "00002.pieces.npy").unlink()
    (prepared / "00003.offsets.npy").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"set aside, and not trained on"):
        dataset = open_dataset(prepared, lazy=True)
    assert dataset.set_aside.keys() == {"00001", "00002", "00003"}
    assert "00001.tokens.npy: 10 entries in 200 bytes, expected 10 in" in dataset.set_aside["00001"]
    assert list(dataset.accepted)[:2] == ["00000", "00004"]
    dataset.gather(np.arange(dataset.rows))


def test_one_thread_of_a_run_checks_both_splits_of_all_sources(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "more")
    checked, read = set(), shards._damage

    def damage(directory, name, checksum):
        checked.add((directory, name, threading.current_thread()))
        return read(directory, name, checksum)

    monkeypatch.setattr(shards, "_damage", damage)
    recipe = small(data__validation_share=0.1, data__weights="2,1")
    data = open_data(recipe, [prepared, tmp_path / "more"], prepared / "run", None)
    for thread in threading.enumerate():
        if thread.name == "checksums of shards":
            thread.join(60)
    sources = [*data.train.sources, *data.validation.sources]
    assert [source._verification._left for source in sources] == [0] * 4
    assert {entry[:2] for entry in checked} == {
        (source.directory, name) for source in sources for name in source.accepted
    }
    assert len({thread for *_, thread in checked}) == 1


def test_a_shard_is_checked_once_and_only_its_readers_wait():
    hold, checked = threading.Event(), []

    def check(shard):
        if shard == 0:
            assert hold.wait(60)
        checked.append(shard)
        return "bad" if shard == 3 else None

    verification = Verification(4, check)
    thread = check_ahead([verification])
    assert verification.need([1, 2]) == {}  # the thread is held at shard 0
    assert sorted(checked) == [1, 2]
    waiting = threading.Thread(target=verification.need, args=([0],))
    waiting.start()
    hold.set()
    waiting.join(60)
    thread.join(60)
    assert verification.need([1]) == {3: "bad"}
    assert sorted(checked) == [0, 1, 2, 3]


def test_tokens_are_counted_in_the_shards_that_the_first_rows_are_from(prepared, monkeypatch):
    dataset = open_dataset(prepared, lazy=True)
    monkeypatch.setattr(mixture, "_COUNTED_SHARDS", len(dataset.accepted))
    for source in (dataset, Mixture([dataset], "1")):
        rows = source.order(np.arange(source.rows), 5)[1]
        assert np.array_equal(source.nearby(rows, len(dataset.accepted)), rows)
        expected = np.bincount(dataset.gather(rows)[0].ravel(), minlength=dataset.tokenizer.vocab_size)
        assert np.array_equal(token_counts(source, 5), expected)
    monkeypatch.setattr(mixture, "_COUNTED_SHARDS", 2)
    for kind in (lambda source: source, lambda source: Mixture([source], "1")):
        lazy = open_dataset(prepared, lazy=True)
        source = kind(lazy)
        rows = source.order(np.arange(source.rows), 5)[1]
        near = source.nearby(rows, 2)
        first = list(dict.fromkeys((rows // 10).tolist()))[:2]
        assert sorted(set((near // 10).tolist())) == sorted(first)
        assert len(set(near.tolist())) > 10
        counts = token_counts(source, 5)
        assert counts.sum() == expected.sum()
        assert lazy._verification._left == len(lazy.accepted) - len({0, *first})
        assert np.minimum(counts, expected).sum() > 0.5 * expected.sum()


ROWS, SHARDS = 10**9, 1000  # of a shard, and how many


def virtual(directory, whole):
    """10^12 rows of 32 tokens: 1000 shards, in turn links to the files of two, which are sparse."""
    directory.mkdir()
    shutil.copytree(whole / "tokenizer", directory / "tokenizer")
    manifest = json.loads((whole / "manifest.json").read_text())
    del manifest["checksum"]
    kinds = (np.uint8, (ROWS, 32)), (np.int64, (ROWS + 1,)), (np.int64, (ROWS, 2))
    arrays = [
        [
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            for path, (dtype, shape) in zip(shards._paths(directory, f"{index:05d}"), kinds, strict=True)
        ]
        for index in range(2)
    ]
    for index in range(2, SHARDS):
        for source, link in zip(*(shards._paths(directory, f"{i:05d}") for i in (index % 2, index)), strict=True):
            os.link(source, link)
    entry = {"rows": ROWS, "pieces": ROWS, "max_pieces": 2, "used": [0], "checksum": "0"}
    manifest |= {"rows": ROWS * SHARDS, "shards": [{"name": f"{i:05d}", **entry} for i in range(SHARDS)]}
    (directory / "manifest.json").write_text(json.dumps({**manifest, "checksum": json_checksum(manifest)}))
    return arrays


def test_a_million_million_rows_take_constant_memory(whole, tmp_path, monkeypatch):
    arrays = virtual(tmp_path / "virtual", whole)
    monkeypatch.setattr(shards, "_damage", lambda *_: None)  # their sum would be that of 56 TB
    files = len(os.listdir("/proc/self/fd"))
    dataset = open_dataset(tmp_path / "virtual", lazy=True)
    assert dataset.rows == 10**12
    batches = Batches(dataset, batch_rows=16, seed=7)
    steps = np.random.default_rng(0).integers(0, 10**12, 3).tolist()  # sixteen epochs
    orders = {step: rows_at(np.arange(step * 16, step * 16 + 16), 10**12, 7) for step in steps}
    for _, rows in orders.values():
        for index, row in zip((rows // ROWS).tolist(), (rows % ROWS).tolist(), strict=True):
            tokens, offsets, pieces = arrays[index % 2]
            tokens[row] = 1 + (row + index % 2) % 200
            offsets[row : row + 2] = row, row + 1
            pieces[row] = row << 24, 0
    tracemalloc.start()
    try:
        for step, (epochs, rows) in orders.items():
            batch = batches.at(step)
            index, row = rows // ROWS, rows % ROWS
            assert np.array_equal(batch.input_ids.numpy().reshape(16, 32)[:, 0], 1 + (row + index % 2) % 200)
            assert np.array_equal(batch.sample_ids.numpy()[::32], row << 24)
            assert np.array_equal(batch.epochs.numpy()[::32], epochs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20, peak  # one byte a row would be 10^12
    assert len(os.listdir("/proc/self/fd")) == files
