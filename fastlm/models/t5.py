"""T5 (Raffel et al. 2020, arXiv:1910.10683) and T5 v1.1 (Shazeer 2020, arXiv:2002.05202) on packed sequences.

    x = drop(word[id]);   h stands for norm(x) = x / sqrt(mean(x²) + eps) * weight
    each layer:   x = x + drop(W_o attention(W_q h, W_k h, W_v h; bias))       decoder: causal
       decoder:   x = x + drop(W_o attention(W_q h, W_k s, W_v s))             s: the encoder's result
                  x = x + drop(W_2 drop(relu(W_1 h)))          v1.1:  W_2 drop(gelu(W_1 h) * W_3 h)
    result:       drop(norm(x))
    logits = word · (decoder's result / sqrt(d_model))         v1.1:  W · (decoder's result)

attention adds bias[bucket(key - query)], a number per head and bucket that all layers of a stack share, and does not
divide by sqrt(d). No layer has another bias. The decoder reads the target, shifted by one.

Projections of the same input are one matrix product. Dropout, addition and the norm after it are one pass, so a layer
returns x and `delta`, which the next layer adds to x. In bfloat16 (the model's dtype, or autocast over float32
parameters) the residual x is bfloat16; the statistics of every norm are float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from fastlm import nn, ops
from fastlm.models import _checkpoint, _inputs
from fastlm.models._cache import Cache, Generative
from fastlm.models._config import Config
from fastlm.models._model import Counts, add_norm, as_stream, tied
from fastlm.nn.linear import Linear
from fastlm.ops import IGNORE_INDEX, _checks
from fastlm.ops._heads import split_heads
from fastlm.settings import key

_SITES = 6  # dropouts of a layer


@dataclass(frozen=True)
class T5Config(Config):
    """The architecture, with the names and defaults of Transformers' config.json. ValueError if it cannot be built.

    num_decoder_layers: None: num_layers.
    feed_forward_proj: "relu" (T5) or "gated-gelu" (v1.1; the GELU is the tanh form).
    initializer_factor: factor of the standard deviations of the initial weights, which are 1 for the word table, else
        1/sqrt(inputs). Norms start at this factor.
    tie_word_embeddings: the head is the word table (T5), or a separate matrix (v1.1).
    scale_decoder_outputs: by 1/sqrt(d_model) before the head; None: if the head is tied.
    decoder_start_token_id: the decoder's first input; None: pad_token_id, which also replaces a label of -100.
    """

    vocab_size: int = 32128
    d_model: int = key(512, "width of the residual stream")
    d_kv: int = key(64, "width of a head")
    d_ff: int = key(2048, "width of the MLP")
    num_layers: int = key(6, "layers of the encoder")
    num_decoder_layers: int | None = key(None, "layers of the decoder; by default num_layers")
    num_heads: int = key(8, "heads")
    relative_attention_num_buckets: int = key(32, "distances that have a bias of their own or share one")
    relative_attention_max_distance: int = key(128, "the distance from which on all share one")
    dropout_rate: float = key(0.1, "of every dropout: 0, or at least 1/256")
    layer_norm_epsilon: float = key(1e-6, "added to the mean square")
    initializer_factor: float = key(1.0, "of the initial weights' standard deviations")
    feed_forward_proj: str = key("relu", "relu (T5) or gated-gelu (v1.1)")
    tie_word_embeddings: bool = key(True, "the head is the word table (T5), or a matrix of its own (v1.1)")
    scale_decoder_outputs: bool | None = key(None, "by 1/sqrt(d_model) before the head; by default where it is tied")
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int | None = None

    model_type: ClassVar[str] = "t5"
    fixed: ClassVar[dict[str, object]] = {"is_encoder_decoder": True}
    decided: ClassVar[tuple[str, ...]] = ("vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id")
    attention_dropout: ClassVar[str] = "dropout_rate"
    depths: ClassVar[tuple[str, ...]] = ("num_layers", "num_decoder_layers")

    def __post_init__(self):
        for name, default in (
            ("num_decoder_layers", self.num_layers),
            ("scale_decoder_outputs", self.tie_word_embeddings),
            ("decoder_start_token_id", self.pad_token_id or 0),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        super().__post_init__()
        if not (isinstance(self.num_decoder_layers, int) and self.num_decoder_layers > 0):
            raise ValueError(
                f"num_decoder_layers: expected None or a positive integer, got {self.num_decoder_layers!r}"
            )
        _checks.one_of("feed_forward_proj", self.feed_forward_proj, ("relu", "gated-gelu"))
        _checks.probability("dropout_rate", self.dropout_rate)
        buckets = self.relative_attention_num_buckets
        if buckets < 4 or buckets % 2:
            raise ValueError(f"relative_attention_num_buckets: expected an even number from 4 on, got {buckets}")
        if self.relative_attention_max_distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance: expected more than {buckets // 2}, half of the buckets, "
                f"got {self.relative_attention_max_distance}"
            )
        self._check_id("pad_token_id")
        self._check_id("decoder_start_token_id")

    def to_dict(self) -> dict:
        # In Transformers 5, tie_word_embeddings decides whether to scale, and the tensors decide whether to tie.
        content = {**super().to_dict(), "is_encoder_decoder": True, "tie_word_embeddings": self.scale_decoder_outputs}
        del content["scale_decoder_outputs"]
        return content


class SelfAttention(torch.nn.Module):
    """W_o attention(W_q x, W_k x, W_v x; bias), causal in the decoder. Takes one dropout site number."""

    def __init__(self, config: T5Config, site: int, decoder: bool, **factory) -> None:
        super().__init__()
        self.heads, self.site, self.decoder = config.num_heads, site, decoder
        self.dropout_p, self.max_distance = config.dropout_rate, config.relative_attention_max_distance
        inner = config.num_heads * config.d_kv
        self.qkv = Linear(config.d_model, 3 * inner, bias=False, **factory)
        self.out = Linear(inner, config.d_model, bias=False, **factory)

    def forward(self, x, table, sequences, rng, attend=ops.attention):
        """x (..., d_model); table (buckets, heads); sequences: arguments of ops.attention. attend: it, or a cache's."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        bias = ops.RelativeBias(table, bidirectional=not self.decoder, max_distance=self.max_distance)
        attended = attend(
            q,
            k,
            v,
            causal=self.decoder,
            softmax_scale=1.0,
            relative_bias=bias,
            dropout_p=self.dropout_p if self.training else 0.0,
            rng=rng,
            site=self.site,
            **sequences,
        )
        return self.out(attended.flatten(-2))


class CrossAttention(torch.nn.Module):
    """W_o attention(W_q x, W_k s, W_v s), without a bias. Takes one dropout site number."""

    def __init__(self, config: T5Config, site: int, **factory) -> None:
        super().__init__()
        self.heads, self.site, self.dropout_p = config.num_heads, site, config.dropout_rate
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner, bias=False, **factory)
        self.kv = Linear(config.d_model, 2 * inner, bias=False, **factory)
        self.out = Linear(inner, config.d_model, bias=False, **factory)

    def keys(self, source):
        """k and v (..., heads, d_kv) of the encoder's result (..., d_model)."""
        return self.kv(source).unflatten(-1, (2, self.heads, -1)).unbind(-3)

    def forward(self, x, keys, sequences, rng):
        """x (..., d_model) of the decoder; keys: k and v of the encoder's result; sequences: of both."""
        q = self.q(x).unflatten(-1, (self.heads, -1))
        k, v = keys
        attended = ops.attention(
            q,
            k,
            v,
            softmax_scale=1.0,
            dropout_p=self.dropout_p if self.training else 0.0,
            rng=rng,
            site=self.site,
            **sequences,
        )
        return self.out(attended.flatten(-2))


class Layer(torch.nn.Module):
    """Self-attention, cross-attention in the decoder, and feed-forward, each after a norm. Six dropout sites."""

    def __init__(self, config: T5Config, site: int, decoder: bool, **factory) -> None:
        super().__init__()
        size, norm = config.d_model, {"eps": config.layer_norm_epsilon, **factory, "keep_dtype": True}
        self.site, self.dropout_p = site, config.dropout_rate
        self.norm1 = nn.RMSNorm(size, **norm)
        self.attention = SelfAttention(config, site + 1, decoder, **factory)
        self.norm_cross = nn.RMSNorm(size, **norm) if decoder else None
        self.cross = CrossAttention(config, site + 3, **factory) if decoder else None
        self.norm2 = nn.RMSNorm(size, **norm)
        gated = config.feed_forward_proj == "gated-gelu"
        self.mlp = nn.MLP(
            size,
            config.d_ff,
            gated=gated,
            activation="gelu" if gated else "relu",
            approximate="tanh",
            bias=False,
            dropout=config.dropout_rate,
            site=site + 5,
            **factory,
        )

    def forward(self, x, delta, table, sequences, source=None, cross_sequences=None, cached=None, *, rng):
        """(x, delta) -> (x, delta), each (..., d_model), packed or padded. The delta of the first layer is None.

        cached: in place of `source`, (attend, keys): a cache's attention, and k and v of the encoder's result.
        """
        attend, keys = cached or (ops.attention, None)
        dropout = {"dropout_p": self.dropout_p if self.training else 0.0, "rng": rng}
        h, x = add_norm(self.norm1, x, delta, **dropout, site=self.site)
        delta = self.attention(h, table, sequences, rng, attend)
        if self.cross is not None:
            h, x = add_norm(self.norm_cross, x, delta, **dropout, site=self.site + 2)
            delta = self.cross(h, keys or self.cross.keys(source), cross_sequences, rng)
        h, x = add_norm(self.norm2, x, delta, **dropout, site=self.site + 4)
        return x, self.mlp(h, rng)


class Stack(torch.nn.Module):
    """The layers of one side, their table of relative positions, and the last norm."""

    def __init__(self, config: T5Config, layers: int, site: int, decoder: bool, **factory) -> None:
        super().__init__()
        self.site, self.last, self.dropout_p = site, site + 1 + _SITES * layers, config.dropout_rate
        shape = config.relative_attention_num_buckets, config.num_heads
        self.relative = torch.nn.Parameter(torch.empty(shape, **factory))
        self.layers = torch.nn.ModuleList(
            Layer(config, site + 1 + _SITES * i, decoder, **factory) for i in range(layers)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon, **factory, keep_dtype=True)
        self.dropout = nn.Dropout(config.dropout_rate, site=self.last + 1)

    def forward(self, ids, word, run, sequences, source=None, cross_sequences=None, cache=None, *, rng, sparse=False):
        """(..., d_model) for ids (...). run: Model.run. word, sparse: as in ops.embedding."""
        dropout = {"dropout_p": self.dropout_p if self.training else 0.0, "rng": rng}
        x, delta = as_stream(ops.embedding(ids, word, **dropout, site=self.site, sparse=sparse)), None
        for i, layer in enumerate(self.layers):
            cached = None if cache is None else (functools.partial(cache.attend, i), cache.cross[i])
            x, delta = run(layer, x, delta, self.relative, sequences, source, cross_sequences, cached, rng=rng)
        return self.dropout(self.norm(delta, x, **dropout, site=self.last), rng)


class T5(Generative):
    """T5 with its language-model head. Parameters start as `T5Config` says."""

    config_class = T5Config
    architecture = "T5ForConditionalGeneration"
    backbone = ("shared.", "encoder.", "decoder.")

    def __init__(self, config: T5Config, *, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.word = torch.nn.Parameter(torch.empty(config.vocab_size, config.d_model, **factory))
        self.encoder = Stack(config, config.num_layers, 0, decoder=False, **factory)
        site = self.encoder.last + 2
        self.decoder = Stack(config, config.num_decoder_layers, site, decoder=True, **factory)
        head = None if config.tie_word_embeddings else torch.nn.Parameter(torch.empty_like(self.word))
        self.register_parameter("head", head)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config, factor = self.config, self.config.initializer_factor
        inner = config.num_heads * config.d_kv
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(factor)
            elif name in ("word", "head"):
                parameter.normal_(0.0, factor)
            elif name.endswith(".out.weight"):
                parameter.normal_(0.0, factor * inner**-0.5)
            elif name.endswith(".linear2.weight"):
                parameter.normal_(0.0, factor * config.d_ff**-0.5)
            else:
                parameter.normal_(0.0, factor * config.d_model**-0.5)
            if name.endswith((".qkv.weight", ".q.weight")):  # attention does not divide by sqrt(d)
                parameter[:inner].mul_(config.d_kv**-0.5)

    def encode(
        self,
        input_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        attention_mask: torch.Tensor | None = None,
        rng: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The encoder's result, input_ids.shape + (d_model,). Arguments as of `forward`."""
        return self._encode(self._sequences(input_ids, cu_seqlens, max_seqlen, attention_mask), rng, self.word)

    def forward(
        self,
        input_ids: torch.Tensor,
        decoder_input_ids: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_cu_seqlens: torch.Tensor | None = None,
        decoder_max_seqlen: int | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        rng: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """The loss if labels are given, else logits.

        Args:
            input_ids: int64 or int32, packed (T,) with cu_seqlens, or padded (B, S).
            decoder_input_ids: packed (U,) with decoder_cu_seqlens, or padded (B, R), as input_ids are; default: the
                labels shifted right in each sequence, after decoder_start_token_id.
            cu_seqlens, decoder_cu_seqlens: int32 (sequences + 1,), where each sequence starts, then the total (which
                may be repeated). Both have the same number of sequences.
            max_seqlen, decoder_max_seqlen: upper bounds of the sequences' lengths; default T, U.
            attention_mask, decoder_attention_mask: like the ids, nonzero for real tokens, padding on either side;
                default: all are real.
            rng: int64 (2,), (seed, step), of all dropouts in training; None draws from torch's generator.
            labels: int64, like decoder_input_ids: the token that each of them predicts, -100 for none. Padding predicts
                nothing.
            reduction: "mean" over the predicted tokens, "sum"; or "none", like labels.

        Returns the loss; without labels the logits, decoder_input_ids.shape + (vocab_size,). ValueError for inputs that
        do not fit together.
        """
        given = self._sequences(input_ids, cu_seqlens, max_seqlen, attention_mask)
        ids, name = (labels, "labels") if decoder_input_ids is None else (decoder_input_ids, "decoder_input_ids")
        if ids is None:
            raise ValueError("decoder_input_ids: expected these or labels, got neither")
        target = self._sequences(
            ids, decoder_cu_seqlens, decoder_max_seqlen, decoder_attention_mask, name=name, prefix="decoder_"
        )
        self._check_both(given, target)
        if labels is not None:
            _inputs.check_labels("labels", labels, target)
        if decoder_input_ids is None:
            start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
            shifted = target.shift_right(labels, start, start if pad is None else pad)
            target = target._replace(ids=shifted)
        _checks.ids_inside(name, target.ids, "vocab_size", self.config.vocab_size)
        word, head, sparse = tied(self.word) if self.head is None else (self.word, self.head, False)
        source = self._encode(given, rng, word, sparse)
        x = self.decoder(
            target.ids, word, self.run, target.attend(), source, target.attend(given), rng=rng, sparse=sparse
        )
        x = self._scaled(x)
        if labels is None:
            return F.linear(x, head)
        if target.real is not None:
            labels = torch.where(target.real, labels, IGNORE_INDEX)
        return ops.linear_cross_entropy(x, head, labels, reduction=reduction)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else x

    def new_cache(self, capacity: int, length: int) -> Cache:
        c = self.config
        return Cache(
            c.num_decoder_layers, capacity, length, c.num_heads, c.d_kv, device=self.word.device, dtype=self.word.dtype
        )

    def read(self, cache: Cache, input_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> None:
        """Encodes the texts, packed as in `forward`, and keeps their keys and values for a row of the cache each."""
        given = self._sequences(input_ids, cu_seqlens, max_seqlen, None)
        source = self._encode(given, None, self.word)
        cache.cross = tuple(layer.cross.keys(source) for layer in self.decoder.layers)
        cache.source, cache.rows = given, cu_seqlens.shape[0] - 1

    def append(self, ids, cache: Cache, cu_seqlens=None, max_seqlen: int | None = None) -> torch.Tensor:
        """As `Generative.append`, of the decoder, after `read`: one token a row, the first decoder_start_token_id."""
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected None, one token a row, got a tensor; append the tokens one by one")
        given = cache.place(ids, None, None)
        x = self.decoder(
            given.ids, self.word, self.run, given.attend(), cross_sequences=cache.across(), cache=cache, rng=None
        )
        return F.linear(self._scaled(x), self.word if self.head is None else self.head)

    def flops(self, counts: Counts) -> float:
        c = self.config
        heads = c.num_heads * c.d_kv
        mlp = (3 if c.feed_forward_proj == "gated-gelu" else 2) * c.d_model * c.d_ff
        encoder = 2 * counts.tokens * (4 * c.d_model * heads + mlp) + 4 * counts.pairs * heads
        decoder = 2 * counts.target_tokens * (6 * c.d_model * heads + mlp) + 2 * counts.target_pairs * heads
        cross = 2 * counts.tokens * 2 * c.d_model * heads + 4 * counts.cross_pairs * heads
        head = 2 * counts.predicted * c.d_model * c.vocab_size
        return 3.0 * (c.num_layers * encoder + c.num_decoder_layers * (decoder + cross) + head)

    def _sequences(self, ids, cu_seqlens, max_seqlen, attention_mask, **names) -> _inputs.Sequences:
        return _inputs.sequences(ids, cu_seqlens, max_seqlen, attention_mask, device=self.word.device, **names)

    @staticmethod
    def _check_both(given: _inputs.Sequences, target: _inputs.Sequences) -> None:
        if (given.cu_seqlens is None) != (target.cu_seqlens is None):
            raise ValueError("decoder_cu_seqlens: expected with cu_seqlens, and not without; pack both sides or none")
        ours, theirs = (x.ids.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1 for x in (target, given))
        if ours != theirs:
            raise ValueError(f"decoder_input_ids: expected as many sequences as input_ids, {theirs}, got {ours}")

    def _encode(self, given: _inputs.Sequences, rng, word, sparse=False) -> torch.Tensor:
        return self.encoder(given.ids, word, self.run, given.attend(), rng=rng, sparse=sparse)

    def export_tensors(self) -> _checkpoint.Tensors:
        tensors = super().export_tensors()
        if self.head is None and not self.config.scale_decoder_outputs:
            tensors["lm_head.weight"] = tensors["shared.weight"].clone()  # see T5Config.to_dict
        return tensors

    @classmethod
    def transformers_names(cls, config: T5Config) -> _checkpoint.Names:
        names = {"word": ("shared.weight",)}
        if not config.tie_word_embeddings:
            names["head"] = ("lm_head.weight",)
        modules = {}
        for stack, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
            first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            names[f"{stack}.relative"] = (first,)
            modules[f"{stack}.norm"] = f"{stack}.final_layer_norm"
            for i in range(layers):
                modules |= _layer_names(config, f"{stack}.layers.{i}", f"{stack}.block.{i}.layer", stack == "decoder")
        return names | _checkpoint.module_names(modules, ("weight",))

    @classmethod
    def canonical(cls, tensors: _checkpoint.Tensors, config: T5Config) -> tuple[_checkpoint.Tensors, T5Config]:
        # a table that old versions saved and no version reads
        tensors.pop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", None)
        copies = [(f"{stack}.embed_tokens.weight", "shared.weight") for stack in ("encoder", "decoder")]
        _checkpoint.drop_copies(tensors, copies)
        head = tensors.get("lm_head.weight")
        if head is None:
            return tensors, config
        tied = torch.equal(head, tensors.get("shared.weight", head))
        if tied:
            _checkpoint.drop_copies(tensors, [("lm_head.weight", "shared.weight")])
        return tensors, replace(config, tie_word_embeddings=tied)


def _layer_names(config: T5Config, ours: str, theirs: str, decoder: bool) -> dict[str, str | tuple[str, ...]]:
    """Modules of a layer in fastlm -> in Transformers."""
    mlp = f"{theirs}.{2 if decoder else 1}"
    wide = ("wi_0", "wi_1") if config.feed_forward_proj == "gated-gelu" else ("wi",)
    modules = {
        f"{ours}.norm1": f"{theirs}.0.layer_norm",
        f"{ours}.attention.qkv": tuple(f"{theirs}.0.SelfAttention.{part}" for part in "qkv"),
        f"{ours}.attention.out": f"{theirs}.0.SelfAttention.o",
        f"{ours}.norm2": f"{mlp}.layer_norm",
        f"{ours}.mlp.linear1": tuple(f"{mlp}.DenseReluDense.{part}" for part in wide),
        f"{ours}.mlp.linear2": f"{mlp}.DenseReluDense.wo",
    }
    if decoder:
        modules |= {
            f"{ours}.norm_cross": f"{theirs}.1.layer_norm",
            f"{ours}.cross.q": f"{theirs}.1.EncDecAttention.q",
            f"{ours}.cross.kv": tuple(f"{theirs}.1.EncDecAttention.{part}" for part in "kv"),
            f"{ours}.cross.out": f"{theirs}.1.EncDecAttention.o",
        }
    return modules
