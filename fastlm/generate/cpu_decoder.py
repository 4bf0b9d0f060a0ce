"""The step of generation on a CPU: all layers in one call of C++ (csrc/cpu/decode.cpp), bound by reading the weights.

The weights of the products, the head's included, are read as float32, where they lie in the model; or as copies that
are smaller and so faster to read:

    bfloat16    rounded: half the bytes
    int8        round(127 w / m) with m = max |w| of the row (an output of the layer), and the factor m / 127: a quarter

Everything else, sums and the cache, is float32. Prompts are read by the model itself, with its own weights.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastlm import _native, nn
from fastlm.generate.decoder import PlainDecoder
from fastlm.models import GPT2, T5, Cache, Generative, gpt2, t5
from fastlm.models._config import GELUS
from fastlm.nn.linear import Linear
from fastlm.ops import _checks
from fastlm.ops._relative_bias import relative_buckets

FORMS = {"float32": 0, "bfloat16": 1, "int8": 2}  # WeightForm of csrc/cpu/matvec.h
WORDS = {"float32": 1, "bfloat16": 2, "int8": 4}  # columns that share a word of 32 bits
ACTIVATIONS = {"relu": 0, "none": 1, "tanh": 2}  # DecodeActivation of csrc/cpu/decode.h; a GELU by its form
_SAMPLES = 32  # values of a parameter, about, that are compared
# Those whose work the C++ step does: a module of another class, as one that adapts a weight, would be left out.
_MODULES = {
    torch.nn.ModuleList,
    *(gpt2.Layer, t5.Layer, t5.Stack, t5.SelfAttention, t5.CrossAttention),
    *(Linear, nn.LayerNorm, nn.RMSNorm, nn.MLP, nn.Dropout),
}


@dataclass
class PackedWeights:
    """A model's weights as the C++ step reads them. Addresses stay valid while this object lives.

    layers      of each layer the arguments DecodeLayer, without the caches: None in their places
    constants   the arguments of DecodeStep that do not change
    bytes       of the weights that a step reads
    tensors     own the memory at these addresses, also where a parameter gets another memory or leaves the model
    """

    layers: list[list]
    constants: dict
    bytes: int = 0
    tensors: list[torch.Tensor] = field(default_factory=list)


def missing(model: Generative) -> str | None:
    """Why the C++ step cannot run this model, or None."""
    if reason := _native.missing_cpu():
        return reason
    for name, module in model.named_modules():
        if name and type(module) not in _MODULES:  # the class of the model itself is the caller's matter
            kind = type(module)
            return f"expected the modules of fastlm.models, {name} is a {kind.__module__}.{kind.__qualname__}"
        if name and (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)):
            return f"expected modules without hooks, {name} has a forward hook, or a forward of its own"
    for name, parameter in model.named_parameters():
        if type(parameter) is not torch.nn.Parameter:  # a DTensor has no memory of its own
            return f"expected plain parameters, {name} is a {type(parameter).__name__}"
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32 or not parameter.is_contiguous():
            dtype = str(parameter.dtype).removeprefix("torch.")
            return f"expected contiguous float32 weights on the CPU, {name} is {dtype} on {parameter.device}"
    return None


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q int8, scale (rows,) float32) with weight (rows, cols) ~ q * scale[:, None], at most scale / 2 off."""
    scale = weight.abs().amax(1) / 127
    divisor = torch.where(scale > 0, scale, 1.0)
    return (weight / divisor[:, None]).round_().to(torch.int8), scale


def _interleave(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """(rows, cols) with column c of each of `columns` equal parts of a row in one word."""
    rows, cols = weight.shape
    return weight.view(rows, columns, cols // columns).transpose(1, 2).contiguous()


class _Packer:
    """Collects a model's weights in one of FORMS."""

    def __init__(self, form: str) -> None:
        self.form, self.packed = form, PackedWeights([], {})

    def address(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.packed.bytes += tensor.numel() * tensor.element_size()
        return self.table(tensor)

    def table(self, tensor: torch.Tensor) -> int:
        """The address of a tensor of which a step reads a few rows."""
        self.packed.tensors.append(tensor.detach())  # a Parameter would not hold the memory it has now
        return tensor.data_ptr()

    def matrix(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> tuple:
        (rows, cols), scale = weight.shape, None
        if cols % WORDS[self.form]:
            raise ValueError(
                f"weights: expected float32 for a layer with {cols} inputs, got {self.form}, which needs a multiple of "
                f"{WORDS[self.form]}"
            )
        if self.form == "int8":
            weight, scale = quantize(weight)
            weight = _interleave(weight, WORDS[self.form])
        elif self.form == "bfloat16":
            weight = _interleave(weight.to(torch.bfloat16), WORDS[self.form])
        return self.address(weight), self.address(scale), self.address(bias), rows, cols, FORMS[self.form]

    def norm(self, norm: torch.nn.Module) -> tuple:
        return self.address(norm.weight), self.address(getattr(norm, "bias", None))

    def linear(self, linear: torch.nn.Linear) -> tuple:
        return self.matrix(linear.weight, linear.bias)


_NO_ENCODER = [None] * 4  # norm_cross, cross_q, cross_out, cross


def _pack_gpt2(model: GPT2, pack: _Packer) -> None:
    config = model.config
    for layer in model.layers:
        attention = [pack.norm(layer.norm1), pack.linear(layer.qkv), pack.linear(layer.out), None]
        mlp = [pack.norm(layer.norm2), pack.linear(layer.mlp.linear1), pack.linear(layer.mlp.linear2)]
        pack.packed.layers.append([*attention, *_NO_ENCODER, *mlp])
    d = config.n_embd // config.n_head
    pack.packed.constants = {
        "width": config.n_embd,
        "heads": config.n_head,
        "d": d,
        "words": pack.table(model.word),
        "vocab": config.vocab_size,
        "positions": pack.table(model.position),
        "most_positions": config.n_positions,
        "distance_bias": None,
        "distances": 0,
        "softmax_scale": d**-0.5,
        "eps": config.layer_norm_epsilon,
        "output_scale": 1.0,
        "rms": False,
        "gated": False,
        "activation": ACTIVATIONS[GELUS[config.activation_function]],
        "norm": pack.norm(model.norm),
        "head": pack.matrix(model.word),
    }


def _pack_t5(model: T5, pack: _Packer) -> None:
    config, stack = model.config, model.decoder
    for layer in stack.layers:
        own = layer.attention
        attention = [pack.norm(layer.norm1), pack.linear(own.qkv), pack.linear(own.out), None]
        cross = [pack.norm(layer.norm_cross), pack.linear(layer.cross.q), pack.linear(layer.cross.out), None]
        mlp = [pack.norm(layer.norm2), pack.linear(layer.mlp.linear1), pack.linear(layer.mlp.linear2)]
        pack.packed.layers.append([*attention, *cross, *mlp])
    farthest = config.relative_attention_max_distance
    buckets = relative_buckets(-torch.arange(farthest + 1), stack.relative.shape[0], False, farthest)
    gated = stack.layers[0].mlp.gated
    pack.packed.constants = {
        "width": config.d_model,
        "heads": config.num_heads,
        "d": config.d_kv,
        "words": pack.table(model.word),
        "vocab": config.vocab_size,
        "positions": None,
        "most_positions": 0,
        "distance_bias": pack.address(stack.relative[buckets].t().contiguous()),
        "distances": farthest + 1,
        "softmax_scale": 1.0,
        "eps": config.layer_norm_epsilon,
        "output_scale": config.d_model**-0.5 if config.scale_decoder_outputs else 1.0,
        "rms": True,
        "gated": gated,
        "activation": ACTIVATIONS["tanh" if gated else "relu"],
        "norm": pack.norm(stack.norm),
        "head": pack.matrix(model.word if model.head is None else model.head),
    }


class _Copies(NamedTuple):
    """Packed weights that are copies, and what tells whether the parameters have changed since.

    state    form, and address and version of each parameter
    sources  the parameters: while they hold their memory, no other parameter gets the same address
    sample   as of `_sample`
    """

    state: tuple
    sources: list[torch.Tensor]
    sample: torch.Tensor
    packed: PackedWeights


_copies: weakref.WeakKeyDictionary[Generative, _Copies] = weakref.WeakKeyDictionary()  # of each model the newest


def _sample(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Some values of each: a change through `.data` does not raise the version. GPT-2's 148 take 4 ms."""
    return torch.cat([p.view(-1)[:: max(1, p.numel() // _SAMPLES)] for p in parameters])


def pack(model: Generative, weights: str) -> PackedWeights:
    """The weights of `model` in one of FORMS.

    Those of bfloat16 and int8 are copies, made anew where a parameter has changed since. A change through `.data` is
    seen by some values of every parameter: one that leaves those as they were is not seen.

    ValueError for another form, and where the C++ step cannot run this model.
    """
    _checks.one_of("weights", weights, FORMS)
    if reason := missing(model):
        raise ValueError(f"weights: expected None, since the step in C++ cannot run ({reason}), got {weights!r}")
    sources = [parameter.detach() for parameter in model.parameters()]
    tracked = weights != "float32" and not any(parameter.is_inference() for parameter in model.parameters())
    if tracked:
        state, sample = (weights, *((p.data_ptr(), p._version) for p in sources)), _sample(sources)
        found = _copies.get(model)
        if found is not None and found.state == state and torch.equal(found.sample, sample):
            return found.packed
    packer = _Packer(weights)
    with torch.no_grad():
        (_pack_t5 if isinstance(model, T5) else _pack_gpt2)(model, packer)
    if tracked:
        _copies[model] = _Copies(state, sources, sample, packer.packed)
    return packer.packed


class CpuDecoder(PlainDecoder):
    """`Decoder` of a float32 model on a CPU, with the step in C++.

    weights: one of FORMS. ValueError as of `pack`.
    """

    def __init__(self, model: Generative, cache: Cache, weights: str = "float32") -> None:
        super().__init__(model, cache)
        self._weights = pack(model, weights)
        self._layers: list[tuple] | None = None  # made at the first step: an encoder's keys are not known before
        self._source: tuple[torch.Tensor, torch.Tensor] | None = None

    def prefill(self, ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        self._layers = self._source = None
        return super().prefill(ids, cu_seqlens, max_seqlen)

    def reorder(self, index: torch.Tensor) -> None:
        self._source = None
        super().reorder(index)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        cache, constants = self.cache, self._weights.constants
        if self._layers is None:
            self._layers = self._with_caches()
        if cache.cross and self._source is None:
            self._source = self._sources()
        starts, counts = self._source or (None, None)
        logits = torch.empty(cache.rows, constants["vocab"])
        _native.cpu().decode_step(
            layers=self._layers,
            **constants,
            tokens=ids.contiguous(),
            lengths=cache.lengths,
            cross_starts=starts,
            cross_lengths=counts,
            batch=cache.rows,
            capacity=cache.k.shape[2],
            logits=logits,
            threads=_native.threads(),
        )
        cache.lengths[: cache.rows] += 1
        cache.longest = min(cache.longest + 1, cache.k.shape[2])
        return logits

    def _with_caches(self) -> list[tuple]:
        layers = []
        for i, weights in enumerate(self._weights.layers):
            layer = list(weights)
            layer[3] = _addresses(self.cache.k[i, 0], self.cache.v[i, 0])
            if self.cache.cross:
                layer[7] = _addresses(*self.cache.cross[i])
            layers.append(tuple(layer))
        return layers

    def _sources(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 (rows,) each: where the encoder's tokens of a row begin, and how many."""
        cu_seqlens, origin = self.cache.source.cu_seqlens, self.cache.origin[: self.cache.rows]
        starts = cu_seqlens[origin]
        return starts, cu_seqlens[origin + 1] - starts


def _addresses(k: torch.Tensor, v: torch.Tensor) -> tuple[int, int, int]:
    """DecodeCache of k and v (tokens, heads, d)."""
    d = k.shape[2]
    assert k.stride() == v.stride(), v.stride()
    assert k.stride()[1:] == (d, 1), k.stride()
    return k.data_ptr(), v.data_ptr(), k.stride(0)
