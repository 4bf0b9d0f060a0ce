"""Contenders of a training step for test_bench_steps.py: fastlm's, made slower, wrong or broken on purpose.

CLOCK is the fake clock of those that run in the test's process; in another process it is moved and never read.
"""

import os
import signal
from dataclasses import replace

import torch
from fake_clock import FakeClock

from fastlm.bench.step_contenders import FASTLM

CLOCK = FakeClock()


def _paced(ms):
    """A step of fastlm that takes so many milliseconds."""

    def prepare(job, model):
        loss, step = FASTLM.prepare(job, model)

        def paced(number):
            CLOCK.advance(ms)
            return step(number)

        return loss, paced

    return replace(FASTLM, prepare=prepare)


def _prepare_cold(job, model):
    """A second for a step after another process ran, 2 ms otherwise."""
    loss, step = FASTLM.prepare(job, model)
    last = [-1.0]

    def cold(number):
        CLOCK.advance(2 if CLOCK.now() == last[0] else 1000)
        last[0] = CLOCK.now()
        return step(number)

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
    """Its third step is killed, as the system kills a process that takes too much memory."""
    loss, step = FASTLM.prepare(job, model)
    return loss, lambda number: step(number) if number < 2 else os.kill(os.getpid(), signal.SIGKILL)


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
