"""Runs of training for test_parallel.py, in each of the processes that torchrun starts.

python -m torch.distributed.run --nproc-per-node 2 tests/parallel_worker.py DIR
... DIR kill     one process kills itself in the middle of a step
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastlm.models import GPT2, T5, GPT2Config, T5Config
from fastlm.models._cache import whole_weights
from fastlm.run.recipe import Recipe
from fastlm.train import loop, pretrain
from fastlm.train.micro import copies_of
from fastlm.train.parallel import _shard

RECIPE = {
    "task": "masked_lm",  # micro-batches with very unequal numbers of predicted tokens: rows of one or several lines
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "attention_probs_dropout_prob": 0.1,
    },
    "data": {"tokenizer": "train:200", "row_tokens": 32, "documents": "line", "validation_share": 0.1},
    "train": {
        "dtype": "float32",
        "batch_tokens": 128,
        "micro_batch_tokens": 32,
        "max_steps": 8,
        "warmup_steps": 2,
        "lr": 5e-3,
        "eval_every": 4,
        "checkpoint_every": 4,
    },
}


def recipe(**train) -> Recipe:
    return Recipe.from_dict({**RECIPE, "train": {**RECIPE["train"], **train}})


MUON = {"shard": True, "optimizer": "muon"}
LOW = {"dtype": "bfloat16", "batch_tokens": 64}  # a single micro-batch in each process
# name -> (the step during which the processes are told to stop, settings of [train])
RUNS = {
    "ddp": (None, {}),
    "ddp-first": (5, {}),
    "fsdp-first": (5, MUON),
    "from-one": (None, MUON),
    "low": (None, LOW),
    "low-first": (5, LOW),
}


def write_sharded() -> None:
    """A sharded model writes what it writes whole, and its loss and gradients are the same before and after."""
    for model in (
        GPT2(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2)),
        T5(T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)),
    ):
        torch.manual_seed(0)
        for p in model.eval().parameters():
            torch.nn.init.normal_(p, std=0.3)
        ids, options = torch.tensor([[4, 5, 6], [7, 8, 1]]), {"max_new_tokens": 9, "eos_token_id": (), "num_beams": 2}
        wanted, results = model.generate(ids, **options), []
        _shard(model)
        for _ in range(2):
            loss = model(ids, labels=ids)
            loss.backward()
            results.append(torch.stack([loss.detach(), *(p.grad.full_tensor().norm() for p in model.parameters())]))
            model.zero_grad()
            with torch.no_grad():
                model(ids, labels=ids)
                with whole_weights(model):
                    assert model.generate(ids, **options) == wanted
            assert all(hasattr(p, "full_tensor") for p in model.parameters())
        assert torch.equal(*results)
        with pytest.raises(ValueError, match="model: expected whole weights, "):
            model.generate(ids)


def check_low(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After a step in bfloat16: both processes have the same weights, and the optimizer wrote the copies of all."""
    copies = copies_of(model, torch.bfloat16)
    assert copies is optimizer.low_weights
    assert copies._copies
    assert copies._stale() == {}
    assert all(torch.equal(copy, w.bfloat16()) for w, copy in copies._copies.items())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    assert torch.equal(*both)


def main() -> None:
    folder, kill = Path(sys.argv[1]), sys.argv[2:] == ["kill"]
    original, steps, told = loop.train_step, [], {"at": None}

    def step(*args, **arguments):
        steps.append(1)
        if kill and len(steps) == 6 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(steps) == told["at"] and os.environ["RANK"] == "1":  # the other process learns it from this one
            os.kill(os.getpid(), signal.SIGTERM)
        result = original(*args, **arguments)
        if arguments["dtype"] == torch.bfloat16:
            check_low(*args[:2])
        return result

    loop.train_step = step
    runs = [("killed", (None, {}))] if kill else [*RUNS.items(), ("low-first", (None, LOW))]  # which goes on
    for name, (at, settings) in runs:
        steps.clear()
        told["at"] = at
        pretrain(recipe(**settings), folder / "rows", folder / name)
    if not kill:
        write_sharded()


if __name__ == "__main__":
    main()
