"""fastlm.patch: what is replaced, what the report says, and that unpatch takes all of it back."""

import inspect

import pytest
import torch
import transformers
from hf_models import BERT, FAMILIES, Batch, make, run, state
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5

import fastlm
from fastlm.hf import _families
from fastlm.hf._swap import Patched

pytestmark = pytest.mark.usefixtures("seeded")


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


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shared_configuration(name):
    """Models of one configuration: patch and unpatch of one do not reach another, or a later one."""
    first = make(name, attention="sdpa")
    config, cls = first.config, type(first)
    second = cls(config)
    before = config.to_dict()
    fastlm.patch(first)
    third = cls(config)
    assert first.config._attn_implementation == "fastlm"
    for other in (second, third):
        assert other.config is config
        assert {m.config._attn_implementation for m in other.modules() if hasattr(m, "config")} == {"sdpa"}
    fastlm.patch(second)
    fastlm.unpatch(first)
    assert first.config is config
    assert {m.config._attn_implementation for m in second.modules() if hasattr(m, "config")} == {"fastlm"}
    run(second, Batch(name))
    fastlm.unpatch(second)
    assert second.config is config
    assert (config.to_dict(), config._attn_implementation) == (before, "sdpa")


def test_a_configuration_changed_while_patched():
    """The change stays, for every module of that model alone."""
    model = make("bert", attention="sdpa")
    config = model.config
    fastlm.patch(model)
    model.resize_token_embeddings(80)
    fastlm.unpatch(model)
    assert (model.config.vocab_size, config.vocab_size) == (80, BERT["vocab_size"])
    assert model.config._attn_implementation == "sdpa"
    assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == {id(model.config)}


def test_configurations_of_an_encoder_decoder():
    """The parts are of known families, the model around them is not: its configuration holds theirs."""
    parts = make("bert").bert, make("bert-causal", add_cross_attention=True)
    model = transformers.EncoderDecoderModel(encoder=parts[0], decoder=parts[1])
    outer, before = model.config, state(model)
    fastlm.patch(model)
    assert model.config.encoder is model.encoder.config
    assert model.config.decoder is model.decoder.config
    assert model.config.decoder._attn_implementation == "fastlm"
    assert {outer.encoder._attn_implementation, outer.decoder._attn_implementation} == {"eager"}
    fastlm.unpatch(model)
    assert state(model) == before


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
