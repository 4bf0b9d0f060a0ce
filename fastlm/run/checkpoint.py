"""Checkpoints: whole or absent, checked before they are used, and nothing in them is unpickled.

    RUN/checkpoints/step-00001000/
        model.safetensors        parameters, float32, by their names
        optimizer.safetensors    the optimizer's state, "<parameter>.<what>"
        state.json               step, recipe, data, counters
        manifest.json            a checksum of each of these, and of itself

A run with train.shard has model-00000-of-00002.safetensors and so on, from each process its rows of every tensor. Any
number of processes loads either.

A checkpoint is written under a hidden name, synced and renamed (`fastlm.storage`), so a process killed at any
instant leaves the ones before it as they were. All randomness is a function of (seed, step): there is no generator
to store.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from fastlm import storage
from fastlm.run import image
from fastlm.run.image import Image
from fastlm.storage import (
    atomic_directory,
    atomic_file,
    json_checksum,
    replace_json,
    sweep,
    write_json,
)

FORMAT = "fastlm checkpoint"
VERSION = 2
_CHECKSUMS = {1: storage.file_checksum, 2: image.file_checksum}  # by version
WEIGHTS, STATE = "model.safetensors", "state.json"
_REST = 1 << 16  # bytes of a checkpoint beside its tensors, about
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """One on disk whose checksums hold; `state` is its state.json, `files` the names of its files."""

    path: Path
    step: int
    state: dict
    files: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory of its own: training may go on while it is written.

    weights, moments   the two files with tensors
    shard              (number, how many): which part of each tensor's rows these are; (0, 1): all of them
    """

    step: int
    weights: Image
    moments: Image
    state: dict
    shard: tuple[int, int] = (0, 1)

    def names(self, number: int) -> tuple[str, str]:
        """Of the two files with the tensors of shard `number`."""
        count = self.shard[1]
        part = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        return f"model{part}.safetensors", f"optimizer{part}.safetensors"

    @property
    def size(self) -> int:
        """Bytes on the disk, about; all shards together."""
        return _REST + self.shard[1] * (self.weights.size + self.moments.size)


def snapshot(
    step: int,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict,
    shard: tuple[int, int] = (0, 1),
    into: Snapshot | None = None,
) -> Snapshot:
    """A copy of the parameters, by name, and of the optimizer's state of them. `state` is what JSON can hold.

    into: an earlier one, whose memory is written over (`Image`).
    """
    names = {parameter: name for name, parameter in parameters.items()}
    weights = {name: p.detach() for p, name in names.items()}
    moments = {
        f"{names[parameter]}.{key}": value.detach()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    images = Image(weights, into and into.weights), Image(moments, into and into.moments)
    if any(tensor.is_cuda for tensor in parameters.values()):
        torch.cuda.synchronize()  # of the copies
    return Snapshot(step, *images, {**state, "step": step}, shard)


def write_shard(directory: Path, snap: Snapshot) -> None:
    """Write the tensors of a snapshot that is one of several, for `write_checkpoint` of the first to take.

    Their checksums are written beside them, so that the first need not read them.
    """
    folder, kept = _shards(directory, snap.step), _kept(directory, snap.step)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(snap.names(snap.shard[0]), (snap.weights, snap.moments)):
        with atomic_file(folder / name, what="the checkpoint", need=snap.size, kept=kept) as partial:
            checksum = part.write(partial)
        replace_json(folder / f"{name}.json", checksum)


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def write_checkpoint(directory: Path, snap: Snapshot, *, keep: int, best: int = 0) -> Path:
    """Write directory/step-N, then delete all but the newest `keep` and that of step `best`.

    What killed writers left of any step goes first: their runs may never come by the same step again. The shards of the
    other processes, if there are any, lie there already (`write_shard`).
    """
    sweep(directory, "step-*")
    target, shards = checkpoint_path(directory, snap.step), _shards(directory, snap.step)
    kept = _kept(directory, snap.step)
    with atomic_directory(target, what="the checkpoint", need=snap.size, kept=kept) as partial:
        files = {
            name: part.write(partial / name)
            for name, part in zip(snap.names(snap.shard[0]), (snap.weights, snap.moments))
        }
        for number in range(1, snap.shard[1]):
            for name in snap.names(number):
                try:
                    files[name] = json.loads((shards / f"{name}.json").read_text(encoding="utf-8"))
                    os.rename(shards / name, partial / name)
                except FileNotFoundError as error:
                    raise ValueError(
                        f"out: rank {number} wrote {name}, but it is not in {shards}; with train.shard, expected a "
                        "directory in a file system that all machines share"
                    ) from error
        write_json(partial / STATE, snap.state)
        files[STATE] = image.file_checksum(partial / STATE)
        manifest = {"format": FORMAT, "version": VERSION, "step": snap.step, "files": dict(sorted(files.items()))}
        write_json(partial / "manifest.json", {**manifest, "checksum": json_checksum(manifest)})
        if target.exists():  # one that was found damaged, or the run would have gone on from there
            shutil.rmtree(target)
    for stale in directory.glob(".step-*.shards"):
        # Other processes may be writing those of later steps already: they do not wait for this one.
        if int(stale.name.split("-")[1].split(".")[0]) <= snap.step:
            shutil.rmtree(stale)
    spared = target, checkpoint_path(directory, best)
    others = [path for path in _found(directory) if path not in spared]  # a newer one may be there, damaged
    for old in others[keep - 1 :]:
        shutil.rmtree(old)
    return target


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, *, keep: int
) -> Path:
    """`snapshot` and `write_checkpoint` in one."""
    return write_checkpoint(directory, snapshot(step, dict(model.named_parameters()), optimizer, state), keep=keep)


def _kept(directory: Path, step: int) -> str:
    """For the error where there is no room for the checkpoint of `step`."""
    before = next((path for path in _found(directory) if int(_NAME.fullmatch(path.name)[1]) != step), None)
    if before is None:
        return "there is none before it; make room, and the same command starts again"
    return f"the one before, {before}, is whole; make room, and the same command continues from there"


def _shards(directory: Path, step: int) -> Path:
    return directory / f".step-{step:08d}.shards"


class Writer:
    """Writes checkpoints in a thread, one at a time. An error of a write is raised by the next call.

    As a context manager it waits for the last write. Where the block ends with an error, that error is raised, and an
    error of the write is a warning.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastlm-checkpoint", initializer=_be_nice)
        self._pending: Future | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Call `write` in the thread, after the one before has ended."""
        self.wait()
        self._pending = self._thread.submit(write)

    @property
    def idle(self) -> bool:
        """Whether the last write has ended."""
        return self._pending is None or self._pending.done()

    def check(self) -> None:
        """Raise the error of a write that has ended with one; without waiting."""
        if self.idle:
            self.wait()

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except Exception as late:
            if error is None:
                raise
            warnings.warn(f"{late}", stacklevel=2)
        finally:
            self._thread.shutdown()


def _be_nice() -> None:
    """Run this thread where the training's threads leave a core idle (Linux: niceness is a thread's own)."""
    if hasattr(threading, "get_native_id") and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def load_newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint in `directory`, if any, and for each newer one a line that says what is wrong."""
    skipped = []
    for path in _found(directory):
        try:
            return read_checkpoint(path), skipped
        except ValueError as error:
            skipped.append(str(error))
    return None, skipped


def newest_name(directory: Path) -> str:
    """For messages: the path of the newest checkpoint in `directory`, unread; "none" where there is none."""
    return str(next(iter(_found(directory)), "none"))


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the directory `path`, after checking every checksum. ValueError says what is wrong with it."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        whole = manifest.pop("checksum") == json_checksum(manifest)
        form, version = manifest["format"], manifest["version"]
        if form != FORMAT or version not in _CHECKSUMS:
            raise ValueError(f"its format is {(form, version)}, expected {(FORMAT, VERSION)}")
        checksum_of = _CHECKSUMS[version]
        for name, checksum in manifest["files"].items():
            if not whole or checksum_of(path / name) != checksum:
                raise ValueError(f"{name if whole else 'manifest.json'} does not match its checksum")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path}: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    return Checkpoint(path, manifest["step"], state, tuple(manifest["files"]))


def read_tensors(checkpoint: Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of the "model" or the "optimizer", whole, however many processes wrote them."""
    names = sorted(name for name in checkpoint.files if name.startswith(kind))
    parts = [load_file(checkpoint.path / name) for name in names]
    return {
        name: torch.cat([part[name] for part in parts]) if len(parts) > 1 and first.dim() else first
        for name, first in parts[0].items()
    }


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor] | None = None,
    part: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole,
) -> None:
    """Put the checkpoint's tensors into the model's parameters and the optimizer's state, on their devices.

    parameters: what the optimizer has, by name, where that is only a part of the model's. part: that of a whole tensor.

    ValueError where the names or shapes are not this model's.
    """
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    restore_weights(checkpoint, model, parameters, part)
    for name, value in read_tensors(checkpoint, "optimizer").items():
        name, _, key = name.rpartition(".")
        parameter = parameters[name]
        optimizer.state[parameter][key] = (part(value) if value.dim() else value).to(parameter.device)


def restore_weights(
    checkpoint: Checkpoint,
    model: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    part: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole,
) -> None:
    """`restore` of the parameters alone."""
    weights = read_tensors(checkpoint, "model")
    ours = {name: tuple(p.shape) for name, p in model.named_parameters()}
    theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
    if ours != theirs:
        name = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
        raise ValueError(
            f"checkpoint {checkpoint.path}: {name} is {theirs.get(name, 'missing')}, the model's is "
            f"{ours.get(name, 'none')}; resume with the model that the run was started with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(part(weights[name]))


def _found(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first, whatever their condition."""
    paths = (path for path in directory.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(paths, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)
