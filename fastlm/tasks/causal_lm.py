"""Causal language modelling (Radford et al. 2019): every token is predicted from those before it in its document.

Documents are packed back to back, and attention never crosses a boundary. The last token of a row predicts the one that
follows in its document. Each token of the text, and the end of each document, is predicted once an epoch.
"""

from __future__ import annotations

from fastlm.data.layouts import CausalRows
from fastlm.models import GPT2, Counts
from fastlm.tasks._task import Micro, Task, bits_per_byte, real_pairs


class CausalLM(Task):
    models = (GPT2,)

    @classmethod
    def layout(cls, data):
        return CausalRows(data.row_tokens)

    @classmethod
    def token_ids(cls, tokenizer):
        begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        return {"bos_token_id": begin, "eos_token_id": tokenizer.eos_id}

    def make_micro(self, batch, seed, rng, evaluation=False):
        return Micro(
            inputs={
                "input_ids": batch.input_ids,
                "cu_seqlens": batch.cu_seqlens,
                "max_seqlen": batch.max_seqlen,
                "positions": batch.positions,
                "rng": rng,
                "shift_labels": batch.targets,
                "reduction": "sum",
            },
            counts=Counts(batch.tokens, real_pairs(batch), batch.tokens),
        )

    def metrics(self):
        return {"unigram_entropy": self.dataset.unigram_entropy}

    def evaluated(self, loss):
        """Also bits a byte of the text (UTF-8), which do not depend on the tokenizer."""
        text = self.validation
        predicted = text.text_tokens + text.documents  # the end of a document is predicted too
        return {**super().evaluated(loss), "val_bits_per_byte": bits_per_byte(loss * predicted, text.text_bytes)}
