"""docs/generation.md: its commands and its Python run as printed. And what `fastlm generate` says of mistakes."""

import dataclasses
import io
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from training import corpus

from fastlm import cli
from fastlm.data import Tokenizer
from fastlm.generate import Settings
from fastlm.models import GPT2, T5, Bert, BertConfig, GPT2Config, T5Config

PAGE = (Path(__file__).parent.parent / "docs" / "generation.md").read_text(encoding="utf-8")
NARROW = {
    "gpt2-mini": "data.tokenizer=train:300 model.n_embd=32 model.n_layer=1 model.n_head=2",
    "t5-mini": "data.tokenizer=train:400 model.d_model=32 model.d_kv=8 model.d_ff=64 model.num_layers=1",
}


@pytest.fixture
def fastlm(monkeypatch, capfd):
    """Runs a command in this process; returns status, standard output and standard error."""
    monkeypatch.setattr(cli._threads, "for_work", lambda *_: None)
    monkeypatch.setattr(cli._threads, "wait_policy", lambda *_: None)
    monkeypatch.setattr(cli._malloc, "tune", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["fastlm", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capfd.readouterr()

    yield run
    torch.set_num_threads(threads)


def test_the_page(tmp_path, monkeypatch, fastlm, capfd):
    corpus(tmp_path / "corpus.txt", lines=150)
    (tmp_path / "prompts.txt").write_text("anna found\n\nboris found the\nclara\n")
    (tmp_path / "more.jsonl").write_text('{"text": "david", "id": 7}\n{"prompt": "elena found", "text": "no"}\n')
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    outputs = []
    for command in block.strip().split("\n"):
        _, *words = shlex.split(command)
        if words[0] == "pretrain":
            words[words.index("--max-steps") + 1] = "2"
            words += NARROW[words[1]].split()
        status, out, err = fastlm(*words)
        assert status == 0, err
        if words[0] == "generate":
            assert re.search(r"^[\d,]+ tokens in [\d.]+ s: [\d,.]+ tokens/s$", err, re.M)
            outputs.append(out)
    greedy, sampled, stopped, beams, batch, spans = outputs
    assert greedy.startswith("anna found")
    assert sampled.startswith("anna found")
    assert greedy != sampled
    record = json.loads(stopped)
    assert (record["prompt"], record["finish"] in ("eos", "stop", "length")) == ("anna found", True)
    assert beams == ""
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["anna found", "boris found the", "clara"]
    assert all(answer["score"] < 0 for answer in answers)
    prompts = ["anna found", "boris found the", "clara", "david", "elena found"]
    assert all(prompt in batch for prompt in prompts)
    (command,) = (line for line in block.split("\n") if "--batch 2" in line)
    assert fastlm(*shlex.split(command.replace("--batch 2", "--batch 8"))[1:])[1] == batch, "as in batches of two"
    assert spans.count("\n") == 1
    (code,) = re.findall(
        r"((?:^    .*\n|^\n)+)", PAGE[PAGE.index("## From Python") :].split("\n", 1)[1].lstrip("\n"), re.M
    )[:1]
    capfd.readouterr()
    exec(textwrap.dedent(code), {"__name__": "page"})
    assert "length" in capfd.readouterr().out


def test_the_page_has_every_setting():
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*?) ?\|$", PAGE, re.M))
    assert list(rows) == [field.name for field in dataclasses.fields(Settings)]
    for field in dataclasses.fields(Settings):
        if rows[field.name].strip():
            assert json.loads(rows[field.name].strip(" `")) == field.default, field.name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a GPT-2, a T5 and a BERT, each with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    texts = ["the cat sat on the mat", "a dog saw the cat"] * 9
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    tokenizer = Tokenizer.train(lambda: texts, 280, purpose="causal")
    GPT2(
        GPT2Config(
            vocab_size=tokenizer.vocab_size + 6, **sizes, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id
        )
    ).save_pretrained(root / "gpt2", tokenizer)
    tokenizer = Tokenizer.train(lambda: texts, 400, purpose="span")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5(T5Config(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(root / "t5", tokenizer)
    tokenizer = Tokenizer.train(lambda: texts, 30)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    Bert(BertConfig(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(root / "bert", tokenizer)
    return root


def test_answers_stream_and_come_in_one_piece_alike(models, fastlm, tmp_path, monkeypatch):
    for kind in ("gpt2", "t5"):
        words = ["generate", "--model", models / kind, "--prompt", "the cat", "--set", "min_new_tokens=5"]
        status, shown, _ = fastlm(*words)
        assert status == 0
        _, line, _ = fastlm(*words, "--json")
        record = json.loads(line)
        assert shown == ("the cat" if kind == "gpt2" else "") + record["text"] + "\n"
        assert len(record["ids"]) >= 5
    for name, text in (("-", "the cat\n"), ("-.jsonl", '{"prompt": "the cat"}')):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        _, piped, _ = fastlm("generate", "--data", name, "--model", models / "t5", "--set", "min_new_tokens=5")
        assert piped == shown


def test_ids_beyond_the_tokenizer_are_never_written(models):
    model, tokenizer = GPT2.from_pretrained(models / "gpt2"), Tokenizer.load(models / "gpt2")
    with torch.no_grad():
        model.word[tokenizer.vocab_size :: 2], model.word[tokenizer.vocab_size + 1 :: 2] = (
            torch.tensor([[1.0], [-1.0]]) * torch.randn(16) * 100
        )
    plain, known = (model.generate([[5]], max_new_tokens=4, **t) for t in ({}, {"tokenizer": tokenizer}))
    assert max(plain[0].ids) >= tokenizer.vocab_size > max(known[0].ids)


def test_a_mistake_leaves_older_answers(models, fastlm, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    for content, more in (("the\n" + "the cat " * 20, []), ("the\n", ["--set", "stop=5"])):
        prompts.write_text(content)
        out.write_text("older answers")
        status, _, _ = fastlm("generate", "--model", models / "gpt2", "--data", prompts, "--out", out, *more)
        assert (status, out.read_text()) == (2, "older answers")
    prompts.write_bytes(b"\xef\xbb\xbfthe\r\ncat\n")
    assert fastlm("generate", "--model", models / "gpt2", "--data", prompts, "--out", out, "--batch", "1")[0] == 0
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["the", "cat"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["gpt2"], "--prompt: expected this, or --data with a file of prompts, got none"),
        (["gpt2", "--prompt", "a", "--data", "f"], "--prompt: expected this, .* got both"),
        (["none", "--prompt", "a"], "model: expected a directory, as OUT/hf after"),
        (["bert", "--prompt", "a"], 'model: expected model_type "gpt2" or "t5" in .*, got .bert.; `fastlm fill-mask`'),
        (["gpt2", "--prompt", ""], r"prompt: expected a text, got an empty one in --prompt; <\|endoftext\|> is the"),
        (["t5", "--prompt", ""], "prompt: expected a text, got an empty one in --prompt$"),
        (["gpt2", "--prompt", "the cat " * 20], "input_ids: expected at most 16 tokens, the model's n_positions, got"),
        (["gpt2", "--data", "blank.txt"], "data: expected at least one prompt, a line each, found none in blank.txt"),
        (["gpt2", "--data", "long.txt"], "input_ids: expected at most 16 tokens, .* in long.txt, line 3; leave out"),
        (["gpt2", "--data", "bad.jsonl"], "data: bad.jsonl, line 2 is not valid JSON"),
        (
            ["gpt2", "--data", "none.jsonl"],
            'data: expected an object with a string "prompt" or "text" in none.jsonl, l',
        ),
        (["gpt2", "--data", "latin.txt"], "data: expected UTF-8 in latin.txt"),
        (["gpt2", "--data", "missing.txt"], r"\[Errno 2\] No such file or directory: 'missing.txt'"),
        (["gpt2", "--prompt", "a", "--dtype", "int8"], "--dtype: expected float32, bfloat16 or float16, got 'int8'"),
        (["gpt2", "--prompt", "a", "--top-k", "3"], "temperature: expected a positive one with top_k=3"),
        (["gpt2", "--prompt", "a", "--set", "beams=3"], "beams: expected one of max_new_tokens, "),
        (["gpt2", "--prompt", "a", "--set", "rows=3", "--json"], "rows: expected one of max_new_tokens, "),
        (["gpt2", "--prompt", "a", "--set", "tokenizer=3"], "tokenizer: expected one of max_new_tokens, "),
        (["gpt2", "--prompt", "a", "--set", "stop=5"], "stop: expected a string, or several, got 5"),
        (["gpt2", "--prompt", "a", "--dtype", "bfloat16", "--weights", "int8"], "weights: expected None, since"),
        (["gpt2", "--prompt", "a", "--stop", "<|endoftext|>"], "stop: expected strings without special .*; eos_token_"),
        (["gpt2", "--prompt", "a", "--device", "tpu"], "device: expected cpu or cuda, got 'tpu'"),
    ],
)
def test_mistakes(words, error, models, fastlm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text("\n \n")
    Path("long.txt").write_text("the\n\n" + "the cat " * 20)
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt":\n')
    Path("none.jsonl").write_text('{"question": "a"}\n')
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    status, out, err = fastlm("generate", "--model", models / words[0], *words[1:])
    assert (status, out) == (2, "")
    assert re.search("^error: " + error, err, re.M), err
