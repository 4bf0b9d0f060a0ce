"""Checkpoints in Transformers' layout: config.json, model.safetensors, the tokenizer's files. Nothing is unpickled.

A model describes its tensors by `names`: its own name -> Transformers' names; where these are several, ours is theirs
one after another along dimension 0 (a fused projection).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastlm.storage import fsync, partial_of

Names = dict[str, tuple[str, ...]]
Tensors = dict[str, torch.Tensor]

_NAMED = 3  # wrong tensors that an error names
_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"directory: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"directory: expected {path} to hold a JSON object, got {type(content).__name__}")
    return content


def read_config(directory: str | Path, model_type: str) -> dict:
    """config.json of a checkpoint. ValueError where it is missing, or of another kind of model."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"directory: expected a directory with {_CONFIG} and {_WEIGHTS}, got {str(directory)!r}, which is none; a "
            "model of the Hugging Face hub has to be downloaded first (huggingface_hub.snapshot_download)"
        )
    if not (directory / _CONFIG).is_file():
        raise ValueError(f"directory: expected a {_CONFIG} in {directory}, found none")
    config = _read_json(directory / _CONFIG)
    if config.get("model_type") != model_type:
        raise ValueError(
            f'directory: expected model_type "{model_type}" in {_CONFIG}, got {config.get("model_type")!r}'
        )
    return config


def read_tensors(directory: str | Path) -> Tensors:
    """Every tensor of a checkpoint, in one file or in shards. ValueError where there are none that can be read."""
    directory = Path(directory)
    if (directory / _WEIGHTS).is_file():
        files = [_WEIGHTS]
    elif (directory / _INDEX).is_file():
        files = sorted(set(_read_json(directory / _INDEX).get("weight_map", {}).values()))
    elif pickled := sorted(path.name for path in directory.glob("*.bin")):
        raise ValueError(
            f"directory: expected {_WEIGHTS} in {directory}, found only {', '.join(pickled)}, which is pickled and may "
            "run any code; load it with Transformers' AutoModel and save_pretrained it there, which writes safetensors"
        )
    else:
        raise ValueError(f"directory: expected {_WEIGHTS} or {_INDEX} in {directory}, found neither")
    tensors = {}
    for file in files:
        try:
            tensors.update(load_file(directory / file))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"directory: {directory / file} cannot be read: {error}") from error
    return tensors


def write(directory: str | Path, config: dict, tensors: Tensors, tokenizer=None) -> None:
    """Writes a checkpoint: everything under a hidden name, synced, then renamed file by file, config.json last.

    What killed writers left under that name is swept first.

    tokenizer: anything with `save(directory)`, or None.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with partial_of(directory / "checkpoint", directory=True) as partial:
        save_file(tensors, partial / _WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(partial)
        (partial / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        paths = sorted(partial.iterdir(), key=lambda path: path.name == _CONFIG)
        for path in paths:
            fsync(path)
        for path in paths:
            os.replace(path, directory / path.name)
        fsync(directory)


def export_tensors(state: Tensors, names: Names) -> Tensors:
    """Our tensors under Transformers' names, on the CPU, each with memory of its own, as safetensors asks."""
    out = {}
    for ours, theirs in names.items():
        for name, tensor in zip(theirs, state[ours].detach().chunk(len(theirs))):
            out[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return out


def import_tensors(tensors: Tensors, names: Names, shapes: dict[str, torch.Size]) -> tuple[Tensors, list[str]]:
    """(what Transformers' tensors hold of ours, Transformers' names of what they lack).

    shapes: of our tensors, by our names. ValueError for a tensor of another shape.
    """
    state, missing, wrong = {}, [], []
    for ours, theirs in names.items():
        absent = [name for name in theirs if name not in tensors]
        missing += absent
        if absent:
            continue
        rows, *rest = shapes[ours]
        want = (rows // len(theirs), *rest)
        mismatched = [name for name in theirs if tuple(tensors[name].shape) != want]
        wrong += [f"{name}: expected {want}, got {tuple(tensors[name].shape)}" for name in mismatched]
        if not mismatched:
            state[ours] = torch.cat([tensors[name] for name in theirs])
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ValueError(f"directory: tensors of other shapes than {_CONFIG} says: {'; '.join(wrong[:_NAMED])}{more}")
    return state, missing
