"""Two processes, as torchrun starts them: the same run as one process, checkpoints for either, a process that dies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_store import Store
from parallel_worker import LOW, MUON, RUNS, recipe
from training import corpus

from fastlm.data import prepare
from fastlm.run.checkpoint import load_newest, read_tensors
from fastlm.run.metrics import read_metrics
from fastlm.train import loop, pretrain
from fastlm.train.parallel import Heartbeat, World

HERE = Path(__file__).parent


def torchrun(folder, *arguments):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "parallel_worker.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *command, str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def losses(run):
    return [(row["loss"], row.get("val_loss")) for row in read_metrics(run / "metrics.jsonl")]


def close(found, expected):
    assert len(found) == len(expected)
    for (loss, held), (its, its_held) in zip(found, expected):
        assert loss == pytest.approx(its, rel=1e-5)
        assert held == its_held or held == pytest.approx(its_held, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    prepare(
        corpus(folder / "corpus.txt"),
        "train:200",
        folder / "rows",
        row_tokens=32,
        documents="line",
        validation_share=0.1,
    )
    pretrain(recipe(), folder / "rows", folder / "one")
    pretrain(recipe(optimizer="muon"), folder / "rows", folder / "one-muon")
    original, steps = loop.train_step, []

    def step(*args, **arguments):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return original(*args, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe(optimizer="muon"), folder / "rows", folder / "from-one")
    done = torchrun(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_two_processes_train_as_one_does(folder):
    """With dropout, and micro-batches of unequal numbers of predicted tokens."""
    close(losses(folder / "ddp"), losses(folder / "one"))
    rows = [read_metrics(folder / name / "metrics.jsonl") for name in ("ddp", "one")]
    assert [row["tokens"] for row in rows[0]] == [row["tokens"] for row in rows[1]]
    newest = [load_newest(folder / name / "checkpoints")[0] for name in ("ddp", "one")]
    for kind in ("model", "optimizer"):
        ours, theirs = (read_tensors(checkpoint, kind) for checkpoint in newest)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)
    assert (folder / "ddp" / "hf" / "model.safetensors").is_file()
    assert (folder / "ddp" / "loss.png").is_file()


@pytest.mark.parametrize(("name", "whole"), [("ddp-first", "one"), ("fsdp-first", "one-muon")])
def test_one_process_continues_what_two_began(folder, name, whole):
    """All processes stopped at the same step, although only one was told to."""
    assert len(losses(folder / name)) == RUNS[name][0] + 1  # told in the middle of one, they agree in the next
    files = {path.name for path in load_newest(folder / name / "checkpoints")[0].path.iterdir()}
    assert ("model-00001-of-00002.safetensors" in files) == ("shard" in RUNS[name][1])
    settings = {**RUNS[name][1], "shard": False}
    pretrain(recipe(**settings), folder / "rows", folder / name)
    close(losses(folder / name), losses(folder / whole))


def test_two_processes_continue_what_one_began(folder):
    close(losses(folder / "from-one"), losses(folder / "one-muon"))
    exported = [load_newest(folder / name / "checkpoints")[0] for name in ("from-one", "one-muon")]
    ours, theirs = (read_tensors(checkpoint, "model") for checkpoint in exported)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)
    assert MUON["shard"]
    assert (folder / "from-one" / "hf" / "model.safetensors").is_file()


def test_two_processes_in_bfloat16(folder):
    """As one process, to rounding. Their weights are compared after every step, by the worker.

    A run that was interrupted has the bits of one that was not.
    """
    for name, dtype in (("one-low", "bfloat16"), ("one-high", "float32")):
        pretrain(recipe(**{**LOW, "dtype": dtype}), folder / "rows", folder / name)
    two, one, high = (
        torch.tensor([loss for loss, _ in losses(folder / name)]) for name in ("low", "one-low", "one-high")
    )
    torch.testing.assert_close(two[0], one[0], rtol=1e-6, atol=0)  # of the same weights
    assert (two - one).abs().max() <= (one - high).abs().max()
    assert losses(folder / "low-first") == losses(folder / "low")
    for kind in ("model", "optimizer"):
        ours, theirs = (
            read_tensors(load_newest(folder / name / "checkpoints")[0], kind) for name in ("low-first", "low")
        )
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_killed_process_ends_the_run_with_its_name(folder):
    start = time.monotonic()
    done = torchrun(folder, "kill")
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    assert "rank 1 (" in done.stderr
    assert "has ended" in done.stderr
    assert "step-00000004; the same command continues from there" in done.stderr
    pretrain(recipe(), folder / "rows", folder / "killed")
    close(losses(folder / "killed"), losses(folder / "one"))


def test_ranks_that_do_not_divide_the_micro_batches():
    world = World(1, 3, torch.device("cpu"))
    assert list(world.micros(6)) == [2, 3]
    with pytest.raises(
        ValueError, match=r"train\.micro_batch_tokens: expected so few that 3 processes divide .* got 4 of them; halve"
    ):
        world.micros(4)


def test_processes_that_start_apart_are_refused():
    """As where OUT is on a disk that the machines do not share."""
    store = Store()
    worlds = [World(rank, 2, torch.device("cpu"), store) for rank in range(2)]
    worlds[1]._prefix = worlds[0]._prefix
    for step in (4, 8):
        store.set(f"{worlds[0]._prefix}/agree/1", json.dumps({"the step to start from": step}))
        if step == 4:
            worlds[0].agree({"the step to start from": 4}, "share OUT")
    with pytest.raises(ValueError, match="the step to start from: rank 1 has 8, rank 0 has 4; share OUT"):
        worlds[0].agree({"the step to start from": 4}, "share OUT")
    with pytest.raises(ValueError, match="the step to start from: rank 1 has 8, rank 0 has 4; share OUT"):
        worlds[1].agree({"the step to start from": 8}, "share OUT")


def test_a_silent_process_is_named_on_a_clock(monkeypatch):
    now, said, store = [0.0], [], Store()
    world = World(0, 2, torch.device("cpu"), store)
    other = World(1, 2, torch.device("cpu"), store)
    other._prefix = world._prefix
    watch = Heartbeat(world, lambda: "resume so", said.append, beat=1.0, silent=30.0, clock=lambda: now[0])
    store.set(f"{world._prefix}/host/1", "somewhere, process 7")

    def wait(seconds):
        """Instead of the time: 20 s with heartbeats of the other, then none."""
        now[0] += seconds
        if now[0] <= 20:
            store.add(f"{world._prefix}/beat/1", 1)
        return now[0] > 100

    monkeypatch.setattr(watch._stop, "wait", wait)
    watch._run()
    assert said == ["rank 1 (somewhere, process 7) has not answered for 30 s; resume so"]
    assert 50 < now[0] < 53
