"""docs/training.md: its commands run as printed, and leave what it says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import corpus

from fastlm import cli
from fastlm.run.metrics import read_metrics
from fastlm.run.recipe import FREE_KEYS, RECIPES
from fastlm.tasks import TrainTable

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
# Sizes of a test for what the page leaves to the recipes.
NARROW = {
    "bert": "model.hidden_size=32 model.num_hidden_layers=1 model.num_attention_heads=2 model.intermediate_size=64",
    "gpt2": "model.n_embd=32 model.n_layer=1 model.n_head=2",
    "t5": "model.d_model=32 model.d_kv=8 model.d_ff=64 model.num_layers=1 model.num_heads=2",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    corpus(tmp_path / "corpus.txt")
    corpus(tmp_path / "more.txt", lines=150)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def leaves_what_the_page_says(folder, runs):
    for run in runs:
        out = folder / "runs" / run
        assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 9)), run
        for name in ("recipe.json", "checkpoints/step-00000008", "summary.json", "loss.png", "hf/config.json"):
            assert (out / name).exists(), (run, name)
    held = [row.get("val_loss") for row in read_metrics(folder / "runs" / "held" / "metrics.jsonl")]
    assert [loss is not None for loss in held] == [step in (4, 8) for step in range(1, 9)]
    more = json.loads((folder / "runs" / "more" / "recipe.json").read_text())
    assert (folder / more["data"]["tokenizer"]).samefile(folder / "runs" / "gpt2" / "hf")


def narrow(words):
    """A pretrain command with a small model; one that continues another's model has that one's."""
    if words[:2] != ["fastlm", "pretrain"] or "--init" in words or words[2].endswith(".toml"):
        return words
    return [*words, *NARROW[words[2].split("-")[0]].split()]  # after --set, the last option of each


def test_commands_of_one_process(folder, monkeypatch, capfd, request):
    """In this process, and with narrow models: seconds in place of minutes."""
    monkeypatch.setattr(cli._threads, "for_work", lambda *_: None)
    monkeypatch.setattr(cli._threads, "wait_policy", lambda *_: None)
    monkeypatch.setattr(cli._malloc, "tune", lambda *_: None)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # as many as the models are worth
    finished = {}
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "torchrun":
            continue
        line, _, target = (" ".join(words)).partition(" > ")
        words = narrow(line.split())
        assert words[0] == "fastlm"
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capfd.readouterr()
        assert exit.value.code in (0, None), (command, err)
        if target:
            (folder / target).write_text(
                out.replace("n_embd = 256", "n_embd = 32").replace("n_layer = 4", "n_layer = 1")
            )
        run = folder / "runs" / "gpt2" / "metrics.jsonl"
        if run.exists():
            assert finished.setdefault("gpt2", run.read_bytes()) == run.read_bytes(), "it was finished"
    leaves_what_the_page_says(folder, ["bert", "gpt2", "t5", "from-rows", "mine", "held", "muon", "more", "mix"])


@pytest.mark.long
def test_all_commands_as_printed(folder):
    binaries = folder / "bin"
    binaries.mkdir()
    for name, module in (("fastlm", "fastlm"), ("torchrun", "torch.distributed.run")):
        (binaries / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n')
        (binaries / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(BLOCKS)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    leaves_what_the_page_says(
        folder, ["bert", "gpt2", "t5", "from-rows", "mine", "held", "muon", "more", "mix", "two", "shards"]
    )
    newest = folder / "runs" / "shards" / "checkpoints" / "step-00000008"
    assert (newest / "model-00001-of-00002.safetensors").is_file()


def test_the_page_names_what_there_is():
    named = set(re.findall(r"`((?:train|data)\.\w+)", PAGE))
    assert "train.eval_every" in named
    table = {f"train.{name}" for name in TrainTable.__dataclass_fields__}
    assert {name for name in named if name.startswith("train.")} <= table
    assert all(f"`{key}`" in PAGE for key in FREE_KEYS)
    shipped = {path.stem for path in Path(RECIPES).glob("*.toml")}
    assert shipped <= set(re.findall(r"`([\w-]+)`", PAGE))
