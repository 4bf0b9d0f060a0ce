"""fastlm.patch: gated blocks act(x) * gate, with every activation that a family may have there."""

from unittest import mock

import pytest
import torch
from hf_models import Batch, make, patched, run, run_exact

import fastlm
from fastlm import ops
from fastlm.hf._swap import Patched
from fastlm.testing.compare import ModelComparison

pytestmark = pytest.mark.usefixtures("seeded")

# A model, its changes, the class of its gated block, the op that runs it, and how many blocks there are.
GATED = {
    "llama": ("llama", {}, "LlamaMLP", "silu", 2),
    "llama-bias": ("llama", {"mlp_bias": True}, "LlamaMLP", "silu", 2),
    "llama-swish": ("llama", {"hidden_act": "swish"}, "LlamaMLP", "silu", 2),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}, "LlamaMLP", "gelu", 2),
    "modernbert-silu": ("modernbert", {"hidden_activation": "silu"}, "ModernBertMLP", "silu", 3),
    "t5-gated": ("t5-gated", {}, "T5DenseGatedActDense", "gelu", 4),
    "t5-silu": ("t5-gated", {"feed_forward_proj": "gated-silu"}, "T5DenseGatedActDense", "silu", 4),
}


@pytest.mark.parametrize("name", GATED)
def test_one_op_runs_the_block(name):
    """act(x) * gate is one call of the op, and loss, logits and gradients are in the bound."""
    family, changes, block, op, count = GATED[name]
    model, batch, comparison = make(family, **changes), Batch(family), ModelComparison()
    report = fastlm.patch(ours := make(family, **changes))
    assert report.replaced[block, "activation and gate in one pass"] == count
    with mock.patch.object(ops, op, side_effect=getattr(ops, op)) as called, torch.no_grad():
        ours(**batch.inputs, labels=batch.labels)
    assert sum(call.kwargs.get("gate") is not None for call in called.call_args_list) == count
    exact, eager, got = run_exact(model, batch), run(model, batch), run(ours, batch)
    assert got.keys() == exact.keys()
    for key in exact:
        comparison.add(key, got[key], eager[key], exact[key])
    assert not comparison.failures(), "; ".join(comparison.failures())


@pytest.mark.parametrize(
    ("name", "changes", "block"),
    [
        ("llama", {"hidden_act": "relu"}, "LlamaMLP"),
        ("t5-gated", {"feed_forward_proj": "gated-relu"}, "T5DenseGatedActDense"),
    ],
)
def test_another_activation_stays(name, changes, block):
    model = make(name, **changes)
    report = fastlm.patch(model)
    assert report.left[block, "its activation is a ReLU; fastlm has GELU and SiLU"]
    assert not any(isinstance(m, Patched) for m in model.modules() if type(m).__name__ == block)


def test_silu_without_a_gate():
    """BERT's intermediate adds a bias before a GELU alone; a SiLU in its place runs by itself."""
    report = fastlm.patch(model := make("bert", hidden_act="silu"))
    assert report.left["BertIntermediate", "its activation is a SiLUActivation; fastlm has GELU"] == 2
    assert report.replaced["SiLUActivation", "SiLU"] == 3  # the head's too
    want, got = run(make("bert", hidden_act="silu"), Batch("bert")), run(model, Batch("bert"))
    torch.testing.assert_close(got["loss"], want["loss"])


def test_hooks_and_foreign_activations():
    """A hook on the activation is called; an activation put there after patching runs by itself."""
    model, batch, seen = make("llama"), Batch("llama"), []
    want = run(model, batch)
    ours = patched(model)
    for layer in ours.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *_: seen.append("act"))
    got = run(ours, batch)
    assert seen == ["act"] * 4  # two layers, in training and in evaluation
    for layer in ours.model.layers:
        layer.mlp.act_fn = torch.nn.SiLU()
    for results in (got, run(ours, batch)):
        for key in want:
            torch.testing.assert_close(results[key], want[key], rtol=1e-3, atol=1e-5, msg=key)
