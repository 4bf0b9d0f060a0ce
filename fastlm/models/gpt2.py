"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") on packed sequences.

    x = drop(word[id] + position[p])
    each layer:   x = x + drop(W_o attention(W_q h, W_k h, W_v h)),   h = LN(x), causal
                  x = x + drop(W_2 gelu(W_1 h)),                      h = LN(x)
    logits = word · LN(x)                                             the decoder is the word table
    loss = mean of -log softmax(logits of token t)[id of token t + 1], t + 1 in the same sequence

W_q, W_k, W_v are one matrix product. Dropout, addition and the LN after it are one pass, so a layer returns x and
`delta`, which the next layer adds to x. In bfloat16 (the model's dtype, or autocast over float32 parameters) the
residual x is bfloat16; the statistics of every LN are float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fastlm import nn, ops
from fastlm.models import _checkpoint, _inputs
from fastlm.models._cache import Cache, Generative
from fastlm.models._checkpoint import Transposed
from fastlm.models._config import GELUS, Config
from fastlm.models._model import Counts, add_norm, as_stream, tied
from fastlm.nn.linear import Linear
from fastlm.ops import _checks
from fastlm.ops._heads import split_heads
from fastlm.settings import key


@dataclass(frozen=True)
class GPT2Config(Config):
    """The architecture, with the names and defaults of Transformers' config.json. ValueError if it cannot be built.

    n_inner: width of the feed-forward; None: 4 n_embd.
    initializer_range: standard deviation of the normal distribution of the initial weights. It is divided by
        sqrt(2 n_layer) for weights that lead into the residual. Biases start at 0, LN at 1 and 0.
    bias: False: no linear and no LN has one, as in nanoGPT. Checkpoints then hold zeros, which Transformers needs.
    bos_token_id, eos_token_id, pad_token_id: of the tokenizer, for generation; the model does not read them.
    """

    vocab_size: int = 50257
    n_positions: int = key(1024, "positions that have an embedding; at least data.row_tokens")
    n_embd: int = key(768, "width of the residual stream")
    n_layer: int = key(12, "layers")
    n_head: int = key(12, "heads; they divide n_embd")
    n_inner: int | None = key(None, "width of the MLP; by default 4 n_embd")
    activation_function: str = key("gelu_new", "gelu, or its tanh form gelu_new")
    resid_pdrop: float = key(0.1, "dropout of what a block adds")
    embd_pdrop: float = key(0.1, "dropout of the embeddings")
    attn_pdrop: float = key(0.1, "dropout of attention: 0, or at least 1/256")
    layer_norm_epsilon: float = key(1e-5, "added to the variance")
    initializer_range: float = key(0.02, "standard deviation of the initial weights")
    bias: bool = key(True, "biases in linears and LN")
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    pad_token_id: int | None = None

    model_type: ClassVar[str] = "gpt2"
    fixed: ClassVar[dict[str, object]] = {
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    decided: ClassVar[tuple[str, ...]] = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    length: ClassVar[str | None] = "n_positions"
    attention_dropout: ClassVar[str] = "attn_pdrop"
    depths: ClassVar[tuple[str, ...]] = ("n_layer",)

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head: expected a divisor of n_embd={self.n_embd}, got {self.n_head}")
        if self.n_inner is not None and not (isinstance(self.n_inner, int) and self.n_inner > 0):
            raise ValueError(f"n_inner: expected None or a positive integer, got {self.n_inner!r}")
        _checks.one_of("activation_function", self.activation_function, GELUS)
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias: expected True or False, got {self.bias!r}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            _checks.probability(name, getattr(self, name))

    def to_dict(self) -> dict:
        out = {**super().to_dict(), "tie_word_embeddings": True}
        if self.bias:  # as Transformers writes it
            del out["bias"]
        return out


class Layer(torch.nn.Module):
    """Attention and feed-forward, each after an LN. Takes three dropout site numbers."""

    def __init__(self, config: GPT2Config, site: int, **factory) -> None:
        super().__init__()
        size, norm = config.n_embd, {"eps": config.layer_norm_epsilon, "bias": config.bias, "keep_dtype": True}
        self.heads, self.site = config.n_head, site
        self.attention_dropout_p, self.dropout_p = config.attn_pdrop, config.resid_pdrop
        self.norm1 = nn.LayerNorm(size, **norm, **factory)
        self.qkv = Linear(size, 3 * size, bias=config.bias, **factory)
        self.out = Linear(size, size, bias=config.bias, **factory)
        self.norm2 = nn.LayerNorm(size, **norm, **factory)
        approximate = GELUS[config.activation_function]
        inner = config.n_inner or 4 * size
        self.mlp = nn.MLP(size, inner, approximate=approximate, bias=config.bias, **factory)

    def forward(self, x, delta, sequences, attend=ops.attention, *, rng):
        """(x, delta) -> (x, delta), each (..., n_embd), packed or padded. The delta of the first layer is None.

        sequences: the arguments of ops.attention that divide the tokens into sequences. attend: it, or a cache's.
        """
        attention_dropout_p, dropout_p = (self.attention_dropout_p, self.dropout_p) if self.training else (0.0, 0.0)
        h, x = add_norm(self.norm1, x, delta, dropout_p=dropout_p, rng=rng, site=self.site)
        q, k, v = split_heads(self.qkv(h), self.heads)
        attended = attend(q, k, v, causal=True, dropout_p=attention_dropout_p, rng=rng, site=self.site + 1, **sequences)
        delta = self.out(attended.flatten(-2))
        h, x = add_norm(self.norm2, x, delta, dropout_p=dropout_p, rng=rng, site=self.site + 2)
        return x, self.mlp(h)


class GPT2(Generative):
    """GPT-2 with its language-model head. Parameters start as `GPT2Config` says."""

    config_class = GPT2Config
    architecture = "GPT2LMHeadModel"
    backbone = ("transformer.",)

    def __init__(self, config: GPT2Config, *, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.word = torch.nn.Parameter(torch.empty(config.vocab_size, config.n_embd, **factory))
        self.position = torch.nn.Parameter(torch.empty(config.n_positions, config.n_embd, **factory))
        self.layers = torch.nn.ModuleList(Layer(config, site=1 + 3 * i, **factory) for i in range(config.n_layer))
        norm = {"eps": config.layer_norm_epsilon, "bias": config.bias, "keep_dtype": True}
        self.norm = nn.LayerNorm(config.n_embd, **norm, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(("out.weight", "linear2.weight")):
                parameter.normal_(0.0, std / (2 * self.config.n_layer) ** 0.5)
            else:
                parameter.normal_(0.0, std)

    def decode(
        self,
        input_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rng: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last LN's output, input_ids.shape + (n_embd,). Arguments as of `forward`."""
        given = self._sequences(input_ids, cu_seqlens, max_seqlen, attention_mask)
        return self._decode(given, positions, rng, self.word)

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rng: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """The loss if labels or shift_labels are given, else logits.

        Args:
            input_ids: int64 or int32, packed (T,) with cu_seqlens, or padded (B, S).
            cu_seqlens: int32 (sequences + 1,), where each sequence starts, then T (which may be repeated).
            max_seqlen: upper bound of the sequences' lengths; default n_positions.
            positions: like input_ids; default from 0 in each sequence. With an attention_mask only real tokens count,
                so padding on the left has no effect (Transformers counts from the row's start, padding included).
            attention_mask: (B, S), nonzero for real tokens, padding on either side; default: all are real.
            rng: int64 (2,), (seed, step), of all dropouts in training; None draws from torch's generator.
            labels: int64, like input_ids, usually input_ids: the token at t is predicted from those before it in its
                sequence. -100, the first token of a sequence and padding are not predicted.
            shift_labels: int64, like input_ids, in place of labels: what each token predicts, shifted already. It is
                read as it is, at the end of a sequence too; at padding nothing is predicted.
            reduction: "mean" over the predicted tokens, "sum"; or "none", like input_ids: the loss of what t predicts.

        Returns the loss; without labels the logits, input_ids.shape + (vocab_size,). ValueError for inputs that do not
        fit together.
        """
        given = self._sequences(input_ids, cu_seqlens, max_seqlen, attention_mask)
        targets = self._targets(given, labels, shift_labels)
        word, head, sparse = tied(self.word)
        x = self._decode(given, positions, rng, word, sparse)
        if targets is None:
            return F.linear(x, head)
        return ops.linear_cross_entropy(x, head, targets, reduction=reduction)

    def new_cache(self, capacity: int, length: int) -> Cache:
        c = self.config
        return Cache(
            c.n_layer, capacity, length, c.n_head, c.n_embd // c.n_head, device=self.word.device, dtype=self.word.dtype
        )

    def append(self, ids, cache: Cache, cu_seqlens=None, max_seqlen: int | None = None) -> torch.Tensor:
        given = cache.place(ids, cu_seqlens, max_seqlen)
        x = self._decode(given, cache.positions, None, self.word, cache=cache)
        return F.linear(cache.last(x), self.word)

    @staticmethod
    def _targets(given: _inputs.Sequences, labels, shift_labels) -> torch.Tensor | None:
        """What each token predicts, like the ids."""
        if shift_labels is None:
            if labels is None:
                return None
            _inputs.check_labels("labels", labels, given)
            return given.next_tokens(labels)
        if labels is not None:
            raise ValueError("shift_labels: expected None with labels, which are shifted here; pass one of them")
        _inputs.check_labels("shift_labels", shift_labels, given)
        return shift_labels if given.real is None else torch.where(given.real, shift_labels, ops.IGNORE_INDEX)

    def parts(self, name: str) -> int:
        return 3 if name.endswith(".qkv.weight") else super().parts(name)

    def flops(self, counts: Counts) -> float:
        c = self.config
        layer = 4 * c.n_embd * c.n_embd + 2 * c.n_embd * (c.n_inner or 4 * c.n_embd)
        layers = c.n_layer * (2 * counts.tokens * layer + 2 * counts.pairs * c.n_embd)
        return 3.0 * (layers + 2 * counts.predicted * c.n_embd * c.vocab_size)

    def _sequences(self, input_ids, cu_seqlens, max_seqlen, attention_mask) -> _inputs.Sequences:
        return _inputs.sequences(
            input_ids,
            cu_seqlens,
            max_seqlen,
            attention_mask,
            device=self.word.device,
            longest=self.config.longest,
        )

    def _decode(
        self, given: _inputs.Sequences, positions, rng, word, sparse=False, cache: Cache | None = None
    ) -> torch.Tensor:
        config, drops = self.config, float(self.training)
        positions = given.positions() if positions is None else positions
        embedded = ops.embedding(
            given.ids,
            word,
            self.position,
            positions=positions,
            dropout_p=drops * config.embd_pdrop,
            rng=rng,
            sparse=sparse,
        )
        x, delta, sequences = as_stream(embedded), None, given.attend()
        for i, layer in enumerate(self.layers):
            attend = ops.attention if cache is None else functools.partial(cache.attend, i)
            x, delta = self.run(layer, x, delta, sequences, attend, rng=rng)
        site = 1 + 3 * len(self.layers)
        return self.norm(delta, x, dropout_p=drops * config.resid_pdrop, rng=rng, site=site)

    @classmethod
    def transformers_names(cls, config: GPT2Config) -> _checkpoint.Names:
        names = {"word": ("transformer.wte.weight",), "position": ("transformer.wpe.weight",)}
        norms, kinds = {"norm": "transformer.ln_f"}, ("weight", "bias") if config.bias else ("weight",)
        for i in range(config.n_layer):
            ours, theirs = f"layers.{i}", f"transformer.h.{i}"
            norms |= {f"{ours}.norm1": f"{theirs}.ln_1", f"{ours}.norm2": f"{theirs}.ln_2"}
            for linear, conv in (
                ("qkv", "attn.c_attn"),
                ("out", "attn.c_proj"),
                ("mlp.linear1", "mlp.c_fc"),
                ("mlp.linear2", "mlp.c_proj"),
            ):
                names[f"{ours}.{linear}.weight"] = (Transposed(f"{theirs}.{conv}.weight"),)
                if config.bias:
                    names[f"{ours}.{linear}.bias"] = (f"{theirs}.{conv}.bias",)
        return names | _checkpoint.module_names(norms, kinds)

    def export_tensors(self) -> _checkpoint.Tensors:
        """Without biases, Transformers' are zeros: its model has the same numbers, and would train them."""
        tensors = super().export_tensors()
        for name in () if self.config.bias else tuple(tensors):
            if name not in ("transformer.wte.weight", "transformer.wpe.weight"):
                weight = tensors[name]  # (in, out) of a linear
                tensors[name.removesuffix("weight") + "bias"] = weight.new_zeros(weight.shape[-1])
        return tensors

    @classmethod
    def canonical(cls, tensors: _checkpoint.Tensors, config: GPT2Config) -> tuple[_checkpoint.Tensors, GPT2Config]:
        tensors = {
            f"transformer.{name}" if name.startswith(("wte.", "wpe.", "h.", "ln_f.")) else name: tensor  # GPT2Model's
            for name, tensor in tensors.items()
            if not name.endswith((".attn.bias", ".attn.masked_bias"))  # constants that old versions saved
        }
        _checkpoint.drop_copies(tensors, [("lm_head.weight", "transformer.wte.weight")])
        if not config.bias:
            for name in [name for name in tensors if name.startswith("transformer.") and name.endswith(".bias")]:
                if tensors.pop(name).any():
                    raise ValueError(f"bias: expected True, since {name} is not zero, got False")
        return tensors, config
