"""Computes head and loss together: in training no logits are stored (fastlm.ops.linear_cross_entropy).

The model's forward runs as in Transformers, but without labels, and with a decoder that returns its input. Its `logits`
are then the hidden states before the last Linear. The loss is computed from those whose label is not -100. Outside of
training, under no_grad and without labels, nothing changes and the outputs have logits.
"""

from __future__ import annotations

import contextlib
import warnings

import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.hf._swap import Patched, SameSignature, bare, swap
from fastlm.ops.cross_entropy import outside


class Decoder(Patched):
    """The Linear of a head. While `deferred`, it returns its input."""

    deferred = False

    def forward(self, input):
        return input if self.deferred else super().forward(input)


def _check_labels(labels, vocabulary, ignore_index, name, shift):
    """ValueError for a label outside the vocabulary, by its place in what the user passed: the op sees fewer rows.

    shift: how many places later it stands there. On a device the op's loss is NaN, since a check would stall.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = outside(labels, vocabulary, ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: expected class indices in [0, {vocabulary}), the vocabulary, or ignore_index={ignore_index}; got "
            f"{int(labels[row])} at position {row + shift} of the flattened {name}"
        )


def _cross_entropy(
    hidden, decoder, target, *, ignore_index=ops.IGNORE_INDEX, num_items=None, wide=False, name="labels", shift=0
):
    """The mean over the targets that are not ignore_index; with num_items, their sum / num_items. wide: in float32.

    name, shift: of `target` in errors; see _check_labels.
    """
    if target.numel() != hidden.shape[:-1].numel():
        raise ValueError(
            f"labels: expected one for each of the {tuple(hidden.shape[:-1])} positions, got {tuple(target.shape)}; "
            "pass labels (or shift_labels) of input_ids' shape, and no logits_to_keep"
        )
    hidden, target = hidden.flatten(0, -2), target.to(hidden.device).flatten()
    _check_labels(target, decoder.weight.shape[0], ignore_index, name, shift)
    # Rows without a target are removed before the products. On a device this reads their number, once a step.
    if not torch.compiler.is_compiling():
        rows = (target != ignore_index).nonzero().flatten()
        hidden, target = hidden.index_select(0, rows), target.index_select(0, rows)
    low = hidden.dtype in (torch.bfloat16, torch.float16)  # then the op's loss is float32 under autocast alone
    autocast = torch.autocast(hidden.device.type, dtype=hidden.dtype) if wide and low else contextlib.nullcontext()
    with autocast:
        loss = ops.linear_cross_entropy(
            hidden,
            decoder.weight,
            target,
            decoder.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items is None else "sum",
        )
    return loss if num_items is None else loss / torch.as_tensor(num_items).to(loss.device)


class FusedLoss(SameSignature):
    """A model whose loss is the mean cross-entropy of its logits, not shifted. It ignores num_items_in_batch."""

    def forward(self, labels=None, return_dict=None, **kwargs):
        decoder = self.prepare() if labels is not None and self.training and torch.is_grad_enabled() else None
        if decoder is None or not self._fuses(decoder):
            return super().forward(labels=labels, return_dict=return_dict, **kwargs)
        decoder.deferred = True
        try:
            outputs = super().forward(return_dict=True, **{**kwargs, **self._instead_of_labels(labels, kwargs)})
        finally:
            decoder.deferred = False
        loss = self._loss(outputs.logits, decoder, labels, kwargs)
        outputs = type(outputs)(**{**outputs, "loss": loss, "logits": None})
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def prepare(self) -> torch.nn.Module:
        """The head's last layer, as a Decoder if it is a plain Linear; resize_token_embeddings replaces the layer."""
        decoder = self.get_output_embeddings()
        if bare(decoder, torch.nn.Linear):
            swap(decoder, Decoder)
        return decoder

    def _fuses(self, decoder) -> bool:
        if isinstance(decoder, Decoder) and not (decoder._forward_hooks or decoder._forward_pre_hooks):
            return True
        warnings.warn(
            f"fastlm: the loss is not fused, since the head's last layer is a {type(decoder).__name__}, not a plain "
            "torch.nn.Linear without hooks; leave adapters and sharding of its own away from it to have it fused",
            stacklevel=3,
        )
        return False

    def _instead_of_labels(self, labels, options) -> dict:
        """Arguments that the model would derive from the labels."""
        return {}

    def _loss(self, hidden, decoder, labels, options):
        return _cross_entropy(hidden, decoder, labels)


class T5FusedLoss(FusedLoss):
    """T5 derives the decoder's input from the labels."""

    def _instead_of_labels(self, labels, options):
        given = (options.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        return {} if any(x is not None for x in given) else {"decoder_input_ids": self._shift_right(labels)}


class FusedLossFunction(FusedLoss):
    """A model that calls its `loss_function`, if that is Transformers' for causal or masked language models."""

    def _kind(self) -> str | None:
        """The kind of `self.loss_function`. Reading that may log a warning, which a graph cannot contain."""
        own = getattr(self, "_loss_function", None)
        if own is not None:
            return getattr(own, "__name__", "").removesuffix("Loss")
        return getattr(self, "loss_type", None) or "ForCausalLM"  # Transformers' own default

    def _fuses(self, decoder):
        return self._kind() in ("ForCausalLM", "ForMaskedLM") and super()._fuses(decoder)

    def _loss(self, hidden, decoder, labels, options):
        ignore_index = options.get("ignore_index", ops.IGNORE_INDEX)
        name, shift = "labels", 0
        if self._kind() == "ForCausalLM" and options.get("shift_labels") is not None:
            name, labels = "shift_labels", options["shift_labels"]
        elif self._kind() == "ForCausalLM":
            shift, labels = 1, F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        num_items = options.get("num_items_in_batch")
        return _cross_entropy(
            hidden,
            decoder,
            labels,
            ignore_index=ignore_index,
            num_items=num_items,
            wide=True,
            name=name,
            shift=shift,
        )
