"""A patched model under torch.compile(dynamic=True): one graph for all lengths, in evaluation and in training."""

import pytest
import torch
import transformers
from hf_models import VOCABULARY, gradients, make, patched
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.usefixtures("seeded")

LENGTHS = (9, *(n for n in range(5, 25) if n != 9))
ONE_LAYER = {
    "bert": {"num_hidden_layers": 1},
    "roberta": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1, "loss_type": "ForCausalLM"},
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


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.long)], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "batch"),
    [("bert", padded), ("gpt2", padded), ("gpt2", packed), ("t5-gated", padded), ("roberta", packed)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_one_graph_for_all_lengths(name, batch, training):
    torch._dynamo.reset()
    model = patched(make(name, **ONE_LAYER[name]), fused_loss=training).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    with torch.set_grad_enabled(training), torch._dynamo.config.patch(error_on_recompile=True):
        for n in LENGTHS:
            inputs = batch(name, n)
            got, want = losses(model, compiled, inputs), losses(model, model, inputs)
            for key in want:
                torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-6, msg=f"{key}, length {n}")
    assert counter.frame_count == 1
