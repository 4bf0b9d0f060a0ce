"""The base of the models: checkpoints, and recomputation of activations in backward."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastlm.models import _checkpoint, _size
from fastlm.models._config import Config
from fastlm.ops._low_weights import low_copy

CLASSIFIER = "classifier."  # prefix of the tensors whose rows are classes, here and in Transformers


class Counts(NamedTuple):
    """What a step runs on; padding counts nowhere.

    tokens          input tokens
    pairs           Σ length² over the input's sequences
    predicted       tokens whose logits are computed
    target_tokens   the decoder's tokens, in a model with an encoder and a decoder
    target_pairs    Σ length² over the decoder's sequences
    cross_pairs     Σ length · target length over both
    """

    tokens: int = 0
    pairs: int = 0
    predicted: int = 0
    target_tokens: int = 0
    target_pairs: int = 0
    cross_pairs: int = 0

    @classmethod
    def total(cls, counts: Iterable[Counts]) -> Counts:
        return cls(*map(sum, zip(cls(), *counts)))


class Model(torch.nn.Module):
    """A model that reads and writes Transformers' checkpoints. A subclass defines:

    config_class: its configuration.
    architecture: the name of Transformers' class with the same head.
    backbone: prefixes of the Transformers tensors that every checkpoint must have. All others belong to a head.
    transformers_names(config): see fastlm.models._checkpoint; canonical(tensors, config).
    reset_parameters(): the initial weights, as its configuration says.
    flops(counts), where it is pretrained.

    checkpoint_activations: if set, a training forward keeps only the layers' inputs, and backward runs each layer again
        (Chen et al. 2016, arXiv:1604.06174). Dropout and gradients are the same, bit for bit.
    """

    config_class: ClassVar[type[Config]]
    architecture: ClassVar[str]
    backbone: ClassVar[tuple[str, ...]]
    checkpoint_activations = False

    def run(self, layer, *args, rng):
        """layer(*args, rng=rng). With `checkpoint_activations`, backward recomputes the activations."""
        if not (self.checkpoint_activations and self.training and torch.is_grad_enabled()):
            return layer(*args, rng=rng)
        # With rng, (seed, step) decide what drops. Without, torch's generator does; its state is then saved too.
        return checkpoint(layer, *args, rng=rng, use_reentrant=False, preserve_rng_state=rng is None)

    def reset_parameters(self) -> None:
        """Draws the initial weights from torch's generator; called at the end of __init__."""
        raise NotImplementedError

    def flops(self, counts: Counts) -> float:
        """FLOPs of the matrix products of a step, 3 times those of its forward: once more for either factor's gradient.

        The head counts for the predicted tokens. Attention counts for the pairs of tokens within a sequence, of which a
        causal one sees half. Padding, recomputation and what is no matrix product count nothing. Source: Chowdhery et
        al. 2022 (arXiv:2204.02311), appendix B.
        """
        raise NotImplementedError

    @classmethod
    def transformers_names(cls, config: Config) -> _checkpoint.Names:
        """Parameter names in fastlm -> names in Transformers' `architecture`."""
        raise NotImplementedError

    def parts(self, name: str) -> int:
        """How many matrices the parameter `name` is made of, blocks of rows of one size: 3 of a fused q, k and v."""
        return len(self.transformers_names(self.config).get(name, (name,)))

    @classmethod
    def canonical(cls, tensors: _checkpoint.Tensors, config: Config) -> tuple[_checkpoint.Tensors, Config]:
        """A checkpoint's tensors under the names of `transformers_names`, without constants and copies of tied tensors.

        Also returns the configuration, corrected if the tensors say more than config.json.
        """
        raise NotImplementedError

    def export_tensors(self) -> _checkpoint.Tensors:
        """The parameters under Transformers' names and layout, on the CPU."""
        return _checkpoint.export_tensors(self.state_dict(), self.transformers_names(self.config))

    def save_pretrained(self, directory: str | Path, tokenizer=None) -> None:
        """Writes a checkpoint that Transformers' class with the same head, and its Auto class, can read.

        tokenizer: its files are written too. An object with `save(directory)` (fastlm.data.Tokenizer) or
            `save_pretrained(directory)` (Transformers), or a directory to copy them from.
        No file is ever half-written; config.json comes last.
        """
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        config = {**self.config.to_dict(), "architectures": [self.architecture], "dtype": dtype}
        _checkpoint.write(directory, config, self.export_tensors(), tokenizer)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, dtype: torch.dtype = torch.float32, new_head: bool = False, **changes
    ):
        """Reads what Transformers wrote for this architecture, with this head, another or none; on the CPU.

        A head that is not there starts anew, and other heads are left out, each with a warning that names the tensors.

        changes: entries of the configuration to be other than config.json's, as labels=("no", "yes").
        new_head: whether the tensors of `classifier`, if there are any, are left out, since the labels are others.

        ValueError for a missing or unreadable file, another model_type, pickled weights, missing tensors of all but the
        head, tensors of another shape than the configuration says, and more weights than the memory holds.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point one, got {dtype}")
        config = cls.config_class.from_dict(_checkpoint.read_config(directory, cls.config_class.model_type))
        known = {field.name for field in fields(config)}
        for name in changes:
            if name not in known:
                raise ValueError(
                    f"{name}: expected an entry of {cls.config_class.__name__}, {', '.join(sorted(known))}"
                )
        asked = replace(config, **changes)
        tensors, config = cls.canonical(_checkpoint.read_tensors(directory), asked)
        for name in changes:
            has, got = getattr(config, name), getattr(asked, name)
            if has != got:
                raise ValueError(f"{name}: expected {has!r}, as the tensors in {directory} are, got {got!r}")
        names = cls.transformers_names(config)
        if new_head:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLASSIFIER)}
        others = sorted(tensors.keys() - {name for theirs in names.values() for name in theirs})
        if strange := [name for name in others if name.startswith(cls.backbone)]:
            raise ValueError(f"directory: expected no tensor beyond config.json's architecture, got {strange[0]}")
        _size.check_memory(cls, config, torch.device("cpu"), dtype.itemsize, "weights")
        model = cls(config, device="meta", dtype=dtype)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        state, missing = _checkpoint.import_tensors(tensors, names, shapes)
        if incomplete := [name for name in missing if name.startswith(cls.backbone)]:
            raise ValueError(f"directory: expected every tensor but a head's, {', '.join(incomplete)} missing")
        model = model.to_empty(device="cpu")
        if others:
            warnings.warn(f"left out, {cls.__name__} has no place for: {', '.join(others)}", stacklevel=2)
        if missing:
            warnings.warn(f"the head starts anew, not in {directory}: {', '.join(missing)}", stacklevel=2)
            model.reset_parameters()
        model.load_state_dict(state, strict=False)
        return model

    def load_backbone(self, tensors: _checkpoint.Tensors, where: str, *, new_head: bool = False) -> None:
        """Takes the tensors of a state_dict that this model has, of a model with another head or the same.

        where: for messages. A head that is not there stays as it is, with a warning, as with new_head a classifier.
        ValueError where a tensor of all but the head is missing, or one has another shape.
        """
        own, names = self.state_dict(), self.transformers_names(self.config)
        taken = {name: tensor for name, tensor in tensors.items() if name in own}
        if new_head:
            taken = {name: tensor for name, tensor in taken.items() if not name.startswith(CLASSIFIER)}
        missing = [name for name in own if name not in taken]
        if wrong := [name for name in missing if names[name][0].startswith(self.backbone)]:
            raise ValueError(f"init: expected every tensor but a head's in {where}, {', '.join(wrong)} missing")
        if wrong := [name for name, tensor in taken.items() if tensor.shape != own[name].shape]:
            raise ValueError(
                f"init: expected {wrong[0]} of shape {tuple(own[wrong[0]].shape)} in {where}, got "
                f"{tuple(taken[wrong[0]].shape)}"
            )
        if missing:
            warnings.warn(f"the head starts anew, not in {where}: {', '.join(missing)}", stacklevel=2)
        self.load_state_dict(taken, strict=False)


class _Tied(torch.autograd.Function):
    """A table for the embedding and the head, which gets it as low, `word` in its own dtype or autocast's.

    The gradient is the head's, with the embedding's rows added in place. It is float32, or the head's dtype where word
    takes a gradient of any dtype (fastlm.train.micro.low_gradients): the rows of a token are then summed first.
    """

    @staticmethod
    def forward(ctx, word, low):
        ctx.set_materialize_grads(False)
        ctx.any_dtype = word.is_leaf and word.grad_dtype is None
        return word.view_as(word), low.view_as(low)

    @staticmethod
    @once_differentiable
    def backward(ctx, rows, dense):
        if rows is None or dense is None:
            return dense if rows is None else rows.to_dense(), None
        if dense.dtype != rows.dtype and not ctx.any_dtype:
            dense = dense.to(rows.dtype)
        # In place, since nothing else uses the head's gradient. torch's sum of the two would allocate another dense
        # one.
        return dense.add_(rows) if dense.dtype == rows.dtype else _add_rounded(dense, rows), None


def _add_rounded(dense: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """dense += rows, which are sparse and wider: the rows of each token are summed, and the sum is rounded once."""
    tokens, place = rows._indices()[0].unique(return_inverse=True)
    sums = rows._values().new_zeros(len(tokens), dense.shape[1]).index_add_(0, place, rows._values())
    return dense.index_copy_(0, tokens, (dense.index_select(0, tokens) + sums).to(dense.dtype))


def tied(word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(table for ops.embedding, table for the head, `sparse` for ops.embedding), for a table that both read.

    In training on a CPU under autocast the head's is in autocast's dtype, the copy of the step (`low_copy`).

    On a CPU a dense gradient of the embedding costs more than its sums, since the whole table is zeroed and then added.
    On a device the gradient is dense: torch would sort the rows of a sparse one, and wait for it. It is also dense in
    dtypes other than float32, where every added row would be rounded.
    """
    if word.device.type != "cpu" or word.dtype != torch.float32 or torch.compiler.is_compiling():
        return word, word, False
    if not (torch.is_grad_enabled() and word.requires_grad):
        return word, word, False
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else word.dtype
    return *_Tied.apply(word, word if low == word.dtype else low_copy(word, low)), True


def add_norm(norm, x, delta, **options):
    """(norm(x'), x') with x' = x + dropout(delta), in one pass. With delta None, x' = x.

    options: dropout_p, rng and site; x_bias of an LN.
    """
    if delta is None:
        return norm(x, return_residual=True)
    return norm(delta, x, **options, return_residual=True)


def as_stream(x: torch.Tensor) -> torch.Tensor:
    """The embeddings in the dtype of the residual, which is autocast's if autocast is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
