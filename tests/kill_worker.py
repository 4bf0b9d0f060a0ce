"""One life of a run for test_kills.py: python tests/kill_worker.py RECIPE.json DATA OUT [STEP]

STEP: the process kills itself in the middle of that step. Steps are slow, so that there is time to be killed in.
"""

import json
import os
import signal
import sys
import time

import torch

from fastlm.run.recipe import Recipe
from fastlm.train import loop, pretrain


def main() -> None:
    torch.set_num_threads(1)
    recipe, data, out, at = *sys.argv[1:4], int(sys.argv[4]) if len(sys.argv) > 4 else -1
    original = loop.train_step

    def step(model, optimizer, micros, **arguments):
        time.sleep(0.01)
        losses = original(model, optimizer, micros, **arguments)
        if int(micros[0].inputs["rng"][1]) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses

    loop.train_step = step
    with open(recipe) as file:
        pretrain(Recipe.from_dict(json.load(file)), data, out)


if __name__ == "__main__":
    main()
