"""What Transformers, torch, PEFT and accelerate do with a patched model: save, copy, shard, adapt, compile, train."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from hf_models import FAMILIES, VOCABULARY, Batch, gradients, make, patched, run, state
from torch.distributed.fsdp import fully_shard

import fastlm

pytestmark = pytest.mark.usefixtures("seeded")


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
            output_dir=tmp_path / str(fused),
            max_steps=4,
            per_device_train_batch_size=2,
            logging_steps=1,
            seed=0,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            eval_strategy="steps",
            eval_steps=4,
            save_steps=4,
            disable_tqdm=True,
        )
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


@pytest.mark.filterwarnings("ignore")  # of the exporters
@pytest.mark.parametrize(("name", "dynamo"), [*((name, False) for name in FAMILIES), ("bert", True)])
def test_an_export_to_onnx_is_refused(name, dynamo):
    if dynamo:
        pytest.importorskip("onnxscript")
    model, batch = patched(make(name)).eval(), Batch(name, lengths=(6, 6))
    ids = batch.inputs["input_ids"]
    more = {"decoder_input_ids": ids} if name.startswith("t5") else {}
    with pytest.raises(Exception, match=r"fastlm\.unpatch\(model\) first") as caught:
        torch.onnx.export(model, (ids,), io.BytesIO(), kwargs=more, dynamo=dynamo)
    assert dynamo or caught.type is ValueError
