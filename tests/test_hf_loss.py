"""fastlm.patch(model, fused_loss=True): head and loss in one."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hf_models import FAMILIES, VOCABULARY, Batch, make, patched

pytestmark = pytest.mark.usefixtures("seeded")


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


@pytest.mark.parametrize("label", [VOCABULARY, -7])
@pytest.mark.parametrize("name", [*FAMILIES, "bert-causal"])
def test_a_bad_label_is_named_by_its_place_in_the_labels(name, label):
    """Not by its place among the predicted tokens, nor after the shift of a causal model."""
    model, batch = patched(make(name), fused_loss=True), Batch(name)
    labels = torch.full_like(batch.labels, -100)
    labels.view(-1)[27] = label  # T5's last of a row, which is no input of its decoder
    with pytest.raises(
        ValueError, match=rf"^labels: .*in \[0, {VOCABULARY}\).* got {label} at position 27 of the flat"
    ):
        model(**batch.inputs, labels=labels)
    if name in ("gpt2", "llama"):
        with pytest.raises(ValueError, match=rf"^shift_labels: .* got {label} at position 27 of the flattened shift_"):
            model(**batch.inputs, labels=labels, shift_labels=labels)
        first = labels.clone().fill_(-100)
        first[0, 1], first[:, 0] = 5, label  # a causal model reads no first label
        assert model(**batch.inputs, labels=first).loss.isfinite()


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


@pytest.mark.parametrize("wrong", ["columns", "rows", "logits_to_keep"])
def test_fused_loss_wants_a_label_for_each_position(wrong):
    """As untouched models do; labels of another size would slide from row to row."""
    model = patched(make("gpt2"), fused_loss=True).train()
    ids = torch.randint(5, VOCABULARY, (2, 8))
    labels = {"columns": ids[:, :6], "rows": ids[:1], "logits_to_keep": ids}[wrong]
    options = {"logits_to_keep": 4} if wrong == "logits_to_keep" else {}
    with pytest.raises(ValueError, match="labels: expected one for each of the"):
        model(input_ids=ids, labels=labels, **options)
