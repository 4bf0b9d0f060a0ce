"""Runs that are killed: at random moments, at the end of an epoch, at every call of a checkpoint's write."""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import warnings

import kill_worker
import pytest
import torch
from training import corpus, small

from fastlm.data import open_dataset
from fastlm.run.checkpoint import Snapshot, Writer, load_newest, read_tensors, write_checkpoint, write_shard
from fastlm.run.image import Image
from fastlm.run.metrics import read_metrics
from fastlm.run.recipe import Recipe
from fastlm.storage import NoSpace
from fastlm.train import loop, pretrain

TRAIN = {"batch_tokens": 256, "max_steps": 90, "warmup_steps": 4, "lr": 5e-3, "checkpoint_every": 3}
DATA = {"row_tokens": 32, "documents": "line"}
RECIPES = {
    "masked_lm": {
        "task": "masked_lm",
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        "data": {**DATA, "tokenizer": "train:200"},
        "train": TRAIN,
    },
    "causal_lm": {
        "task": "causal_lm",
        "model": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "data": {**DATA, "tokenizer": "chars", "validation_share": 0.1},
        "train": {**TRAIN, "eval_every": 7, "optimizer": "muon"},
    },
    "span_corruption": {
        "task": "span_corruption",
        "model": {"architecture": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
        "data": {**DATA, "tokenizer": "train:400"},
        "train": {**TRAIN, "optimizer": "lamb"},
    },
}
KILLS = {"masked_lm": 7, "causal_lm": 7, "span_corruption": 6}


@pytest.fixture(scope="module")
def processes():
    """Starts `kill_worker.live` in processes that are forked from one that has imported it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kill_worker"])

        def start(*arguments):
            process = context.Process(target=kill_worker.live, args=arguments)
            process.start()
            return process

        yield start


def steps(out):
    path = out / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


def files(out):
    """What the run learned, to the bit."""
    newest = load_newest(out / "checkpoints")[0]
    found = [newest.path / name for name in newest.files if name != "state.json"] + [out / "hf" / "model.safetensors"]
    return {path.name if path.parent == newest.path else "hf": path.read_bytes() for path in found}


def kill_and_resume(processes, content, kills, folder):
    """A run that is killed at random moments, but once in the step that crosses the end of an epoch."""
    task, draw = content["task"], random.Random(content["task"])
    whole, cut, text = folder / "whole", folder / "cut", corpus(folder / "corpus.txt")
    process = processes(content, text, whole, None)
    process.join(300)
    assert process.exitcode == 0
    data = whole / "data"
    epoch = open_dataset(data).rows * DATA["row_tokens"] / TRAIN["batch_tokens"]  # in steps
    during_a_write = 0
    for number in range(kills):
        newest = load_newest(cut / "checkpoints")[0]
        start = 0 if newest is None else newest.step
        at = int((start // epoch + 1) * epoch) if number == kills // 2 else None
        assert at is None or at < content["train"]["max_steps"]
        process = processes(content, data, cut, at)
        if at is None:
            reached = start + draw.randrange(1, 8)
            moment = time.monotonic() + 200
            while steps(cut) < reached and process.is_alive() and time.monotonic() < moment:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.03))
            process.kill()
        process.join(200)
        assert process.exitcode == -signal.SIGKILL
        during_a_write += bool(list((cut / "checkpoints").glob(".step-*")))
    process = processes(content, data, cut, None)
    process.join(300)
    assert process.exitcode == 0
    print(f"{task}: {during_a_write} of {kills} kills hit a write")
    rows = [read_metrics(out / "metrics.jsonl") for out in (whole, cut)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert len(rows[1]) == content["train"]["max_steps"]
    assert files(cut) == files(whole)


def test_kills_change_no_bit(processes, tmp_path):
    content = RECIPES["masked_lm"]  # its first epoch ends in step 25
    kill_and_resume(processes, {**content, "train": {**content["train"], "max_steps": 30}}, 2, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("task", RECIPES)
def test_twenty_kills_change_no_bit(task, processes, tmp_path):
    kill_and_resume(processes, RECIPES[task], KILLS[task], tmp_path)


# ---- a checkpoint's write


def snap(step, number=0, count=1):
    """Two tensors of four rows, of which each shard has its part."""
    rows = slice(number * 4 // count, (number + 1) * 4 // count)
    whole = torch.arange(8.0).view(4, 2) + step
    return Snapshot(
        step, Image({"w": whole[rows]}), Image({"w.exp_avg": -whole[rows]}), {"step": step}, (number, count)
    )


def write(directory, step, count=1):
    for number in range(1, count):
        write_shard(directory, snap(step, number, count))
    write_checkpoint(directory, snap(step, 0, count), keep=2)


def holds(directory, step):
    found, _ = load_newest(directory)
    assert found.step == step
    assert torch.equal(read_tensors(found, "model")["w"], torch.arange(8.0).view(4, 2) + step)
    assert torch.equal(read_tensors(found, "optimizer")["w.exp_avg"], -torch.arange(8.0).view(4, 2) - step)


def killed_at(call, function):
    """Whether a child that runs `function` was killed before its file operation number `call`."""
    child = os.fork()
    if child == 0:
        left = [call]

        def hook(event, _):
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("count", "stride"),
    [(1, 1), (2, 4), pytest.param(2, 1, marks=pytest.mark.long), pytest.param(3, 1, marks=pytest.mark.long)],
)
def test_killed_at_any_call_of_a_write(count, stride, tmp_path):
    """The checkpoint before is whole, or the new one; the next write leaves nothing of the killed one."""
    write(tmp_path, 1, count)
    write(tmp_path, 2, count)
    calls = 0
    while killed_at(calls, lambda: write(tmp_path, 3, count)):
        found, skipped = load_newest(tmp_path)
        assert found.step in (2, 3)
        assert skipped == []
        holds(tmp_path, found.step)
        calls += stride
    assert calls > 10
    holds(tmp_path, 3)
    write(tmp_path, 4, count)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_shards_that_another_number_of_processes_left(tmp_path):
    """Four processes were killed before the first took the others' shards; two continue and come by the same step."""
    write(tmp_path, 1, 4)
    for number in (1, 2, 3):
        write_shard(tmp_path, snap(2, number, 4))
    write(tmp_path, 2, 2)
    holds(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_shards_of_the_next_checkpoint_stay(tmp_path):
    """The other processes do not wait for the first one's write."""
    write_shard(tmp_path, snap(1, 1, 2))
    write_shard(tmp_path, snap(2, 1, 2))
    write_checkpoint(tmp_path, snap(1, 0, 2), keep=2)
    write_checkpoint(tmp_path, snap(2, 0, 2), keep=2)
    holds(tmp_path, 2)


def test_a_shard_on_the_disk_of_another_machine(tmp_path):
    with pytest.raises(
        ValueError, match=r"out: rank 1 wrote model-00001-of-00002\.safetensors, but .* all machines share"
    ):
        write_checkpoint(tmp_path, snap(1, 0, 2), keep=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "optimizer-00002-of-00003.safetensors"])
def test_a_flipped_byte_of_any_shard(name, tmp_path):
    write(tmp_path, 1, 3)
    write(tmp_path, 2, 3)
    path = tmp_path / "step-00000002" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)
    found, skipped = load_newest(tmp_path)
    assert skipped == [f"checkpoint {path.parent}: {name} does not match its checksum"]
    holds(tmp_path, 1)
    assert found.step == 1
    path.unlink()
    assert load_newest(tmp_path)[1] == [f"checkpoint {path.parent}: {name} is missing"]


def test_a_stray_file_is_not_read(tmp_path):
    write(tmp_path, 1, 2)
    path = tmp_path / "step-00000001"
    (path / "model-copy.safetensors").write_bytes((path / "model-00000-of-00002.safetensors").read_bytes())
    holds(tmp_path, 1)


# ---- the thread that writes


def fail():
    raise NoSpace("no room")


def test_an_error_of_a_write_is_raised_at_the_next_check():
    ended = threading.Event()

    def write_and_fail():
        ended.wait(10)
        fail()

    with Writer() as writer:
        writer.submit(write_and_fail)
        writer.check()  # it is still writing
        ended.set()
        with pytest.raises(NoSpace, match="no room"):
            writer.wait()
        writer.check()  # raised once


@pytest.mark.parametrize("later", ["submit", "close"])
def test_an_error_of_a_write_is_raised_later(later):
    written = []

    def block():
        with Writer() as writer:
            writer.submit(fail)
            if later == "submit":
                writer.submit(lambda: written.append(1))

    with pytest.raises(NoSpace):
        block()
    assert written == []


def test_the_error_of_the_loop_is_not_hidden_by_that_of_a_write():
    def block():
        with Writer() as writer:
            writer.submit(fail)
            raise RuntimeError("the loop's")

    with pytest.warns(UserWarning, match="no room"), pytest.raises(RuntimeError, match="the loop's"):
        block()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_during_a_write_leaves_a_whole_checkpoint(error, tmp_path, monkeypatch):
    """The loop fails in the step after a checkpoint, while the thread writes it."""
    text, going = corpus(tmp_path / "corpus.txt"), threading.Event()
    original_write, original_step = loop.write_checkpoint, loop.train_step

    def write_slowly(*arguments, **options):
        assert going.wait(20)
        return original_write(*arguments, **options)

    def step(model, optimizer, micros, **arguments):
        if int(micros[0].inputs["rng"][1]) == 4:
            threading.Timer(0.05, going.set).start()
            raise error("in the loop")
        return original_step(model, optimizer, micros, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_checkpoint", write_slowly)
        patch.setattr(loop, "train_step", step)
        with pytest.raises(error, match="in the loop"):
            pretrain(small(), text, tmp_path / "run")
    assert load_newest(tmp_path / "run" / "checkpoints")[0].step == 4
    assert pretrain(small(), text, tmp_path / "run").step == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_write(number, tmp_path, monkeypatch):
    """The run ends by a checkpoint of its own, after the one that is being written."""
    text, going, original = corpus(tmp_path / "corpus.txt"), threading.Event(), loop.write_checkpoint

    def write_slowly(directory, taken, **options):
        if taken.step == 4:
            os.kill(os.getpid(), number)
            assert going.wait(20)
        return original(directory, taken, **options)

    monkeypatch.setattr(loop, "write_checkpoint", write_slowly)
    threading.Timer(0.3, going.set).start()
    result = pretrain(small(), text, tmp_path / "run")
    assert result.stopped_by == number
    assert result.step in range(4, 8)
    assert load_newest(tmp_path / "run" / "checkpoints")[0].step == result.step


def test_a_full_disk_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    """Not at the next checkpoint, hundreds of steps later."""
    text, full = corpus(tmp_path / "corpus.txt"), threading.Event()
    original_write, original_step = loop.write_checkpoint, loop.train_step

    def write(directory, taken, **options):
        if taken.step == 8:
            full.set()
            fail()
        return original_write(directory, taken, **options)

    def step(model, optimizer, micros, **arguments):
        if int(micros[0].inputs["rng"][1]) == 8:
            assert full.wait(20)
            time.sleep(0.2)  # until the thread has ended the write
        return original_step(model, optimizer, micros, **arguments)

    monkeypatch.setattr(loop, "write_checkpoint", write)
    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(warnings, "showwarning", pytest.fail)
    with pytest.raises(NoSpace, match="no room"):
        pretrain(small(train__max_steps=100, train__checkpoint_every=4), text, tmp_path / "run")
    assert steps(tmp_path / "run") in (8, 9)
    assert load_newest(tmp_path / "run" / "checkpoints")[0].step == 4


def test_recipes_of_all_tasks_are_killed():
    assert [Recipe.from_dict(content).task for content in RECIPES.values()] == list(KILLS)
    assert sum(KILLS.values()) == 20
