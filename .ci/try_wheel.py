"""Uses an installed fastlm: python .ci/try_wheel.py, with the Python that has it, from an empty directory.

An op forward and backward beside torch. Then text to rows, three steps of pretraining and a filled mask, by the
installed command.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

import fastlm
from fastlm import ops

TINY = {
    "model.hidden_size": 32,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 64,
    "model.max_position_embeddings": 64,
    "data.row_tokens": 32,
    "train.batch_tokens": 256,
    "train.warmup_steps": 1,
}


def command(*arguments):
    program = Path(sys.executable).with_name("fastlm")
    return subprocess.run([program, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def check_op():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    ours, theirs = ops.layer_norm(x, weight, backend="cpu"), torch.nn.functional.layer_norm(x, (5,), weight)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(y.square().sum(), (x, weight)) for y in (ours, theirs))
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other)


def check_import():
    assert fastlm.__file__.startswith(sys.prefix), fastlm.__file__
    spec = importlib.util.find_spec("kernels")  # free, or another package's
    assert spec is None or not spec.origin.startswith(sys.prefix), spec
    if importlib.util.find_spec("triton"):
        importlib.import_module("fastlm.kernels.philox")


def check_command():
    info = command("info")
    print(info)
    assert str(Path(fastlm.__file__).parent) in info
    assert "layer_norm" in info
    words = ("anna found the red stone by the river", "the old house stood near a small lake", "he read the letter")
    Path("text.txt").write_text("\n".join(" ".join((*words[i % 3 :], str(i))) for i in range(400)))
    rows = ("--tokenizer", "train:200", "--row-tokens", "32", "--documents", "line")
    command("prepare", "--data", "text.txt", "--out", "rows", *rows)
    options = ("--set", *(f"{name}={value}" for name, value in TINY.items()))
    command("pretrain", "bert-mini", "--data", "rows", "--out", "run", "--max-steps", "3", "--device", "cpu", *options)
    summary = json.loads(Path("run", "summary.json").read_text())
    assert summary["steps"] == 3, summary
    filled = command("fill-mask", "--model", "run/hf", "--top", "3", "anna found [MASK].")
    assert len(filled.splitlines()) == 3, filled


if __name__ == "__main__":
    check_import()
    check_op()
    check_command()
    print(f"fastlm {fastlm.__version__} works: Python {sys.version.split()[0]}, torch {torch.__version__}")
