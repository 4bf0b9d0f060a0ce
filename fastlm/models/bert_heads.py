"""BERT's other heads (Devlin et al. 2018, section 3.2, figure 4), on the encoder of fastlm/models/bert.py.

With x (tokens, hidden) the last layer's output and x_0 its row of a sequence's first token, [CLS]:
    pooled = tanh(W_p x_0)
    BertForSequenceClassification    logits = W drop(pooled), one row a sequence
    BertForTokenClassification       logits = W drop(x), one row a token
    BertForQuestionAnswering         start, end = W x, two numbers a token; a softmax over each sequence's tokens
Names, arguments and losses are those of Transformers. If only x_0 is needed, the last layer runs only on the first
tokens after its attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import nn, ops
from fastlm.models import _checkpoint
from fastlm.models._inputs import check_labels
from fastlm.models._model import Counts
from fastlm.models.bert import BertConfig, BertEncoder, encoder_names
from fastlm.ops import IGNORE_INDEX, _checks


class BertModel(BertEncoder):
    """The encoder and its pooler, without a head."""

    architecture = "BertModel"

    def __init__(self, config: BertConfig, *, device=None, dtype=None) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.pooler = torch.nn.Linear(config.hidden_size, config.hidden_size, device=device, dtype=dtype)
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, pooled): input_ids.shape + (hidden_size,), and (sequences, hidden_size). Arguments as of `Bert.forward`.

        The row of an empty sequence has no meaning, here and below.
        """
        given = self.sequences(input_ids, cu_seqlens, max_seqlen, attention_mask)
        x = self._encode(given, positions, token_type_ids, rng)
        return x, torch.tanh(self.pooler(x.flatten(0, -2).index_select(0, given.first())))

    def export_tensors(self) -> _checkpoint.Tensors:
        return {name.removeprefix("bert."): tensor for name, tensor in super().export_tensors().items()}

    @classmethod
    def transformers_names(cls, config: BertConfig) -> _checkpoint.Names:
        return encoder_names(config) | _checkpoint.module_names({"pooler": "bert.pooler.dense"})


class BertForSequenceClassification(BertEncoder):
    """One class, several classes, or numbers for each sequence; config.labels names them."""

    architecture = "BertForSequenceClassification"

    def __init__(self, config: BertConfig, *, device=None, dtype=None) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.pooler = torch.nn.Linear(config.hidden_size, config.hidden_size, device=device, dtype=dtype)
        self.dropout = _classifier_dropout(config, self.site)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels, device=device, dtype=dtype)
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
        labels: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """The loss if labels are given, else logits, (sequences, num_labels).

        labels: as config.problem_type says; if that is None, their dtype and shape decide:
            "single_label_classification": int64 (sequences,), -100 for none: cross-entropy;
            "multi_label_classification": floating point (sequences, num_labels), 0 or 1: binary cross-entropy;
            "regression", and None with one label: floating point (sequences,) or (sequences, num_labels): squares.
            The labels of empty sequences are not read.
        reduction: "mean", "sum" or "none".
        The other arguments as of `Bert.forward`. ValueError for inputs that do not fit together.
        """
        given = self.sequences(input_ids, cu_seqlens, max_seqlen, attention_mask)
        x = self._encode(given, positions, token_type_ids, rng, given.first())
        x = self.dropout(torch.tanh(self.pooler(x)), rng)
        if labels is None:
            return self.classifier(x)
        _checks.is_tensor("labels", labels)
        problem = self._problem(labels)
        real = given.lengths() > 0
        if problem == "single_label_classification":
            _checks.is_tensor("labels", labels, device=x.device, dtypes=(torch.int64,), shape=real.shape)
            labels = torch.where(real, labels, IGNORE_INDEX)
            weight, bias = self.classifier.weight, self.classifier.bias
            return ops.linear_cross_entropy(x, weight, labels, bias, reduction=reduction)
        logits = self.classifier(x).float()
        if self.config.num_labels == 1 and labels.dim() == 1:
            logits = logits.squeeze(-1)
        _checks.is_float("labels", labels, device=x.device, shape=logits.shape)
        _checks.one_of("reduction", reduction, ("mean", "sum", "none"))
        loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        real = real.view(-1, *(1,) * (logits.dim() - 1)).expand(logits.shape)
        losses = torch.where(real, loss(logits, labels.to(logits.dtype), reduction="none"), 0.0)
        if reduction == "none":
            return losses
        return losses.sum() / real.sum() if reduction == "mean" else losses.sum()

    def _problem(self, labels: torch.Tensor) -> str:
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"

    def flops(self, counts: Counts) -> float:
        """Of the last layer only attention's inputs are computed for all tokens."""
        c, width = self.config, self.config.hidden_size
        several = c.problem_type == "multi_label_classification"  # each label of a sequence counts as predicted
        sequences = counts.predicted / (c.num_labels if several else 1)
        rest = width * width + 2 * width * c.intermediate_size  # of a layer, after attention
        layers = c.num_hidden_layers * (2 * counts.tokens * 3 * width * width + 4 * counts.pairs * width)
        layers += 2 * rest * ((c.num_hidden_layers - 1) * counts.tokens + sequences)
        return 3.0 * (layers + 2 * sequences * width * (width + c.num_labels))

    @classmethod
    def transformers_names(cls, config: BertConfig) -> _checkpoint.Names:
        modules = {"pooler": "bert.pooler.dense", "classifier": "classifier"}
        return encoder_names(config) | _checkpoint.module_names(modules)


class BertForTokenClassification(BertEncoder):
    """A class for each token; config.labels names them."""

    architecture = "BertForTokenClassification"

    def __init__(self, config: BertConfig, *, device=None, dtype=None) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.dropout = _classifier_dropout(config, self.site)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels, device=device, dtype=dtype)
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
        labels: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """The loss if labels are given, else logits, input_ids.shape + (num_labels,).

        labels: int64, like input_ids, -100 for none. reduction: "mean" over the others, "sum" or "none".
        The other arguments as of `Bert.forward`. ValueError for inputs that do not fit together.
        """
        given = self.sequences(input_ids, cu_seqlens, max_seqlen, attention_mask)
        x = self.dropout(self._encode(given, positions, token_type_ids, rng), rng)
        if labels is None:
            return self.classifier(x)
        check_labels("labels", labels, given)
        weight, bias = self.classifier.weight, self.classifier.bias
        return ops.linear_cross_entropy(x, weight, labels, bias, reduction=reduction)

    def flops(self, counts: Counts) -> float:
        head = 2 * counts.predicted * self.config.hidden_size * self.config.num_labels
        return 3.0 * (self.layer_flops(counts) + head)

    @classmethod
    def transformers_names(cls, config: BertConfig) -> _checkpoint.Names:
        return encoder_names(config) | _checkpoint.module_names({"classifier": "classifier"})


class BertForQuestionAnswering(BertEncoder):
    """The first and last token of an answer within each sequence (question, then context)."""

    architecture = "BertForQuestionAnswering"

    def flops(self, counts: Counts) -> float:
        return 3.0 * (self.layer_flops(counts) + 2 * counts.tokens * self.config.hidden_size * 2)

    def __init__(self, config: BertConfig, *, device=None, dtype=None) -> None:
        if config.num_labels != 2:
            raise ValueError(f"labels: expected two for question answering, start and end, got {config.labels}")
        super().__init__(config, device=device, dtype=dtype)
        self.outputs = torch.nn.Linear(config.hidden_size, 2, device=device, dtype=dtype)
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
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The loss if positions are given, else the logits (start, end), each like input_ids.

        start_positions, end_positions: int64 (sequences,), counted from 0 over the real tokens of each sequence. A
            position that is -100, or outside its sequence (an answer that was cut off), is not predicted.
        reduction: of both losses, whose mean is returned: "mean", "sum" or "none".
        The other arguments as of `Bert.forward`. Padding takes no part in the softmax (in Transformers it does).
        ValueError for inputs that do not fit together.
        """
        given = self.sequences(input_ids, cu_seqlens, max_seqlen, attention_mask)
        start, end = self.outputs(self._encode(given, positions, token_type_ids, rng)).unbind(-1)
        if start_positions is None and end_positions is None:
            return start, end
        lengths, losses = given.lengths(), []
        for name, logits, wanted in (
            ("start_positions", start, start_positions),
            ("end_positions", end, end_positions),
        ):
            _checks.is_tensor(name, wanted, device=logits.device, dtypes=(torch.int64,), shape=lengths.shape)
            # Not -inf, since an empty sequence would give NaN, even if it is ignored.
            rows = given.padded(logits, torch.finfo(logits.dtype).min)
            wanted = torch.where(wanted < lengths, wanted, IGNORE_INDEX)
            losses.append(ops.cross_entropy(rows, wanted, reduction=reduction))
        return (losses[0] + losses[1]) / 2

    @classmethod
    def transformers_names(cls, config: BertConfig) -> _checkpoint.Names:
        return encoder_names(config) | _checkpoint.module_names({"outputs": "qa_outputs"})


def _classifier_dropout(config: BertConfig, site: int) -> nn.Dropout:
    p = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return nn.Dropout(p, site=site)
