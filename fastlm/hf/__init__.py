"""Transformers' models on fastlm's kernels: `patch(model)` and `unpatch(model)`; docs/huggingface.md is the overview.

`patch` changes only the class of a module (fastlm.hf._swap). Parameters, names, hooks and the state_dict stay, so
optimizers, save_pretrained, copies, pickles, DDP and adapters still work. _families.py lists the replacements.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch

from fastlm.hf import _families
from fastlm.hf._swap import Patched, class_before, swap
from fastlm.hf.attention import NAME, register

__all__ = ["Report", "patch", "register", "unpatch"]

_FAMILIES = ", ".join(sorted(_families.MODULES))
_INSTANCE = "its forward was replaced on the instance (accelerate does that); patch before"
_BEFORE = "_fastlm_attention_before"  # attribute of a patched model: its attention implementation before
_CONFIGS = "_fastlm_configs_before"  # attribute of its modules: {attribute: the configuration that was there before}


@dataclass
class Report:
    """The result of `patch`. replaced: (class, what it does now) -> count. left: (class, reason) -> count."""

    model: str
    replaced: Counter = field(default_factory=Counter)
    left: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fastlm.patch: {self.model}"]
        for title, counts in (("replaced", self.replaced), ("left", self.left)):
            for (name, text), count in sorted(counts.items()):
                lines.append(f"  {title:8} {count:4} × {name}: {text}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _models(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost models of a known family: `model`, or those inside it (DDP, PEFT, an encoder-decoder of two)."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and model.config.model_type in _families.MODULES:
        return [model]
    return [found for child in model.children() for found in _models(child)]


def patch(model: torch.nn.Module, *, fused_loss: bool = False) -> Report:
    """Makes a Transformers model use fastlm's kernels, in place. A second call has no further effect.

    Args:
        model: of the BERT, RoBERTa, DistilBERT, ModernBERT, GPT-2, T5 or Llama family, with any head; or a module that
            contains one: DDP, PEFT, or a larger model. Patch before accelerate or Trainer prepares the model.
        fused_loss: compute the loss of a language model together with its head. In training with gradients and labels,
            `logits` in the outputs is then None; in evaluation the logits are there.

    Returns a Report of what was replaced and what was left, with the reasons. A model of another family is not changed;
    the Report and a warning say so.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report(type(model).__name__)
    models = _models(model)
    if not models:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        kind = kind or type(model).__name__
        note = f"nothing was replaced: {kind} is not of a family that fastlm knows ({_FAMILIES})"
        report.notes.append(note)
        warnings.warn(f"fastlm.patch: {note}", stacklevel=2)
        return report
    register()
    _own_configs(model, models)
    for found in models:
        _patch_modules(found, report)
        _patch_attention(found, report)
        _patch_loss(found, fused_loss, report)
    return report


def _own_configs(model, models):
    """Gives `models` copies of their configurations: another model made from the same object is not affected.

    A module around them whose configuration contains one of these (an encoder-decoder of two) gets a copy too.
    """
    copies = {}  # deepcopy's memo: id -> copy
    for found in models:
        for module in found.modules():
            _copy_configs(module, copies, lambda config: True)
    for module in model.modules():
        _copy_configs(module, copies, lambda config: any(id(getattr(config, n)) in copies for n in config.sub_configs))


def _copy_configs(module, copies, wanted):
    from transformers import PreTrainedConfig

    if _CONFIGS in module.__dict__:
        return
    before = {n: c for n, c in module.__dict__.items() if isinstance(c, PreTrainedConfig) and wanted(c)}
    if before:
        for name, config in before.items():
            setattr(module, name, copy.deepcopy(config, copies))
        setattr(module, _CONFIGS, before)


def _patch_modules(model, report):
    model_type = model.config.model_type
    for module in model.modules():
        if isinstance(module, Patched):
            _mixin, base = type(module).parts
            report.replaced[base.__name__, "already"] += 1
            continue
        name, entry = type(module).__name__, _families.replacement(module, model_type)
        if entry is None:
            continue
        mixin, text = entry
        if mixin is not None and "forward" in module.__dict__:
            mixin, text = None, _INSTANCE
        if mixin is None:
            report.left[name, text] += 1
        else:
            swap(module, mixin)
            report.replaced[name, text] += 1


def _patch_attention(model, report):
    from transformers import PreTrainedModel

    before = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != NAME:
            before[module] = module.config._attn_implementation
    for module, name in before.items():
        setattr(module, _BEFORE, name)
    model.set_attn_implementation(NAME)
    for module in before:  # Transformers 5.17 leaves out parts whose configuration is a copy: T5's encoder and decoder
        if module.config._attn_implementation != NAME:
            module.set_attn_implementation(NAME)
    for name in sorted(set(before.values())):
        report.notes.append(f'attention: attn_implementation="{NAME}" in place of "{name}"; 4-D masks run on sdpa')


def _patch_loss(model, fused_loss, report):
    name = type(model).__name__
    mixin = _families.LOSSES.get(name)
    if isinstance(model, Patched):
        return
    if mixin is None:
        if model.get_output_embeddings() is not None:
            report.left[name, "its loss: fastlm fuses one language model head's, and this class has another form"] += 1
    elif not fused_loss:
        report.left[name, "its loss: fastlm.patch(model, fused_loss=True) computes it with the head"] += 1
    elif "forward" in model.__dict__:
        report.left[name, f"its loss: {_INSTANCE}"] += 1
    else:
        swap(model, mixin)
        model.prepare()
        report.replaced[name, "head and loss in one, in training"] += 1


def unpatch(model: torch.nn.Module) -> None:
    """Undoes `patch`, also for a copy or an unpickled model: restores classes, attention and configurations.

    A configuration that was changed since `patch` stays as it is, but for its attention implementation.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    classes = [(module, class_before(module)) for module in model.modules() if isinstance(module, Patched)]
    for module, cls in classes:
        module.__class__ = cls
        module.__dict__.pop("deferred", None)
    for module in model.modules():
        if _BEFORE in module.__dict__:
            module.config._attn_implementation_internal = module.__dict__.pop(_BEFORE)
    for module in model.modules():
        for name, config in module.__dict__.pop(_CONFIGS, {}).items():
            if getattr(module, name) == config:
                setattr(module, name, config)
