"""fastlm.patch: the numbers of the untouched Transformers model, in training and in evaluation."""

import copy

import pytest
import torch
import transformers
from hf_models import FAMILIES, MODELS, VOCABULARY, Batch, gradients, make, patched, run, run_exact

import fastlm
from fastlm.testing.compare import ModelComparison

pytestmark = pytest.mark.usefixtures("seeded")


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
