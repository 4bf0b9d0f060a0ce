"""The process that one contender of a training step runs in, and the parent's end of it.

    python -m fastlm.bench.step_worker NAME DIRECTORY

DIRECTORY holds weights/, batches.safetensors and spec.json (compare.py writes them). The process answers {"loss"} at
once. Then it reads lines, "time N" or "losses N", and answers each after N steps. {"missing": why} or {"failed": why}
is the last answer of a contender that cannot run, or no longer can.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from fastlm import _malloc, models
from fastlm.bench import memory, step_contenders
from fastlm.bench.clock import Clock
from fastlm.bench.job import Job, NotRun
from fastlm.bench.steps import BATCHES
from fastlm.tasks import TrainTable

TENSORS = "input_ids", "labels", "lengths"


def read_job(directory: Path) -> Job:
    spec = json.loads((directory / "spec.json").read_text())
    device = torch.device(spec["device"])
    tensors = {key: value.to(device) for key, value in load_file(directory / "batches.safetensors").items()}
    batches = [tuple(tensors[f"{key}.{i}"] for key in TENSORS) for i in range(BATCHES)]
    return Job(getattr(models, spec["model"]), TrainTable(**spec["train"]), directory / "weights", batches, device)


class Runner:
    """A contender with its model; `start` first, then `run` as often as wanted."""

    def __init__(self, name: str, directory: Path, make_clock: Callable[[torch.device], Clock] = Clock):
        self.name, self.directory, self.make_clock = name, directory, make_clock
        self.done = 0

    def start(self) -> dict:
        """{"loss": of the first batch}."""
        contender, job = step_contenders.find(self.name), read_job(self.directory)
        self.device, self.clock = job.device, self.make_clock(job.device)
        model = contender.load(job)
        self.before_mb = memory.in_use_mb(job.device)
        first_loss, self.step = contender.prepare(job, model)
        return {"loss": first_loss()}

    def run(self, steps: int, what: str = "time") -> dict:
        """Runs so many steps: {"seconds": a step, "peak_mb", "step_mb"}; what="losses": {"losses": of each}."""
        losses = []
        if what == "time":
            # One step before the clock: the caches and TLBs hold other processes' data, and on CUDA memory was given
            # back for them.
            self._next()
        self.clock.wait()
        began = self.clock.now()
        for _ in range(steps):
            loss = self._next()
            if what == "losses":
                losses.append(float(loss))
        self.clock.wait()
        seconds = self.clock.now() - began
        if what == "losses":
            answer = {"losses": losses}
        else:
            peak = memory.peak_mb(self.device)
            answer = {"seconds": seconds / steps, "peak_mb": peak, "step_mb": peak - self.before_mb}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return answer

    def _next(self):
        self.done += 1
        return self.step(self.done - 1)


def answer_of(function: Callable[..., dict], *arguments) -> dict:
    """What it returns; {"missing": why} or {"failed": why} where it raises, and the other contenders run on."""
    try:
        return function(*arguments)
    except ModuleNotFoundError as error:
        return {"missing": f"{error.name} is not installed"}
    except NotRun as reason:
        return {"missing": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}


def work(name: str, directory: Path) -> None:
    """The process."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    runner = Runner(name, directory)

    def start() -> dict:
        if step_contenders.find(name).tuned:
            _malloc.tune()
        if threads := json.loads((directory / "spec.json").read_text())["threads"]:
            torch.set_num_threads(threads)
        return runner.start()

    def answer(function, *arguments) -> bool:
        content = answer_of(function, *arguments)
        print(json.dumps(content), file=answers, flush=True)
        return not content.keys() & {"missing", "failed"}

    going = answer(start)
    while going and (line := sys.stdin.readline()):
        what, steps = line.split()
        going = answer(runner.run, int(steps), what)


class Worker:
    """The parent's end. The contender runs a round when told to, and is idle otherwise."""

    def __init__(self, name: str, directory: Path):
        environment = {k: v for k, v in os.environ.items() if k not in _malloc.VARIABLES}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastlm.bench.step_worker", name, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def start(self) -> dict:
        """As of Runner; so is `run`. An answer may be {"missing": why} or {"failed": why}."""
        return self._read()

    def run(self, steps: int, what: str = "time") -> dict:
        with suppress(BrokenPipeError):  # the last answer says why
            self._process.stdin.write(f"{what} {steps}\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failed": f"its process ended with {self._process.wait()}"}

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read()[-2000:]

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
