"""Contenders of a training step, for test_train_step.py: each fastlm, slower, wrong or broken on purpose."""

import os
import signal
import time
from dataclasses import replace

import torch

from fastlm.testing.step_contenders import FASTLM


def _paced(ms):
    """A step of fastlm, and then nothing until so many milliseconds after it began.

    What a busy machine adds to the step, in one process more than in another, is inside of them: from 11 ms on two idle
    cores to 31 beside six busy threads, 51 at most. It lets a sleeper wait for 2 ms more, 8 at most.
    """

    def prepare(job, model):
        loss, step = FASTLM.prepare(job, model)

        def paced(number):
            end = time.perf_counter() + ms / 1e3
            out = step(number)
            time.sleep(max(0.0, end - time.perf_counter()))
            return out

        return loss, paced

    return replace(FASTLM, prepare=prepare)


def _prepare_cold(job, model):
    """Where another process ran for a while, the step takes a second longer."""
    loss, step = FASTLM.prepare(job, model)
    last = [0.0]

    def cold(number):
        if time.perf_counter() - last[0] > 0.02:
            time.sleep(1)
        out = step(number)
        last[0] = time.perf_counter()
        return out

    return loss, cold


def _load_shallow(job):
    model = FASTLM.load(job)
    model.layers = model.layers[:-1]
    return model


def _prepare_broken(job, model):
    """Its first step works."""
    loss, step = FASTLM.prepare(job, model)
    return loss, lambda number: step(number) if number == 0 else step(1 / 0)


def _prepare_killed(job, model):
    """As the system kills a process that takes too much memory."""
    loss, step = FASTLM.prepare(job, model)
    return loss, lambda number: step(number) if number == 0 else os.kill(os.getpid(), signal.SIGKILL)


def _prepare_idle(job, model):
    """Forward alone."""
    loss, _ = FASTLM.prepare(job, model)
    return loss, lambda number: torch.tensor(loss())


def _with(**settings):
    """The optimizer's table, changed."""
    return replace(
        FASTLM, prepare=lambda job, model: FASTLM.prepare(replace(job, table=replace(job.table, **settings)), model)
    )


paced, slower = _paced(80), _paced(96)
cold = replace(FASTLM, prepare=_prepare_cold)
shallow = replace(FASTLM, load=_load_shallow)
broken = replace(FASTLM, prepare=_prepare_broken)
killed = replace(FASTLM, prepare=_prepare_killed)
idle = replace(FASTLM, prepare=_prepare_idle)
halved = _with(lr=2.5e-3)
reseeded = _with(seed=1)
