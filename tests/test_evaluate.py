"""`fastlm evaluate`: figures as Transformers' models give them, a sequence at a time."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from labelled import reviews, write_csv
from models import to_transformers, widen
from pages import command_of, run_command
from training import corpus

from fastlm.data import Tokenizer
from fastlm.data.layouts import Corruption
from fastlm.data.spans import corrupt
from fastlm.evaluate import evaluate
from fastlm.evaluate._sums import parts
from fastlm.evaluate.causal import windows
from fastlm.evaluate.spans import Part, as_batch
from fastlm.models import GPT2, T5, Bert, BertConfig, GPT2Config, T5Config
from fastlm.run.recipe import Recipe
from fastlm.tasks import EVALUATION_SEED
from fastlm.train import pretrain
from fastlm.train.finetune import finetune

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXTS = ["anna found the river.", "boris", "a small house near the old clock, and two green stones in the garden."]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS]
    path.write_text("\n".join([*lines, '{"text": "  "}', "{broken"]) + "\n")
    return path


@torch.no_grad()
def make(family, directory):
    """A wide random model with its tokenizer in `directory`, by Transformers itself."""
    words = [corpus(directory / "words.txt", 60).read_text()]
    torch.manual_seed(1)
    purpose = {"gpt2": "causal", "bert": "masked", "t5": "span"}[family]
    tokenizer = Tokenizer.train(lambda: words, 450, purpose=purpose)
    vocab = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    if family == "gpt2":
        ids = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
        del vocab["pad_token_id"]
        model = GPT2(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **vocab, **ids))
    elif family == "bert":
        model = Bert(BertConfig(max_position_embeddings=16, **BERT, **vocab))
    else:
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
        ids = {"eos_token_id": tokenizer.eos_id, "decoder_start_token_id": tokenizer.pad_id}
        model = T5(T5Config(**sizes, **vocab, **ids))
    theirs = to_transformers(widen(model).eval())
    theirs.save_pretrained(directory)
    tokenizer.save(directory)
    return theirs, tokenizer


def test_windows_predict_each_token_once_with_the_context_stated():
    for length, window, stride in [(2, 4, 2), (40, 16, 8), (41, 16, 5), (17, 16, 16), (16, 16, 1), (1, 4, 2)]:
        ids, seen = np.arange(length), []
        for inputs, targets in windows(ids, window, stride):
            assert len(inputs) <= window
            for target in targets:
                context = target - inputs[0]
                assert context == target or context >= window - stride + 1
                assert inputs[len(inputs) - (targets[-1] - target) - 1] == target - 1
                seen.append(target)
        assert seen == list(range(1, length))


@torch.no_grad()
@pytest.mark.parametrize("ends", [True, False])
def test_perplexity_is_transformers(tmp_path, text, ends):
    theirs, tokenizer = make("gpt2", tmp_path)
    stride, width = 6, 16
    nats, predicted = 0.0, 0
    for text_, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS)):
        assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text_).input_ids == ids
        whole = [tokenizer.eos_id, *ids, *([tokenizer.eos_id] if ends else [])]
        for place in range(1, len(whole)):  # a token at a time, from the first window that predicts it
            first = 0 if place <= width else stride * -(-(place - width) // stride)
            logits = theirs(torch.tensor([whole[first:place]])).logits[0, -1].double()
            nats -= float(logits.log_softmax(-1)[whole[place]])
            predicted += 1
    found = evaluate(tmp_path, text, stride=stride, ends=ends, batch_tokens=40)
    assert (found["predicted"], found["window"], found["stride"]) == (predicted, width, stride)
    assert found["loss"] == pytest.approx(nats / predicted, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / predicted), rel=1e-4)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["documents"] == len(TEXTS)
    assert {reason: entry["count"] for reason, entry in found["set_aside"].items()} == {
        "malformed JSON": 1,
        "empty document": 1,
    }


@torch.no_grad()
def test_pseudo_perplexity_is_transformers(tmp_path, text):
    theirs, tokenizer = make("bert", tmp_path)
    losses = []
    for ids in tokenizer.encode_batch(TEXTS):
        for part in parts(np.array(ids), 14):
            whole = torch.tensor([tokenizer.cls_id, *part, tokenizer.sep_id])
            for place in range(1, len(whole) - 1):
                masked = whole.clone()
                masked[place] = tokenizer.mask_id
                log_p = theirs(masked[None]).logits[0, place].double().log_softmax(-1)
                losses.append(-float(log_p[whole[place]]))
    found = evaluate(tmp_path, text, batch_tokens=50)
    assert (found["predicted"], found["share"]) == (len(losses), 1.0)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    some = evaluate(tmp_path, text, share=0.4)
    assert 0 < some["predicted"] < len(losses)
    assert some["predicted"] == evaluate(tmp_path, text, share=0.4, batch_tokens=30)["predicted"]
    assert min(losses) <= some["loss"] <= max(losses)


@torch.no_grad()
def test_span_loss_is_transformers(tmp_path, text):
    theirs, tokenizer = make("t5", tmp_path)
    nats, predicted = 0.0, 0
    for ordinal, ids in enumerate(tokenizer.encode_batch(TEXTS)):
        pair = corrupt(
            as_batch([Part(np.array(ids), ordinal << 24)]), Corruption(), tokenizer, EVALUATION_SEED
        )  # tests of spans.py hold it to the paper
        loss = theirs(input_ids=pair.input_ids[None], labels=pair.labels[None]).loss
        nats, predicted = nats + float(loss.double()) * len(pair.labels), predicted + len(pair.labels)
    found = evaluate(tmp_path, text)
    assert (found["predicted"], found["window"]) == (predicted, 512)
    assert found["loss"] == pytest.approx(nats / predicted, rel=1e-5)
    assert evaluate(tmp_path, text, window=12)["predicted"] > predicted  # each part has sentinels and </s> of its own
    assert "perplexity" not in found
    assert evaluate(tmp_path, text, dtype=torch.bfloat16)["loss"] == pytest.approx(found["loss"], rel=2e-3)


def test_a_run_has_the_loss_of_its_own_evaluation(tmp_path, capsys):
    """Where no document is cut. The window is what the run was trained on, not the model's length."""
    held = tmp_path / "held.txt"
    held.write_text("".join(f"{name} found a paper boat on day {i}.\n" for i, name in enumerate(("anna", "hugo"))))
    data = {"tokenizer": "chars", "row_tokens": 64, "documents": "line", "packing": "best_fit", "validation": str(held)}
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 80}
    recipe = {
        "task": "causal_lm",
        "model": sizes,
        "data": data,
        "train": {"batch_tokens": 256, "max_steps": 4, "warmup_steps": 2, "lr": 1e-2},
    }
    summary = pretrain(Recipe.from_dict(recipe), corpus(tmp_path / "text.txt", 60), tmp_path / "run").summary
    found = evaluate(tmp_path / "run", held, documents="line")
    assert found["window"] == 64
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-5)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*4")
    command = f"fastlm evaluate --model {checkpoint} --data {held} --documents line --stride 64"
    assert run_command(command, tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert run_command(command, tmp_path) == 0
    printed = capsys.readouterr().out
    assert f"loss {found['loss']:.4f} nats a token, perplexity" in printed
    assert "windows of 64 tokens, stride 64" in printed


def test_commands_of_the_page(tmp_path, capsys):
    for family, directory in (("gpt2", "gpt2"), ("bert", "mini/hf"), ("t5", "t5")):
        (tmp_path / "runs" / directory).mkdir(parents=True)
        make(family, tmp_path / "runs" / directory)
    (tmp_path / "held.txt").write_text("".join(text + "\n" for text in TEXTS))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    beginnings = {
        "fastlm evaluate --model runs/gpt2 --data held.txt\n": "windows of 16 tokens, stride 8",
        "fastlm evaluate --model runs/gpt2 --data held.txt --s": "stride 4: ",
        "fastlm evaluate --model runs/mini": "a share of 0.5 of them",
        "fastlm evaluate --model runs/t5": '"objective": "span"',
    }
    for beginning, printed in beginnings.items():
        assert run_command(command_of("evaluation.md", beginning), tmp_path) == 0
        assert printed in capsys.readouterr().out


def test_errors_name_the_remedy(tmp_path, text):
    make("bert", tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "nothing.txt").write_text("\u200b")  # the tokenizer's normalizer drops it
    for message, options in {
        "model: expected the directory of a model": {"model": tmp_path / "none"},
        r"data: expected at least one document in .*empty.txt, found none": {"data": tmp_path / "empty.txt"},
        "stride: expected none for a bert model, got 3": {"stride": 3},
        "ends: expected none for a bert model": {"ends": False},
        "share: expected a share of the tokens": {"share": 1.5},
        "window: expected an integer from 3 to 16, got 17": {"window": 17},
        "share: expected one that chooses a token, got 1e-06, which chooses none of": {"share": 1e-6},
        "data: expected a token to predict, found none in 0 tokens of 1 documents": {"data": tmp_path / "nothing.txt"},
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluate(options.pop("model", tmp_path), options.pop("data", text), **options)


def test_a_checkpoint_of_a_fine_tuning_is_an_error(tmp_path, text):
    make("bert", tmp_path)
    data = write_csv(tmp_path / "a.csv", reviews(20))
    recipe = Recipe("classify").with_values({"train.max_steps": 1, "train.epochs": 1})
    finetune(recipe, tmp_path, data, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    message = "model: expected BertForMaskedLM with its trained head in .*found BertForSequenceClassification, fine"
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, text)


def test_a_missing_head_is_an_error(tmp_path, text):
    theirs, _ = make("bert", tmp_path)
    theirs.bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model: expected BertForMaskedLM with its trained head"):
        evaluate(tmp_path, text)
