"""A step of generation as one CUDA graph: the decoder and the choice of the token, by one call of the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from fastlm.cuda_graph import CudaGraph

_WARM = 2  # runs before the capture, in which kernels are compiled and libraries allocate their workspaces
LEAST = 16  # steps that are worth a capture, which takes as long as a few of them


def possible(device: torch.device) -> bool:
    """Whether there are graphs on the device. Then the shapes of a step stay, and rows that have ended go on unseen."""
    return device.type == "cuda"


def captured(step: Callable[[], None], state: list[torch.Tensor]) -> Callable[[], None]:
    """`step` as a graph. RuntimeError where it cannot be captured; `state` then is as before.

    step: writes its results in place, into tensors that stay the same
    state: the tensors that it changes. Where it writes beyond their meaning, as keys after the last one, no reader may
        mind.
    """
    before, graph = [x.clone() for x in state], CudaGraph()

    def restore() -> None:
        for x, old in zip(state, before):
            x.copy_(old)

    def run() -> list[torch.Tensor]:
        step()
        return state

    try:
        for _ in range(_WARM):
            graph.warm(run)
            restore()
        graph.capture(run)
    finally:
        restore()
    return graph.replay


def choose(
    step: Callable[[], None],
    state: list[torch.Tensor],
    setting: bool | str,
    device: torch.device,
    steps: int,
    host_work: str = "",
) -> Callable[[], None]:
    """`step`, or a graph of it where `setting` and the device allow one.

    state: see `captured`. setting: Settings.cuda_graph. steps: how many there will be. host_work: what of the step is
        done on the host; then there can be no graph.
    """
    if not possible(device):
        host_work = f"it needs a CUDA device, and the model is on {device.type}"
    if setting is True and host_work:
        raise ValueError(f'cuda_graph: expected False or "auto", got True; {host_work}')
    if setting is False or host_work or (setting == "auto" and steps < LEAST):
        return step
    try:
        return captured(step, state)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if setting is True:
            raise
        warnings.warn(
            f"cuda_graph: the step is not captured, and runs by single launches: {str(error).partition(chr(10))[0]}",
            stacklevel=2,
        )
        return step
