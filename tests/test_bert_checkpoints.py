"""Directories that fastlm.models.Bert and Transformers write and read, and what is wrong with some."""

import json
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from bert_models import TINY, Batch, make_bert
from models import same_state, same_weights
from safetensors.torch import load_file, save_file

from fastlm.models import GPT2, T5, Bert, BertConfig, GPT2Config, T5Config
from fastlm.models._size import parameter_count

pytestmark = pytest.mark.usefixtures("seeded")


def test_copies_a_tokenizer(tmp_path):
    """From anything with save or save_pretrained, or from a directory: a tokenizer's files, and no others."""
    source = tmp_path / "source"
    make_bert().save_pretrained(source, SavedTokenizer())
    (source / "vocab.txt").write_text("[PAD]\n")
    (source / "README.md").write_text("# a model")
    make_bert().save_pretrained(tmp_path / "copy", source)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
    ]
    with pytest.raises(ValueError, match="tokenizer: expected a directory with a tokenizer's files, found none"):
        make_bert().save_pretrained(tmp_path / "none", tmp_path)
    assert not (tmp_path / "none").exists()


class SavedTokenizer:
    def save(self, directory):
        (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_transformers_reads_ours(dtype, tmp_path):
    bert = make_bert(hidden_act="gelu_new").to(dtype).eval()
    bert.save_pretrained(tmp_path / "hf", SavedTokenizer())
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(theirs) is transformers.BertForMaskedLM
    assert not any(info.values()), info
    assert theirs.dtype == dtype
    assert theirs.cls.predictions.decoder.weight is theirs.bert.embeddings.word_embeddings.weight
    assert same_weights(bert, theirs)
    inputs, _ = Batch().sides["right"]
    real = inputs["attention_mask"].bool()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(bert(**inputs)[real], theirs(**inputs).logits[real], **tolerance)
    back = Bert.from_pretrained(tmp_path / "hf", dtype=dtype)
    assert back.config == bert.config
    assert same_state(bert, back)


@pytest.mark.parametrize("shard", [None, "20KB"], ids=["one", "shards"])
def test_reads_transformers(shard, tmp_path):
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**TINY, pad_token_id=None)).eval()
    theirs.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shard)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = Bert.from_pretrained(tmp_path)
    assert same_weights(ours, theirs)
    assert ours.config == BertConfig(**TINY, pad_token_id=None)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ours.save_pretrained(tmp_path / "again")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in theirs.state_dict().items())


def test_reads_a_headless_model(tmp_path):
    """BertModel: no prefix, no masked-LM head, a pooler."""
    theirs = transformers.BertModel(transformers.BertConfig(**TINY))
    theirs.save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match=r"head starts anew.*cls.predictions.transform.dense.*cls.predictions.bias"),
        pytest.warns(UserWarning, match=r"left out, Bert has no place for: bert.pooler.dense.bias, bert.pooler.dense"),
    ):
        ours = Bert.from_pretrained(tmp_path)
    assert torch.equal(ours.layers[1].out.weight, theirs.encoder.layer[1].attention.output.dense.weight)
    assert (ours.head.norm.weight == 1).all()
    assert ours.head.dense.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_reads_legacy_names(tmp_path):
    """LayerNorm.gamma and beta, the position_ids constant, and tied tensors under the decoder's names."""
    bert = make_bert()
    bert.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    legacy = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    legacy["bert.embeddings.position_ids"] = torch.arange(24)[None]
    legacy["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    legacy["cls.predictions.decoder.bias"] = legacy.pop("cls.predictions.bias")
    save_file(legacy, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = Bert.from_pretrained(tmp_path)
    assert same_state(bert, ours)


def test_save_is_atomic(tmp_path, monkeypatch):
    """A save that fails midway leaves the earlier checkpoint whole, and nothing beside it."""
    first = make_bert(1)
    first.save_pretrained(tmp_path)

    class Broken:
        def save(self, directory):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_bert(2).save_pretrained(tmp_path, Broken())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(Bert.from_pretrained(tmp_path).embeddings.word, first.embeddings.word)


def test_a_save_sweeps_what_a_killed_one_left(tmp_path):
    code = """
import os, signal, sys
from fastlm.models import T5, Bert, BertConfig, GPT2, GPT2Config, T5Config
from fastlm.models._size import parameter_count
class Killed:
    def save(self, directory):
        os.kill(os.getpid(), signal.SIGKILL)
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
Bert(BertConfig(vocab_size=10, **sizes)).save_pretrained(sys.argv[1], Killed())
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    assert (left / "model.safetensors").exists()
    make_bert().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def replace_weights(directory, name=None):
    (directory / "model.safetensors").unlink()
    if name:
        (directory / name).write_bytes(b"\x80\x04")


LAST = "bert.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "expected a config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), "JSON object, got list"),
        (lambda d: edit_config(d, model_type="gpt2"), "expected model_type \"bert\".*got 'gpt2'"),
        (lambda d: edit_config(d, hidden_act="relu"), "hidden_act: expected one of 'gelu'.*got 'relu'"),
        (lambda d: edit_config(d, is_decoder=True), "is_decoder: expected False.*got True"),
        (lambda d: edit_config(d, position_embedding_type="relative_key"), "position_embedding_type"),
        (lambda d: edit_config(d, tie_word_embeddings=False), "tie_word_embeddings: expected True"),
        (lambda d: edit_config(d, vocab_size=90), r"word_embeddings.weight: expected \(90, 32\), got \(83, 32\)"),
        (
            lambda d: edit_config(d, num_hidden_layers=1),
            "no tensor beyond config.json's architecture, got bert.encoder",
        ),
        (lambda d: edit_tensors(d, lambda t: t.pop(LAST)), f"every tensor but a head's, {LAST} missing"),
        (
            lambda d: edit_tensors(d, lambda t: t.update({"cls.predictions.decoder.weight": torch.zeros(83, 32)})),
            "expected cls.predictions.decoder.weight equal to",
        ),
        (lambda d: edit_config(d, hidden_size=64), r"; and \d+ more$"),
        (lambda d: replace_weights(d), "expected model.safetensors or model.safetensors.index.json"),
        (
            lambda d: replace_weights(d, "pytorch_model.bin"),
            "pytorch_model.bin, which is pickled.*load it with Transformers' AutoModel and save_pretrained it",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"broken"), "model.safetensors cannot be read"),
    ],
)
def test_checkpoint_errors(damage, message, tmp_path):
    make_bert().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Bert.from_pretrained(tmp_path)


def test_missing_shard_and_directory(tmp_path):
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**TINY))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"model-.*safetensors cannot be read"):
        Bert.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dtype: expected a floating-point one, got torch.int8"):
        Bert.from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"expected a directory with config.json.*google-bert/bert-base-uncased"):
        Bert.from_pretrained("google-bert/bert-base-uncased")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers: expected at most 10000, got 1000000"),
        ({"hidden_size": 10**9}, "hidden_size: expected at most 268435456, got 1000000000"),
        ({"hidden_size": 2**24}, "model: expected one that fits into the memory of cpu, got "),
        ({"vocab_size": 2**28, "hidden_size": 2**20}, "model: expected one that fits into the memory of cpu, got "),
    ],
)
def test_a_size_that_cannot_be_is_refused_at_once(entries, message, tmp_path):
    """Nothing is allocated: the parameters are counted first."""
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    Bert(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(ValueError, match=f"^{message}"):
        Bert.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Bert, BertConfig(num_hidden_layers=3)),
        (GPT2, GPT2Config(n_layer=4)),
        (T5, T5Config(num_layers=2, num_decoder_layers=5)),
        (T5, T5Config(num_layers=3)),
    ],
)
def test_parameters_are_counted_without_the_model(model, config):
    want = sum(p.numel() for p in model(config, device="meta").parameters())
    assert parameter_count(model, config) == want
