"""Reading prepared rows: no row of a damaged shard is given out, nothing waits for shards that it does not read, and
memory does not grow with the rows."""

import gc
import json
import os
import shutil
import threading
import tracemalloc

import numpy as np
import pytest
from training import corpus, small

from fastlm.data import Batches, open_dataset, prepare, shards
from fastlm.data.order import rows_at
from fastlm.data.verification import Verification
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
    dataset.verify_ahead()
    dataset._verification._thread.join(60)
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


def test_the_files_are_closed_with_the_dataset(prepared):
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        dataset = open_dataset(prepared, lazy=True)
        dataset.gather(np.arange(dataset.rows))
        assert len(os.listdir("/proc/self/fd")) >= before + 3
        del dataset
        assert len(os.listdir("/proc/self/fd")) == before, "a cycle keeps them"
    finally:
        gc.enable()


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


def test_the_threads_of_a_run_check_both_splits(prepared):
    data = open_data(small(data__validation_share=0.1), prepared, prepared / "run", None)
    for dataset in (data.train, data.validation):
        dataset._verification._thread.join(60)
        assert dataset._verification._left == 0


def test_a_shard_is_checked_once_and_only_its_readers_wait():
    hold, checked = threading.Event(), []

    def check(shard):
        if shard == 0:
            assert hold.wait(60)
        checked.append(shard)
        return "bad" if shard == 3 else None

    verification = Verification(4, check)
    verification.start()
    assert verification.need([1, 2]) == {}  # the thread is held at shard 0
    assert sorted(checked) == [1, 2]
    waiting = threading.Thread(target=verification.need, args=([0],))
    waiting.start()
    hold.set()
    waiting.join(60)
    verification._thread.join(60)
    assert verification.need([1]) == {3: "bad"}
    assert sorted(checked) == [0, 1, 2, 3]


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
    assert len(os.listdir("/proc/self/fd")) <= files + 3 * shards._MAPPED
