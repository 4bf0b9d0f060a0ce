"""A tiny Bert, batches for it, and runs of it and of Transformers' model with the same weights."""

import torch
import torch.nn.functional as F
from models import gradients, pad, their_gradients, to_transformers, widen

from fastlm.models import Bert, BertConfig

TINY = {
    "vocab_size": 83,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 24,
}

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

LENGTHS = (11, 3, 16, 1)

MASK, PAD = 4, 0


def make_bert(seed=0, **changes):
    return widen(Bert(BertConfig(**{**TINY, **changes})), seed)


class Batch:
    """The same documents packed, padded left and padded right, with the tokens to predict."""

    def __init__(self, seed=0, lengths=LENGTHS, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        documents = [torch.randint(5, TINY["vocab_size"], (n,), generator=generator) for n in lengths]
        labels = [torch.where(torch.rand(n, generator=generator) < 0.3, d, -100) for n, d in zip(lengths, documents)]
        labels[0][0] = documents[0][0]  # at least one
        types = [torch.arange(n) * 2 // n for n in lengths]
        longest, self.device = max(lengths), device

        self.sides = {}
        for side, left in (("left", True), ("right", False)):
            real = pad([torch.ones(n) for n in lengths], 0, left).long()
            self.sides[side] = (
                {
                    "input_ids": pad(documents, PAD, left).to(device),
                    "attention_mask": real.to(device),
                    "token_type_ids": pad(types, 0, left).to(device),
                },
                pad(labels, -100, left).to(device),
            )
        cu = torch.tensor(
            [0, *torch.tensor(lengths).cumsum(0).tolist(), sum(lengths), sum(lengths)]
        )  # repeats at the end
        self.packed = {
            "input_ids": torch.cat(documents).to(device),
            "cu_seqlens": cu.int().to(device),
            "max_seqlen": longest,
            "token_type_ids": torch.cat(types).to(device),
        }
        self.labels = torch.cat(labels).to(device)

    def sparse(self, spare=3):
        """index, targets, count as mlm_mask gives them, with `spare` entries beyond the count."""
        index = (self.labels != -100).nonzero().flatten()
        padding = index.new_zeros(spare)
        return {
            "index": torch.cat([index, padding]),
            "targets": torch.cat([self.labels[index], padding - 100]),
            "count": torch.tensor(len(index), device=self.device),
        }

    def theirs(self):
        """Transformers' arguments: right padding, labels; and which tokens are real."""
        inputs, labels = self.sides["right"]
        return {**inputs, "labels": labels}, inputs["attention_mask"].bool()


def run_theirs(bert, batch, dtype):
    """Losses of the predicted tokens, logits of the real ones, gradients of the mean loss."""
    theirs = to_transformers(bert, dtype)
    arguments, real = batch.theirs()
    out = theirs(**arguments)
    out.loss.backward()
    logits = out.logits.detach()[real]
    predicted = batch.labels != -100
    losses = F.cross_entropy(logits[predicted], batch.labels[predicted], reduction="none")
    return {"losses": losses, "logits": logits, **their_gradients(theirs, bert)}


def run_ours(bert, batch, dtype=None):
    sparse = batch.sparse()
    bert.zero_grad()
    with torch.autocast(batch.device, dtype=dtype, enabled=dtype is not None):
        losses = bert(**batch.packed, **sparse, reduction="none")[: sparse["count"]]
        logits = bert(**batch.packed)
        bert(**batch.packed, **sparse).backward()
    return {"losses": losses.detach(), "logits": logits.detach(), **gradients(bert)}
