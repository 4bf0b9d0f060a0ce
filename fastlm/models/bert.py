"""BERT (Devlin et al. 2018, arXiv:1810.04805) on packed sequences, with a masked-LM head on the predicted tokens only.

    x = drop(LN(word[id] + position[p] + type[t]))
    each layer:   x = LN(x + drop(W_o attention(W_q x, W_k x, W_v x)))
                  x = LN(x + drop(W_2 gelu(W_1 x)))
    logits = word · LN(gelu(W x)) + bias                            the decoder is the word table

W_q, W_k, W_v are one matrix product; dropout, addition and LN are one pass, bias and GELU another. In bfloat16 (the
model's dtype, or autocast over float32 parameters) the residual x is bfloat16; the statistics of every LN are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fastlm import nn, ops
from fastlm.models import _checkpoint, _inputs
from fastlm.models._config import GELUS, Config
from fastlm.models._model import Counts, Model, as_stream, tied
from fastlm.nn.linear import Linear, linear
from fastlm.ops import _checks
from fastlm.ops._heads import split_heads
from fastlm.settings import key

_PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class BertConfig(Config):
    """The architecture, with the names and defaults of Transformers' config.json. ValueError if it cannot be built.

    initializer_range: standard deviation of the normal distribution of the initial weights. It is not truncated, as in
        Transformers; the paper truncates it. Biases and the padding row start at 0, LN at 1 and 0.
    pad_token_id: its row of the word table gets no gradient from the input. None: there is no padding token.
    labels: names of the classes of a classification head; config.json's id2label.
    classifier_dropout: before a classification head; None: hidden_dropout_prob.
    problem_type: of a sequence's labels; None: see BertForSequenceClassification.
    """

    vocab_size: int = 30522
    hidden_size: int = key(768, "width of the residual stream")
    num_hidden_layers: int = key(12, "layers")
    num_attention_heads: int = key(12, "heads; they divide hidden_size")
    intermediate_size: int = key(3072, "width of the MLP")
    hidden_act: str = key("gelu", "gelu, or its tanh form gelu_new")
    hidden_dropout_prob: float = key(0.1, "dropout of embeddings and of what a block adds")
    attention_probs_dropout_prob: float = key(0.1, "dropout of attention: 0, or at least 1/256")
    max_position_embeddings: int = key(512, "positions that have an embedding; at least data.row_tokens")
    type_vocab_size: int = key(2, "segments that have an embedding")
    initializer_range: float = key(0.02, "standard deviation of the initial weights")
    layer_norm_eps: float = key(1e-12, "added to the variance")
    pad_token_id: int | None = 0
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    classifier_dropout: float | None = None
    problem_type: str | None = None

    model_type: ClassVar[str] = "bert"
    fixed: ClassVar[dict[str, object]] = {
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
    }
    decided: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "pad_token_id",
        "labels",
        "classifier_dropout",
        "problem_type",
    )
    length: ClassVar[str | None] = "max_position_embeddings"
    attention_dropout: ClassVar[str] = "attention_probs_dropout_prob"
    depths: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size={self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        _checks.one_of("hidden_act", self.hidden_act, GELUS)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if getattr(self, name) is not None:
                _checks.probability(name, getattr(self, name))
        self._check_id("pad_token_id")
        if isinstance(self.labels, str) or not self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: expected at least one name, each once, got {self.labels!r}")
        object.__setattr__(self, "labels", tuple(self.labels))
        _checks.one_of("problem_type", self.problem_type, _PROBLEMS)

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @classmethod
    def from_dict(cls, config: dict) -> BertConfig:
        names = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
        labels = tuple(names[i] for i in sorted(names, key=int))
        return super().from_dict({**config, "labels": labels})

    def to_dict(self) -> dict:
        content = {**super().to_dict(), "tie_word_embeddings": True}
        labels = content.pop("labels")
        if labels != ("LABEL_0", "LABEL_1"):  # the default is left out, as in Transformers
            content["id2label"] = {str(i): name for i, name in enumerate(labels)}
            content["label2id"] = {name: i for i, name in enumerate(labels)}
        return content


class Embeddings(torch.nn.Module):
    """drop(LN(word[input_ids] + position[positions] + token_type[token_type_ids])), in one op."""

    def __init__(self, config: BertConfig, site: int, **factory) -> None:
        super().__init__()
        self.dropout_p, self.padding_idx, self.site = config.hidden_dropout_prob, config.pad_token_id, site
        for name, rows in (
            ("word", config.vocab_size),
            ("position", config.max_position_embeddings),
            ("token_type", config.type_vocab_size),
        ):
            self.register_parameter(name, torch.nn.Parameter(torch.empty(rows, config.hidden_size, **factory)))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **factory)

    def forward(self, input_ids, positions, token_type_ids, rng, word=None, sparse=False):
        """word, sparse: from `tied`, if a head reads the table too."""
        word = self.word if word is None else word
        x = ops.embedding(
            input_ids,
            word,
            self.position,
            self.token_type,
            positions=positions,
            token_type_ids=token_type_ids,
            weight=self.norm.weight,
            bias=self.norm.bias,
            eps=self.norm.eps,
            padding_idx=self.padding_idx,
            dropout_p=self.dropout_p if self.training else 0.0,
            rng=rng,
            site=self.site,
            sparse=sparse,
        )
        return as_stream(x)


class Layer(torch.nn.Module):
    """Attention and feed-forward, each followed by dropout, addition and LN. Takes three dropout site numbers."""

    def __init__(self, config: BertConfig, site: int, **factory) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.site = config.num_attention_heads, site
        self.attention_dropout_p, self.dropout_p = config.attention_probs_dropout_prob, config.hidden_dropout_prob
        self.qkv = Linear(size, 3 * size, **factory)
        self.out = Linear(size, size, **factory)
        self.norm1 = nn.LayerNorm(size, eps=eps, **factory, keep_dtype=True)
        self.mlp = nn.MLP(size, config.intermediate_size, approximate=GELUS[config.hidden_act], **factory)
        self.norm2 = nn.LayerNorm(size, eps=eps, **factory, keep_dtype=True)

    def forward(self, x, sequences, index=None, *, rng):
        """x (..., hidden). `sequences` holds the arguments of ops.attention for packed or padded input.

        With index (P,) the result is (P, hidden), for these tokens only. Attention still reads every token; the rest of
        the layer runs on P rows.
        """
        attention_dropout_p, dropout_p = (self.attention_dropout_p, self.dropout_p) if self.training else (0.0, 0.0)
        qkv, x = self.qkv(x, keep=True)
        q, k, v = split_heads(qkv, self.heads)
        attended = ops.attention(q, k, v, dropout_p=attention_dropout_p, rng=rng, site=self.site, **sequences)
        attended = attended.flatten(-2)
        if index is not None:
            attended, x = (t.flatten(0, -2).index_select(0, index) for t in (attended, x))
        x = self.norm1(self.out(attended), x, dropout_p=dropout_p, rng=rng, site=self.site + 1)
        delta, x = self.mlp(x, keep=True)
        return self.norm2(delta, x, dropout_p=dropout_p, rng=rng, site=self.site + 2)


class MaskedLMHead(torch.nn.Module):
    """LN(gelu(dense(x))), the decoder's input. The decoder is tied to the word table; `bias` is the decoder's."""

    def __init__(self, config: BertConfig, **factory) -> None:
        super().__init__()
        self.approximate = GELUS[config.hidden_act]
        self.dense = Linear(config.hidden_size, config.hidden_size, **factory)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **factory, keep_dtype=True)
        self.bias = torch.nn.Parameter(torch.empty(config.vocab_size, **factory))

    def forward(self, x):
        return self.norm(ops.gelu(linear(x, self.dense.weight), self.dense.bias, approximate=self.approximate))


class BertEncoder(Model):
    """The embeddings and layers, which all heads share. The __init__ of a head ends with reset_parameters()."""

    config_class = BertConfig
    backbone = ("bert.embeddings.", "bert.encoder.")

    def __init__(self, config: BertConfig, *, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.embeddings = Embeddings(config, site=0, **factory)
        self.layers = torch.nn.ModuleList(
            Layer(config, site=1 + 3 * i, **factory) for i in range(config.num_hidden_layers)
        )
        self.site = 1 + 3 * config.num_hidden_layers  # of a head's dropout

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

    def layer_flops(self, counts: Counts) -> float:
        """FLOPs of the layers in forward, each on all tokens."""
        c = self.config
        layer = 4 * c.hidden_size * c.hidden_size + 2 * c.hidden_size * c.intermediate_size
        return c.num_hidden_layers * (2 * counts.tokens * layer + 4 * counts.pairs * c.hidden_size)

    def sequences(self, input_ids, cu_seqlens, max_seqlen, attention_mask) -> _inputs.Sequences:
        """The checked inputs of `encode`."""
        return _inputs.sequences(
            input_ids,
            cu_seqlens,
            max_seqlen,
            attention_mask,
            device=self.embeddings.word.device,
            longest=self.config.longest,
        )

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
        """The last layer's output, input_ids.shape + (hidden_size,); with index, (P, hidden_size) for those tokens.

        Arguments as of `forward`. The dropouts of the last layer count the rows that they get, so index changes them.
        """
        given = self.sequences(input_ids, cu_seqlens, max_seqlen, attention_mask)
        return self._encode(given, positions, token_type_ids, rng, index)

    def _encode(
        self, given: _inputs.Sequences, positions, token_type_ids, rng, index=None, word=None, sparse=False
    ) -> torch.Tensor:
        """`encode` of checked inputs. word, sparse: as in Embeddings."""
        positions = given.positions() if positions is None else positions
        x, sequences = self.embeddings(given.ids, positions, token_type_ids, rng, word, sparse), given.attend()
        for layer in self.layers[:-1]:
            x = self.run(layer, x, sequences, rng=rng)
        return self.run(self.layers[-1], x, sequences, index, rng=rng)

    @classmethod
    def canonical(cls, tensors: _checkpoint.Tensors, config: BertConfig) -> tuple[_checkpoint.Tensors, BertConfig]:
        tensors = {_current_name(name): tensor for name, tensor in tensors.items()}
        tensors.pop("bert.embeddings.position_ids", None)  # a constant that old versions saved
        _checkpoint.drop_copies(
            tensors,
            (
                ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
                ("cls.predictions.decoder.bias", "cls.predictions.bias"),
            ),
        )
        return tensors, config


class Bert(BertEncoder):
    """BERT with its masked-LM head. Parameters start as `BertConfig` says."""

    architecture = "BertForMaskedLM"

    def __init__(self, config: BertConfig, *, device=None, dtype=None) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.head = MaskedLMHead(config, device=device, dtype=dtype)
        self.reset_parameters()

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
        """The loss if targets are given, else logits.

        Args:
            input_ids: int64 or int32, packed (T,) with cu_seqlens, or padded (B, S).
            cu_seqlens: int32 (sequences + 1,), where each sequence starts, then T (which may be repeated).
            max_seqlen: upper bound of the sequences' lengths; default max_position_embeddings.
            positions: like input_ids; default from 0 in each sequence. With an attention_mask only real tokens count,
                so padding on the left has no effect (Transformers counts from the row's start, padding included).
            attention_mask: (B, S), nonzero for real tokens, padding on either side; default: all are real.
            token_type_ids: like input_ids; default 0.
            rng: int64 (2,), (seed, step), of all dropouts in training; None draws from torch's generator.
            index: int64 (P,), positions in the flattened input_ids (MaskedTokens.index). The head, and the last layer
                after its attention, run on these only; default all of them.
            targets: int64, like index or, without it, like input_ids: the tokens to predict, -100 for none.
            count: the number of entries of index in use (MaskedTokens.count). On the CPU the head runs on these only;
                on a device, where reading count would stall, on all. A compiled step leaves it out.
            reduction: "mean" over the targets that are not -100, "sum" or "none".

        Returns the loss; without targets the logits at index, (P, vocab_size), or of every token, input_ids.shape +
        (vocab_size,). ValueError if the inputs do not fit together.
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
        given = self.sequences(input_ids, cu_seqlens, max_seqlen, attention_mask)
        word, decoder, sparse = tied(self.embeddings.word)
        x = self.head(self._encode(given, positions, token_type_ids, rng, index, word, sparse))
        if targets is None:
            return F.linear(x, decoder, self.head.bias)
        return ops.linear_cross_entropy(x, decoder, targets, self.head.bias, reduction=reduction)

    def flops(self, counts: Counts) -> float:
        c = self.config
        head = 2 * counts.predicted * (c.hidden_size * c.hidden_size + c.hidden_size * c.vocab_size)
        return 3.0 * (self.layer_flops(counts) + head)

    @classmethod
    def transformers_names(cls, config: BertConfig) -> _checkpoint.Names:
        return {
            **encoder_names(config),
            **_checkpoint.module_names(
                {
                    "head.dense": "cls.predictions.transform.dense",
                    "head.norm": "cls.predictions.transform.LayerNorm",
                }
            ),
            "head.bias": ("cls.predictions.bias",),
        }


def encoder_names(config: BertConfig) -> _checkpoint.Names:
    """Parameter names of the embeddings and layers in fastlm -> in Transformers."""
    tables = {
        f"embeddings.{name}": (f"bert.embeddings.{name}_embeddings.weight",)
        for name in ("word", "position", "token_type")
    }
    modules = {"embeddings.norm": "bert.embeddings.LayerNorm"}
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
    return tables | _checkpoint.module_names(modules)


def _current_name(name: str) -> str:
    """A tensor's present name in BertForMaskedLM. BertModel saves no prefix; TensorFlow named LN's gamma and beta."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
