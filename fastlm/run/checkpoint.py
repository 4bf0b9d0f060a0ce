"""Checkpoints: whole or absent, checked before they are used, and nothing in them is unpickled.

    RUN/checkpoints/step-00001000/
        model.safetensors        parameters, float32, by their names
        optimizer.safetensors    the optimizer's state, "<parameter>.<what>"
        state.json               step, recipe, data, counters
        manifest.json            SHA-256 of each of these, and of itself

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
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlm.storage import atomic_directory, file_checksum, fsync, json_checksum, sweep, write_json

FORMAT = "fastlm checkpoint"
VERSION = 1
WEIGHTS, STATE = "model.safetensors", "state.json"
_HEADERS = 1 << 16  # bytes of a checkpoint beside its tensors, about
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """One on disk whose checksums hold; `state` is its state.json."""

    path: Path
    step: int
    state: dict


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory of its own: training may go on while it is written.

    weights, moments   tensors on the CPU by name
    shard              (number, how many): which part of each tensor's rows these are; (0, 1): all of them
    """

    step: int
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    state: dict
    shard: tuple[int, int] = (0, 1)

    @property
    def names(self) -> tuple[str, str]:
        """Of the two files with tensors."""
        number, count = self.shard
        part = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        return f"model{part}.safetensors", f"optimizer{part}.safetensors"

    @property
    def size(self) -> int:
        """Bytes on the disk, about; all shards together."""
        tensors = (*self.weights.values(), *self.moments.values())
        return _HEADERS + self.shard[1] * sum(x.numel() * x.element_size() for x in tensors)


def snapshot(
    step: int,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict,
    shard: tuple[int, int] = (0, 1),
) -> Snapshot:
    """A copy of the parameters, by name, and of the optimizer's state of them. `state` is what JSON can hold."""
    names = {parameter: name for name, parameter in parameters.items()}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        return tensor.to("cpu", copy=True).contiguous()

    moments = {
        f"{names[parameter]}.{key}": copy(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    return Snapshot(step, {name: copy(p) for p, name in names.items()}, moments, {**state, "step": step}, shard)


def write_shard(directory: Path, snap: Snapshot) -> None:
    """Write the tensors of a snapshot that is one of several, for `write_checkpoint` of the first to take."""
    folder = _shards(directory, snap.step)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in zip(snap.names, (snap.weights, snap.moments)):
        save_file(tensors, folder / name)
        fsync(folder / name)


def write_checkpoint(directory: Path, snap: Snapshot, *, keep: int) -> Path:
    """Write directory/step-N, then delete all but the newest `keep`.

    What killed writers left of any step goes first: their runs may never come by the same step again. The shards of the
    other processes, if there are any, lie there already (`write_shard`).
    """
    sweep(directory, "step-*")
    target, shards = directory / f"step-{snap.step:08d}", _shards(directory, snap.step)
    before = next((path for path in _found(directory) if path != target), None)
    kept = f"the one before, {before}, is whole; make room, and the same command continues from there"
    if before is None:
        kept = "there is none before it; make room, and the same command starts again"
    with atomic_directory(target, what="the checkpoint", need=snap.size, kept=kept) as partial:
        for name, tensors in zip(snap.names, (snap.weights, snap.moments)):
            save_file(tensors, partial / name)
        if snap.shard[1] > 1:
            for path in shards.iterdir():
                os.rename(path, partial / path.name)
        write_json(partial / STATE, snap.state)
        files = sorted(path.name for path in partial.iterdir())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": snap.step,
            "files": {name: file_checksum(partial / name) for name in files},
        }
        write_json(partial / "manifest.json", {**manifest, "checksum": json_checksum(manifest)})
        if target.exists():  # one that was found damaged, or the run would have gone on from there
            shutil.rmtree(target)
    for stale in directory.glob(".step-*.shards"):
        shutil.rmtree(stale)
    others = [path for path in _found(directory) if path != target]  # a newer one may be there, damaged
    for old in others[keep - 1 :]:
        shutil.rmtree(old)
    return target


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, *, keep: int
) -> Path:
    """`snapshot` and `write_checkpoint` in one."""
    return write_checkpoint(directory, snapshot(step, dict(model.named_parameters()), optimizer, state), keep=keep)


def _shards(directory: Path, step: int) -> Path:
    return directory / f".step-{step:08d}.shards"


class Writer:
    """Writes checkpoints in a thread, one at a time. An error of a write is raised by the next call."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastlm-checkpoint", initializer=_be_nice)
        self._pending: Future | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Call `write` in the thread, after the one before has ended."""
        self.wait()
        self._pending = self._thread.submit(write)

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the last write; its error is raised."""
        try:
            self.wait()
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
        found = manifest["format"], manifest["version"]
        if found != (FORMAT, VERSION):
            raise ValueError(f"its format is {found}, expected {(FORMAT, VERSION)}")
        for name, checksum in manifest["files"].items():
            if not whole or file_checksum(path / name) != checksum:
                raise ValueError(f"{name if whole else 'manifest.json'} does not match its checksum")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path}: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    return Checkpoint(path, manifest["step"], state)


def read_tensors(checkpoint: Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of the "model" or the "optimizer", whole, however many processes wrote them."""
    parts = [load_file(path) for path in sorted(checkpoint.path.glob(f"{kind}*.safetensors"))]
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
    for name, value in read_tensors(checkpoint, "optimizer").items():
        name, _, key = name.rpartition(".")
        parameter = parameters[name]
        optimizer.state[parameter][key] = (part(value) if value.dim() else value).to(parameter.device)


def _found(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first, whatever their condition."""
    paths = (path for path in directory.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(paths, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)
