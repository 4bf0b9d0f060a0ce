"""Tiny Transformers models, batches for them, and runs: what the tests of fastlm.patch (test_hf_*.py) share."""

import contextlib
import copy
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert
from transformers.models.t5 import modeling_t5

import fastlm

VOCABULARY, PAD = 67, 0
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": PAD,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": PAD,
}
MODERNBERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "local_attention": 6,
    "global_attn_every_n_layers": 2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": PAD,
    "eos_token_id": 2,
}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}


# name -> (model, configuration class, its arguments)
MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert-tanh": ("BertForMaskedLM", "BertConfig", {**BERT, "hidden_act": "gelu_new"}),
    "bert-relu": ("BertForMaskedLM", "BertConfig", {**BERT, "hidden_act": "relu"}),
    "bert-causal": ("BertLMHeadModel", "BertConfig", {**BERT, "is_decoder": True}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", DISTILBERT),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", MODERNBERT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
}
FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "gpt2", "t5-gated", "llama")


CAUSAL = ("bert-causal", "gpt2", "llama")


def make(name, seed=0, attention="eager", wide=True, **changes):
    """A tiny random model; wide: every parameter drawn so that none hides behind its initial 0 or 1."""
    model, config, arguments = MODELS[name]
    config = getattr(transformers, config)(**{**arguments, **changes}, attn_implementation=attention)
    torch.manual_seed(seed)
    model = getattr(transformers, model)(config)
    with torch.no_grad():
        for parameter in model.parameters() if wide else ():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def patched(model, **arguments):
    model = copy.deepcopy(model)
    fastlm.patch(model, **arguments)
    return model


class Batch:
    """Padded rows with labels, and how the logits of the real tokens and the loss come from a model's logits."""

    def __init__(self, name, seed=0, side="right", lengths=(9, 4, 12, 1), device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        self.causal, self.t5 = name in CAUSAL, name.startswith("t5")
        longest = max(lengths)
        self.real = torch.stack([torch.arange(longest) < n for n in lengths])
        ids = torch.randint(5, VOCABULARY, self.real.shape, generator=generator).masked_fill(~self.real, PAD)
        predicted = torch.rand(ids.shape, generator=generator) < 0.4
        predicted[0, 1] = True
        predicted[:, 0] = predicted[:, 0] & (not self.causal)  # a padding token before it would predict the first
        labels = ids.masked_fill(~(predicted & self.real), -100)
        positions = torch.arange(longest).expand_as(ids)
        if side == "left":
            order = torch.stack([torch.arange(longest).roll(-n) for n in lengths])
            ids, labels, positions, self.real = (x.gather(1, order) for x in (ids, labels, positions, self.real))
        self.inputs = {"input_ids": ids, "attention_mask": self.real.long()}
        if self.t5:
            labels = torch.randint(5, VOCABULARY, (len(lengths), 7), generator=generator)
            labels[-1, 4:] = -100
        elif name != "distilbert":
            self.inputs["position_ids"] = positions + (name == "roberta")
        self.inputs = {key: value.to(device) for key, value in self.inputs.items()}
        self.labels, self.real = labels.to(device), self.real.to(device)

    def real_logits(self, logits):
        return logits if self.t5 else logits[self.real]

    def loss(self, logits):
        logits, labels = (logits[:, :-1], self.labels[:, 1:]) if self.causal else (logits, self.labels)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gradients(model):
    """By name; a key's bias, whose gradient is exactly zero, in one tensor with the query's."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name in list(grads):
        for key, query in (("key.bias", "query.bias"), ("k_lin.bias", "q_lin.bias")):
            if name.endswith(key):
                grads[name] = torch.cat([grads[name], grads[name.removesuffix(key) + query]])
    return grads


@contextlib.contextmanager
def no_float32():
    """Transformers computes parts of a float64 model in float32; not in here."""

    def norm(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    with (
        mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", norm),
        mock.patch.object(modeling_t5.T5LayerNorm, "forward", norm),
        mock.patch.object(modeling_modernbert, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb),
    ):
        yield


def run_exact(model, batch):
    """In float64, on sdpa, since the eager softmax of some families is float32; the loss by the definition."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("sdpa")
    inputs = {**batch.inputs, "decoder_input_ids": model._shift_right(batch.labels)} if batch.t5 else batch.inputs
    with no_float32():
        logits = model(**inputs).logits
        loss = batch.loss(logits)
        loss.backward()
    return {"loss": loss.detach(), "logits": batch.real_logits(logits.detach()), **gradients(model)}


def run(model, batch):
    model.zero_grad()
    model.train()
    out = model(**batch.inputs, labels=batch.labels)
    out.loss.backward()
    with torch.no_grad():
        logits = model.eval()(**batch.inputs, labels=batch.labels).logits
    return {"loss": out.loss.detach(), "logits": batch.real_logits(logits), **gradients(model)}


def state(model):
    """All that unpatch must bring back, of every module."""
    return [
        (name, id(module), type(module), sorted(module.__dict__), getattr(module, "config", None) and id(module.config))
        for name, module in model.named_modules()
    ], [(name, id(p)) for name, p in model.named_parameters()]
