"""Contenders of a training step that are slower or wrong on purpose, for test_train_step.py: each fastlm, changed."""

import time
from dataclasses import replace

import torch

from fastlm.testing.step_contenders import FASTLM


def _prepare_slower(job, model):
    loss, step = FASTLM.prepare(job, model)

    def slower(number):
        began = time.perf_counter()
        out = step(number)
        time.sleep(0.2 * (time.perf_counter() - began))  # not by computing, which a busy machine would slow once more
        return out

    return loss, slower


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


def _prepare_idle(job, model):
    """Forward alone."""
    loss, _ = FASTLM.prepare(job, model)
    return loss, lambda number: torch.tensor(loss())


def _with(**settings):
    """The optimizer's table, changed."""
    return replace(
        FASTLM, prepare=lambda job, model: FASTLM.prepare(replace(job, table=replace(job.table, **settings)), model)
    )


slower = replace(FASTLM, prepare=_prepare_slower)
cold = replace(FASTLM, prepare=_prepare_cold)
shallow = replace(FASTLM, load=_load_shallow)
idle = replace(FASTLM, prepare=_prepare_idle)
halved = _with(lr=2.5e-3)
reseeded = _with(seed=1)
