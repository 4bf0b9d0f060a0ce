"""Checkpoints: whole or absent, checked before they are used, and nothing in them is unpickled.

    RUN/checkpoints/step-00001000/
        model.safetensors        parameters, float32, by their names
        optimizer.safetensors    the optimizer's state, "<parameter>.<what>"
        state.json               step, recipe, data, counters
        manifest.json            SHA-256 of each of these, and of itself

A checkpoint is written under a hidden name, synced and renamed (`fastlm.storage`), so a process killed at any
instant leaves the ones before it as they were. All randomness is a function of (seed, step): there is no generator
to store.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlm.storage import atomic_directory, file_checksum, json_checksum, sweep, write_json

FORMAT = "fastlm checkpoint"
VERSION = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_HEADERS = 1 << 16  # bytes of a checkpoint beside its tensors, about
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """One on disk whose checksums hold; `state` is its state.json."""

    path: Path
    step: int
    state: dict


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, *, keep: int
) -> Path:
    """Write directory/step-N, then delete all but the newest `keep`. `state` is what JSON can hold.

    What killed writers left of any step goes first: their runs may never come by the same step again.
    """
    sweep(directory, "step-*")
    target = directory / f"step-{step:08d}"
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}.{key}": value.cpu().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    need = _HEADERS + sum(x.numel() * x.element_size() for x in (*names, *moments.values()))
    before = next((path for path in _found(directory) if path != target), None)
    kept = f"the one before, {before}, is whole; make room, and the same command continues from there"
    if before is None:
        kept = "there is none before it; make room, and the same command starts again"
    with atomic_directory(target, what="the checkpoint", need=need, kept=kept) as partial:
        save_file({name: p.detach().cpu().contiguous() for p, name in names.items()}, partial / FILES[0])
        save_file(moments, partial / FILES[1])
        write_json(partial / FILES[2], {**state, "step": step})
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "files": {name: file_checksum(partial / name) for name in FILES},
        }
        write_json(partial / "manifest.json", {**manifest, "checksum": json_checksum(manifest)})
        if target.exists():  # one that was found damaged, or the run would have gone on from there
            shutil.rmtree(target)
    others = [path for path in _found(directory) if path != target]  # a newer one may be there, damaged
    for old in others[keep - 1 :]:
        shutil.rmtree(old)
    return target


def load_newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint in `directory`, if any, and for each newer one a line that says what is wrong."""
    skipped = []
    for path in _found(directory):
        try:
            return read_checkpoint(path), skipped
        except ValueError as error:
            skipped.append(str(error))
    return None, skipped


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the directory `path`, after checking every checksum. ValueError says what is wrong with it."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        whole = manifest.pop("checksum") == json_checksum(manifest)
        found = manifest["format"], manifest["version"]
        if found != (FORMAT, VERSION):
            raise ValueError(f"its format is {found}, expected {(FORMAT, VERSION)}")
        for name in FILES:
            if not whole or file_checksum(path / name) != manifest["files"][name]:
                raise ValueError(f"{name if whole else 'manifest.json'} does not match its checksum")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path}: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    return Checkpoint(path, manifest["step"], state)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint's tensors into the model's parameters and the optimizer's state, on their devices.

    ValueError where the names or shapes are not this model's.
    """
    parameters = dict(model.named_parameters())
    weights = load_file(checkpoint.path / FILES[0])
    ours = {name: tuple(p.shape) for name, p in parameters.items()}
    theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
    if ours != theirs:
        name = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
        raise ValueError(
            f"checkpoint {checkpoint.path}: {name} is {theirs.get(name, 'missing')}, the model's is "
            f"{ours.get(name, 'none')}; resume with the model that the run was started with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, value in load_file(checkpoint.path / FILES[1]).items():
        name, _, key = name.rpartition(".")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device)


def _found(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first, whatever their condition."""
    paths = (path for path in directory.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(paths, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)
