"""Files and directories: complete or absent; leftovers of killed writers are removed."""

import fcntl
import json
import os

import pytest

from fastlm import storage


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_synced_then_renamed_then_its_directory_synced(tmp_path, monkeypatch):
    calls, fsync, replace = [], storage.fsync, os.replace

    def watched_fsync(path):
        calls.append(("fsync", path))
        fsync(path)

    def watched_replace(source, target):
        assert json.loads(source.read_text()) == {"a": 1}
        assert target.read_text() == "old"
        calls.append(("replace", source))
        replace(source, target)

    monkeypatch.setattr(storage, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    (tmp_path / "x.json").write_text("old")
    storage.replace_json(tmp_path / "x.json", {"a": 1})
    partial = calls[0][1]
    assert calls == [("fsync", partial), ("replace", partial), ("fsync", tmp_path)]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert names(tmp_path) == ["x.json"]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "x").write_text("old")

    def write_half():
        with storage.atomic_file(tmp_path / "x") as partial:
            partial.write_text("half")
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        write_half()
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_the_dead_are_swept_and_the_living_are_not(tmp_path):
    for name in (".x.partial-dead", ".y.partial-dead", ".x.partial-alive"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".x.partial-folder").mkdir()
    (tmp_path / ".x.partial-folder" / "file").write_text("half")
    alive = os.open(tmp_path / ".x.partial-alive", os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    try:
        with storage.atomic_file(tmp_path / "x") as partial:
            partial.write_text("whole")
        assert names(tmp_path) == [".x.partial-alive", ".y.partial-dead", "x"]
        storage.sweep(tmp_path, "*")
        assert names(tmp_path) == [".x.partial-alive", "x"]
    finally:
        os.close(alive)
    storage.sweep(tmp_path, "x")
    assert names(tmp_path) == ["x"]
