"""Checkpoints in Transformers' layout: config.json, model.safetensors, the tokenizer's files. Nothing is unpickled.

A model describes its tensors by `names`: name in fastlm -> names in Transformers. If there are several, fastlm's tensor
is the concatenation of theirs along dimension 0 (a fused projection). A name may be `Transposed`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastlm.storage import fsync, partial_of

Names = dict[str, tuple[str, ...]]
Tensors = dict[str, torch.Tensor]

_NAMED = 3  # wrong tensors that an error names
_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_RUN_MODEL = "hf"  # where a run leaves its model
# The files of a tokenizer, as Transformers and sentencepiece name them.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


class Transposed(str):
    """The name of a tensor that Transformers stores transposed, (in, out), as for GPT-2."""


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"directory: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"directory: expected {path} to hold a JSON object, got {type(content).__name__}")
    return content


def read_config(directory: str | Path, *model_types: str) -> dict:
    """config.json of a checkpoint. ValueError if it is missing, or of a model of other types than the given ones."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"directory: expected a directory with {_CONFIG} and {_WEIGHTS}, got {str(directory)!r}, which is none; a "
            "model of the Hugging Face hub has to be downloaded first (huggingface_hub.snapshot_download)"
        )
    if not (directory / _CONFIG).is_file():
        found = "none"
        if (directory / _RUN_MODEL / _CONFIG).is_file():
            found = f"none; it is the directory of a run, whose model is in {directory / _RUN_MODEL}"
        raise ValueError(f"directory: expected a {_CONFIG} in {directory}, found {found}")
    config = read_json(directory / _CONFIG)
    if model_types and config.get("model_type") not in model_types:
        wanted = " or ".join(f'"{name}"' for name in model_types)
        raise ValueError(f"directory: expected model_type {wanted} in {_CONFIG}, got {config.get('model_type')!r}")
    return config


def read_tensors(directory: str | Path) -> Tensors:
    """Every tensor of a checkpoint, from one file or from shards. ValueError if no file can be read."""
    directory = Path(directory)
    if (directory / _WEIGHTS).is_file():
        files = [_WEIGHTS]
    elif (directory / _INDEX).is_file():
        files = sorted(set(read_json(directory / _INDEX).get("weight_map", {}).values()))
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

    tokenizer: anything with `save(directory)` or `save_pretrained(directory)`; a directory, whose tokenizer's files are
        copied; or None. ValueError for a directory that has none.
    """
    directory = Path(directory)
    files = _tokenizer_files(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else None
    need = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with partial_of(directory / "checkpoint", directory=True, what="the model", need=need) as partial:
        save_file(tensors, partial / _WEIGHTS, metadata={"format": "pt"})
        if files is not None:
            for file in files:
                shutil.copyfile(file, partial / file.name)
        elif tokenizer is not None:
            (tokenizer.save_pretrained if hasattr(tokenizer, "save_pretrained") else tokenizer.save)(partial)
        (partial / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        paths = sorted(partial.iterdir(), key=lambda path: path.name == _CONFIG)
        for path in paths:
            fsync(path)
        for path in paths:
            os.replace(path, directory / path.name)
        fsync(directory)


def _tokenizer_files(directory: str | os.PathLike) -> list[Path]:
    files = [path for name in _TOKENIZER if (path := Path(directory) / name).is_file()]
    if not files:
        raise ValueError(f"tokenizer: expected a directory with a tokenizer's files, found none in {str(directory)!r}")
    return files


def export_tensors(state: Tensors, names: Names) -> Tensors:
    """The tensors under Transformers' names, on the CPU. None shares memory with another, as safetensors requires."""
    out = {}
    for ours, theirs in names.items():
        for name, tensor in zip(theirs, state[ours].detach().chunk(len(theirs))):
            tensor = tensor.t() if isinstance(name, Transposed) else tensor
            out[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return out


def module_names(modules: dict[str, str | tuple[str, ...]], kinds: Iterable[str] = ("weight", "bias")) -> Names:
    """Names of parameters, from modules in fastlm -> modules in Transformers and the kinds of their parameters."""
    out = {}
    for ours, theirs in modules.items():
        parts = (theirs,) if isinstance(theirs, str) else theirs
        out |= {f"{ours}.{kind}": tuple(f"{part}.{kind}" for part in parts) for kind in kinds}
    return out


def drop_copies(tensors: Tensors, copies: Iterable[tuple[str, str]]) -> None:
    """Removes the copies of tied tensors, as (copy, original). If the original is missing, the copy replaces it."""
    for copy, name in copies:
        if copy in tensors:
            copied = tensors.pop(copy)
            if not torch.equal(copied, tensors.setdefault(name, copied)):
                raise ValueError(f"directory: expected {copy} equal to {name}, to which the model ties it")


def import_tensors(tensors: Tensors, names: Names, shapes: dict[str, torch.Size]) -> tuple[Tensors, list[str]]:
    """(fastlm's tensors that Transformers' tensors contain, Transformers' names of the missing ones).

    shapes: of fastlm's tensors, by their names. ValueError for a tensor of another shape.
    """
    state, missing, wrong = {}, [], []
    for ours, theirs in names.items():
        absent = [name for name in theirs if name not in tensors]
        missing += absent
        if absent:
            continue
        rows, *rest = shapes[ours]
        parts = []
        for name in theirs:
            tensor, want = tensors[name], (rows // len(theirs), *rest)
            if isinstance(name, Transposed):
                want = want[::-1]
            if tuple(tensor.shape) != want:
                wrong.append(f"{name}: expected {want}, got {tuple(tensor.shape)}")
            parts.append(tensor.t() if isinstance(name, Transposed) else tensor)
        if not wrong:
            state[ours] = torch.cat(parts)
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise ValueError(f"directory: tensors of other shapes than {_CONFIG} says: {'; '.join(wrong[:_NAMED])}{more}")
    return state, missing
