"""Lives of runs for test_kills.py, in processes that are forked from one that has imported all of this."""

import os
import signal
import sys
import time

import torch

from fastlm.run.recipe import Recipe
from fastlm.train import loop, pretrain


def live(content: dict, data, out, at: int | None) -> None:
    """Train until this process is killed; in the middle of step `at`, from 0, it kills itself.

    Steps are slow, so that there is time to be killed in.
    """
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    original = loop.train_step

    def step(model, optimizer, micros, **arguments):
        time.sleep(0.01)
        result = original(model, optimizer, micros, **arguments)
        # "rng" counts micro-batches, of which a step here has one
        if at is not None and int(micros[0].inputs["rng"][1]) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    loop.train_step = step
    pretrain(Recipe.from_dict(content), data, out)
