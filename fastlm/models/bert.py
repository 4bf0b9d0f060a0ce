"""BERT (Devlin et al. 2018, arXiv:1810.04805), packed end to end, with a masked-LM head on the predicted tokens alone.

    x = drop(LN(word[id] + position[p] + type[t]))
    each layer:   x = LN(x + drop(W_o attention(W_q x, W_k x, W_v x)))
                  x = LN(x + drop(W_2 gelu(W_1 x)))
    logits = word · LN(gelu(W x)) + bias                            the decoder is the word table

W_q, W_k, W_v are one matrix product; dropout, addition and LN are one pass, bias and GELU another. In bfloat16 (the
model's dtype, or autocast over float32 parameters) the residual stream x is bfloat16, every LN's statistics float32.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F

from fastlm import nn, ops
from fastlm.models import _checkpoint
from fastlm.ops import _checks

# hidden_act in config.json -> `approximate` of ops.gelu
_GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True)
class BertConfig:
    """The architecture, in the names and defaults of Transformers' config.json. ValueError for what cannot be built.

    initializer_range: weights start from a normal distribution of this standard deviation, not truncated (that is
        Transformers'; the paper truncates); biases and the padding row start at 0, LN at 1 and 0.
    pad_token_id: its row of the word table gets no gradient from the input; None: there is none.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{field.name}: expected a positive integer, got {value!r}")
            if field.type == "float" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{field.name}: expected a number that is not negative, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size={self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        _checks.one_of("hidden_act", self.hidden_act, _GELUS)
        _checks.probability("hidden_dropout_prob", self.hidden_dropout_prob)
        _checks.probability("attention_probs_dropout_prob", self.attention_probs_dropout_prob)
        pad = self.pad_token_id
        if pad is not None and not (isinstance(pad, int) and 0 <= pad < self.vocab_size):
            raise ValueError(f"pad_token_id: expected None or an id below vocab_size={self.vocab_size}, got {pad!r}")

    @classmethod
    def from_dict(cls, config: dict) -> BertConfig:
        """From the content of a config.json. What training does not need is dropped; ValueError for another model."""
        for name, want in (
            ("is_decoder", False),
            ("add_cross_attention", False),
            ("tie_word_embeddings", True),
            ("position_embedding_type", "absolute"),
        ):
            if config.get(name, want) != want:
                raise ValueError(f"{name}: expected {want!r}, as in BERT's paper, got {config[name]!r}")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def to_dict(self) -> dict:
        """The content of a config.json that Transformers reads as BertForMaskedLM's."""
        return {"architectures": ["BertForMaskedLM"], "model_type": "bert", "tie_word_embeddings": True, **asdict(self)}


class Embeddings(torch.nn.Module):
    """drop(LN(word[input_ids] + position[positions] + token_type[token_type_ids])), in one op."""

    def __init__(self, config: BertConfig, stream: int, **factory) -> None:
        super().__init__()
        self.dropout_p, self.padding_idx, self.stream = config.hidden_dropout_prob, config.pad_token_id, stream
        for name, rows in (
            ("word", config.vocab_size),
            ("position", config.max_position_embeddings),
            ("token_type", config.type_vocab_size),
        ):
            self.register_parameter(name, torch.nn.Parameter(torch.empty(rows, config.hidden_size, **factory)))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **factory)

    def forward(self, input_ids, positions, token_type_ids, rng):
        x = ops.embedding(
            input_ids, self.word, self.position, self.token_type, positions=positions, token_type_ids=token_type_ids,
            weight=self.norm.weight, bias=self.norm.bias, eps=self.norm.eps, padding_idx=self.padding_idx,
            dropout_p=self.dropout_p if self.training else 0.0, rng=rng, stream=self.stream,
        )  # fmt: skip
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Layer(torch.nn.Module):
    """Attention and feed-forward, each followed by dropout, addition and LN. Takes three stream numbers."""

    def __init__(self, config: BertConfig, stream: int, **factory) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.stream = config.num_attention_heads, stream
        self.attention_dropout_p, self.dropout_p = config.attention_probs_dropout_prob, config.hidden_dropout_prob
        self.qkv = torch.nn.Linear(size, 3 * size, **factory)
        self.out = torch.nn.Linear(size, size, **factory)
        self.norm1 = nn.LayerNorm(size, eps=eps, **factory, keep_dtype=True)
        self.mlp = nn.MLP(size, config.intermediate_size, approximate=_GELUS[config.hidden_act], **factory)
        self.norm2 = nn.LayerNorm(size, eps=eps, **factory, keep_dtype=True)

    def forward(self, x, sequences, rng, index=None):
        """x (..., hidden), packed or padded; `sequences` are the arguments of ops.attention that say which.

        With index (P,) the result is (P, hidden), of these tokens alone: every token is attended to, and what comes
        after attention runs on P rows.
        """
        attention_dropout_p, dropout_p = (self.attention_dropout_p, self.dropout_p) if self.training else (0.0, 0.0)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # views, (..., heads, head_dim)
        attended = ops.attention(q, k, v, dropout_p=attention_dropout_p, rng=rng, stream=self.stream, **sequences)
        attended = attended.flatten(-2)
        if index is not None:
            attended, x = (t.flatten(0, -2).index_select(0, index) for t in (attended, x))
        x = self.norm1(self.out(attended), x, dropout_p=dropout_p, rng=rng, stream=self.stream + 1)
        return self.norm2(self.mlp(x), x, dropout_p=dropout_p, rng=rng, stream=self.stream + 2)


class MaskedLMHead(torch.nn.Module):
    """LN(gelu(dense(x))): what the decoder, tied to the word table, turns into logits; `bias` is the decoder's."""

    def __init__(self, config: BertConfig, **factory) -> None:
        super().__init__()
        self.approximate = _GELUS[config.hidden_act]
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size, **factory)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **factory, keep_dtype=True)
        self.bias = torch.nn.Parameter(torch.empty(config.vocab_size, **factory))

    def forward(self, x):
        return self.norm(ops.gelu(F.linear(x, self.dense.weight), self.dense.bias, approximate=self.approximate))


class Bert(torch.nn.Module):
    """BERT with its masked-LM head. Parameters start as `BertConfig` says."""

    def __init__(self, config: BertConfig, *, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.embeddings = Embeddings(config, stream=0, **factory)
        self.layers = torch.nn.ModuleList(
            Layer(config, stream=1 + 3 * i, **factory) for i in range(config.num_hidden_layers)
        )
        self.head = MaskedLMHead(config, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std)
        if self.config.pad_token_id is not None:
            self.embeddings.word[self.config.pad_token_id].zero_()

    def encode(
        self,
        input_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        rng: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last layer's output, input_ids.shape + (hidden_size,); with index (P, hidden_size), of those tokens.

        Arguments as of `forward`. The last layer's dropouts count the rows of what they see, so index changes them.
        """
        longest = self.config.max_position_embeddings
        _checks.is_tensor("input_ids", input_ids, device=self.head.bias.device, dtypes=(torch.int64, torch.int32))
        if cu_seqlens is not None:
            _checks.is_tensor("input_ids", input_ids, shape=(None,))
            _checks.is_tensor("cu_seqlens", cu_seqlens, device=input_ids.device, dtypes=(torch.int32,), shape=(None,))
            if cu_seqlens.shape[0] == 0:
                raise ValueError("cu_seqlens: expected one more entry than there are sequences, got none")
            if attention_mask is not None:
                raise ValueError(
                    "attention_mask: expected None with cu_seqlens, which leave no padding; pass one of them"
                )
            if max_seqlen is None:  # reading cu_seqlens would stall a device; this bound costs no more than a true one
                max_seqlen = min(input_ids.shape[0], longest)
            if max_seqlen > longest:
                raise ValueError(f"max_seqlen: expected at most max_position_embeddings={longest}, got {max_seqlen}")
            sequences = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max_seqlen}
            if positions is None:
                token = torch.arange(input_ids.shape[0], dtype=torch.int32, device=input_ids.device)
                start = cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
                positions = (token - start).clamp(min=0)  # of a wrong cu_seqlens, attention says what is wrong
        else:
            if input_ids.dim() != 2 or input_ids.shape[1] > longest:
                raise ValueError(
                    f"input_ids: expected (T,) with cu_seqlens, or (B, S) with S at most max_position_embeddings="
                    f"{longest}, got {tuple(input_ids.shape)}"
                )
            sequences = {}
            if attention_mask is not None:
                _checks.is_tensor("attention_mask", attention_mask, device=input_ids.device, shape=input_ids.shape)
                real = attention_mask.bool()
                sequences["key_mask"] = real
                if positions is None:
                    positions = (real.cumsum(-1) - 1).clamp(min=0)
        x = self.embeddings(input_ids, positions, token_type_ids, rng)
        for layer in self.layers[:-1]:
            x = layer(x, sequences, rng)
        return self.layers[-1](x, sequences, rng, index)

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        rng: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        count: torch.Tensor | int | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """The loss where there are targets, else logits.

        Args:
            input_ids: int64 or int32, packed (T,) with cu_seqlens, or padded (B, S).
            cu_seqlens: int32 (sequences + 1,), where each sequence starts, then T (which may be repeated).
            max_seqlen: no sequence is longer; default max_position_embeddings.
            positions: like input_ids; default from 0 in each sequence. With an attention_mask only real tokens count,
                so padding on the left changes nothing (Transformers counts from the row's start, padding included).
            attention_mask: (B, S), nonzero for real tokens, padding on either side; default: all are real.
            token_type_ids: like input_ids; default 0.
            rng: int64 (2,), (seed, step), of all dropouts in training; None draws from torch's generator.
            index: int64 (P,), positions in the flattened input_ids (MaskedTokens.index) that the head runs on, and what
                follows the last layer's attention; default all of them.
            targets: int64, like index or, without it, like input_ids: the tokens to predict, -100 where there is none.
            count: how many entries of index are in use (MaskedTokens.count). On the CPU the head runs on these alone;
                on a device, where reading it would stall, on all. A compiled step leaves it out.
            reduction: "mean" over the targets that are not -100, "sum" or "none".

        Returns the loss; without targets the logits at index, (P, vocab_size), or of every token, input_ids.shape +
        (vocab_size,). ValueError for inputs that do not fit together.
        """
        if index is not None:
            _checks.is_tensor("index", index, device=input_ids.device, dtypes=(torch.int64,), shape=(None,))
            if targets is not None:
                _checks.is_tensor("targets", targets, shape=index.shape)
            if count is not None and index.device.type == "cpu":
                index, targets = index[: int(count)], None if targets is None else targets[: int(count)]
            _checks.ids_inside("index", index, "the number of tokens", input_ids.numel())
        elif count is not None:
            raise ValueError(f"count: expected None without index, whose entries it counts, got {count}")
        x = self.encode(
            input_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, positions=positions,
            attention_mask=attention_mask, token_type_ids=token_type_ids, rng=rng, index=index,
        )  # fmt: skip
        x = self.head(x)
        if targets is None:
            return F.linear(x, self.embeddings.word, self.head.bias)
        return ops.linear_cross_entropy(x, self.embeddings.word, targets, self.head.bias, reduction=reduction)

    def save_pretrained(self, directory: str | Path, tokenizer=None) -> None:
        """Writes what transformers.AutoModelForMaskedLM.from_pretrained(directory) reads.

        tokenizer: anything with `save(directory)` (fastlm.data.Tokenizer), whose files then lie beside the model's.
        No file is ever half-written; config.json comes last.
        """
        config = {**self.config.to_dict(), "dtype": str(self.head.bias.dtype).removeprefix("torch.")}
        tensors = _checkpoint.export_tensors(self.state_dict(), transformers_names(self.config))
        _checkpoint.write(directory, config, tensors, tokenizer)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Bert:
        """Reads what Transformers wrote for BertForMaskedLM, BertModel or a BERT with another head; on the CPU.

        A masked-LM head that is not there starts anew, and other heads are left out, each with a warning that names
        the tensors. ValueError for a missing or unreadable file, another model_type, pickled weights, missing tensors
        of the encoder, and tensors of another shape than config.json says.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point one, got {dtype}")
        config = BertConfig.from_dict(_checkpoint.read_config(directory, "bert"))
        tensors = {_current_name(name): tensor for name, tensor in _checkpoint.read_tensors(directory).items()}
        others = _other_tensors(tensors, config)
        names = transformers_names(config)
        model = cls(config, device="meta", dtype=dtype).to_empty(device="cpu")
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        state, missing = _checkpoint.import_tensors(tensors, names, shapes)
        if incomplete := [name for name in missing if name.startswith("bert.")]:
            raise ValueError(f"directory: expected every tensor of the encoder, {', '.join(incomplete)} missing")
        if others:
            warnings.warn(f"left out, a masked-LM model has no place for: {', '.join(others)}", stacklevel=2)
        if missing:
            warnings.warn(f"the masked-LM head starts anew, not in {directory}: {', '.join(missing)}", stacklevel=2)
            model.reset_parameters()
        model.load_state_dict(state, strict=False)
        return model


def transformers_names(config: BertConfig) -> _checkpoint.Names:
    """Our parameter names -> those of transformers.BertForMaskedLM; see fastlm.models._checkpoint."""
    names = {
        "embeddings.word": "bert.embeddings.word_embeddings.weight",
        "embeddings.position": "bert.embeddings.position_embeddings.weight",
        "embeddings.token_type": "bert.embeddings.token_type_embeddings.weight",
        "head.bias": "cls.predictions.bias",
    }
    modules = {
        "embeddings.norm": "bert.embeddings.LayerNorm",
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
    }
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"bert.encoder.layer.{i}"
        modules |= {
            f"{ours}.qkv": tuple(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")),
            f"{ours}.out": f"{theirs}.attention.output.dense",
            f"{ours}.norm1": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.mlp.linear1": f"{theirs}.intermediate.dense",
            f"{ours}.mlp.linear2": f"{theirs}.output.dense",
            f"{ours}.norm2": f"{theirs}.output.LayerNorm",
        }
    out = {ours: (theirs,) for ours, theirs in names.items()}
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            parts = (theirs,) if isinstance(theirs, str) else theirs
            out[f"{ours}.{kind}"] = tuple(f"{part}.{kind}" for part in parts)
    return out


def _current_name(name: str) -> str:
    """A tensor's name as BertForMaskedLM has it today: BertModel saves no prefix, TensorFlow's LN was gamma, beta."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _other_tensors(tensors: _checkpoint.Tensors, config: BertConfig) -> list[str]:
    """Names of other heads' tensors. Copies of tied tensors are taken out: equal to the original, or in its place."""
    for copy, name in (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ):
        if copy in tensors:
            copied = tensors.pop(copy)
            if not torch.equal(copied, tensors.setdefault(name, copied)):
                raise ValueError(f"directory: expected {copy} equal to {name}, to which BERT ties it")
    known = {name for theirs in transformers_names(config).values() for name in theirs}
    # position_ids: a constant that old versions saved
    others = [name for name in sorted(tensors.keys() - known) if not name.endswith("embeddings.position_ids")]
    for name in others:
        if name.startswith(("bert.embeddings.", "bert.encoder.")):
            raise ValueError(f"directory: expected no tensor beyond config.json's architecture, got {name}")
    return others
