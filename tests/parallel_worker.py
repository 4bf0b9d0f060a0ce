"""Runs of training for test_parallel.py, in each of the processes that torchrun starts.

python -m torch.distributed.run --nproc-per-node 2 tests/parallel_worker.py DIR
... DIR kill     one process kills itself in the middle of a step
"""

import os
import signal
import sys
from pathlib import Path

from fastlm.run.recipe import Recipe
from fastlm.train import loop, pretrain

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
# name -> (the step during which the processes are told to stop, settings of [train])
RUNS = {"ddp": (None, {}), "ddp-first": (5, {}), "fsdp-first": (5, MUON), "from-one": (None, MUON)}


def main() -> None:
    folder, kill = Path(sys.argv[1]), sys.argv[2:] == ["kill"]
    original, steps, told = loop.train_step, [], {"at": None}

    def step(*args, **arguments):
        steps.append(1)
        if kill and len(steps) == 6 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(steps) == told["at"] and os.environ["RANK"] == "1":  # the other process learns it from this one
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **arguments)

    loop.train_step = step
    for name, (at, settings) in ({"killed": (None, {})} if kill else RUNS).items():
        steps.clear()
        told["at"] = at
        pretrain(recipe(**settings), folder / "rows", folder / name)


if __name__ == "__main__":
    main()
