"""A patched model under torch.compile(dynamic=True): one graph for all lengths, in evaluation and in training."""

import pytest
import torch
import transformers
from hf_models import VOCABULARY, gradients, make, patched

pytestmark = pytest.mark.usefixtures("seeded")

LENGTHS = (9, *(n for n in range(5, 25) if n != 9))
ONE_LAYER = {
    "bert": {"num_hidden_layers": 1},
    "roberta": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1},
    "t5-gated": {"num_layers": 1},
}


def padded(name, n):
    ids = torch.randint(5, VOCABULARY, (2, n))
    real = torch.ones_like(ids)
    real[1, n - 2 :] = 0
    labels = torch.randint(5, VOCABULARY, (2, n - 1)) if name.startswith("t5") else ids.masked_fill(real == 0, -100)
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def packed(name, n):
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return dict(collate([{"input_ids": torch.randint(5, VOCABULARY, (m,)).tolist()} for m in (n // 2, n - n // 2)]))


def losses(model, compiled, inputs):
    loss = compiled(**inputs).loss
    if not model.training:
        return {"loss": loss}
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def case(name, batch, training, short=False):
    mode = "train" if training else "eval"
    marks = () if short else (pytest.mark.long,)
    return pytest.param(name, batch, training, marks=marks, id=f"{name}-{batch.__name__}-{mode}")


@pytest.mark.parametrize(
    ("name", "batch", "training"),
    [
        case("bert", padded, False, short=True),
        case("bert", padded, True),
        case("gpt2", padded, True),
        case("gpt2", packed, False, short=True),
        case("gpt2", packed, True),
        case("t5-gated", padded, False),
        case("t5-gated", padded, True),
        case("roberta", packed, True),
    ],
)
def test_one_graph_for_all_lengths(name, batch, training):
    """A second graph is an error; loss and gradients are those of the model that is not compiled."""
    torch._dynamo.reset()
    model = patched(make(name, **ONE_LAYER[name]), fused_loss=training).train(training)
    if name == "gpt2":
        model.loss_type = "ForCausalLM"  # without it Transformers logs, which no graph can hold
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    with torch.set_grad_enabled(training), torch._dynamo.config.patch(error_on_recompile=True):
        for n in LENGTHS:
            inputs = batch(name, n)
            got, want = losses(model, compiled, inputs), losses(model, model, inputs)
            for key in want:
                torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-6, msg=f"{key}, length {n}")
