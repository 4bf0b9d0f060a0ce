"""Forward and backward of a micro-batch as one CUDA graph: the host makes one call in place of some 500.

A kernel that takes less time than its launch, as in small batches, leaves the device idle between kernels. A graph's
kernels follow each other without the host. Every micro-batch has the same shapes, and what differs from step to step is
in tensors: the tokens, and rng, (seed, step), of the dropouts. So the graph is captured once, over buffers of its own,
and the same kernels run in the same order as without it: the losses have the same bits.

The memory that a graph computes in is its own too, beside what evaluation and other shapes take.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastlm.cuda_graph import CudaGraph
from fastlm.storage import replace_json
from fastlm.tasks import Micro
from fastlm.train.micro import forward_backward, low_weights
from fastlm.train.parallel import World

_WARM = 3  # runs before the capture, in which kernels are compiled and libraries allocate their workspaces
_GAIN = 0.98  # of the time without a graph, which a graph has to take at most: it holds memory


class Choice(NamedTuple):
    """Whether micro-batches are graphs, and the milliseconds of one without and with a graph, if they were measured.

    why: what prevented a capture; else empty.
    """

    taken: bool
    eager_ms: float | None = None
    graph_ms: float | None = None
    why: str = ""

    def __str__(self) -> str:
        word = "used" if self.taken else "not used"
        if self.why:
            return f"{word}: {self.why}"
        if self.eager_ms is None:
            return word
        return f"{word}: {self.graph_ms:.2f} ms a micro-batch, and {self.eager_ms:.2f} ms by single launches"


class StepGraph:
    """Runs micro-batches of `model` as a graph, where they have the shapes of the one that it was captured with.

    model: of one process alone; with several, gradients would be averaged outside of the graph
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model, self.dtype, self._graph = model, dtype, CudaGraph()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._static: Micro | None = None

    def capture(self, micro: Micro) -> None:
        """Captures the forward and backward of micro-batches with the shapes of `micro`, which is not changed.

        No parameter may have a gradient. None has one afterwards.
        """
        self._static = micro.map(torch.clone)
        with low_weights(self.model, self.dtype):
            for _ in range(_WARM):
                self._graph.warm(self._run_static)
            self._loss, *gradients = self._graph.capture(self._run_static)
        # A parameter that gets no gradient has none in any step.
        self._gradients = dict(zip(self._with_gradient, gradients))

    def _run_static(self) -> list[torch.Tensor]:
        loss = forward_backward(self.model, self._static, self.dtype)
        self._with_gradient = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in self._with_gradient]
        for p in self._with_gradient:
            p.grad = None
        return [loss, *gradients]

    def fits(self, micro: Micro) -> bool:
        """Whether `micro` has the shapes, dtypes and plain arguments of the captured one."""
        return self._static is not None and _kind(micro) == _kind(self._static)

    def run(self, micro: Micro, *, alone: bool) -> torch.Tensor:
        """As forward_backward(model, micro, dtype): by the graph where it fits, else by single launches.

        alone: no other micro-batch follows before the gradients were used. The gradients then are the graph's own.
        """
        if not self.fits(micro):
            return forward_backward(self.model, micro, self.dtype)
        for name, buffer in self._static.inputs.items():
            if isinstance(buffer, torch.Tensor):
                buffer.copy_(micro.inputs[name], non_blocking=True)
        self._graph.replay()
        added = [(p.grad, g) for p, g in self._gradients.items() if p.grad is not None]
        fresh = [(p, g) for p, g in self._gradients.items() if p.grad is None]
        if added:
            torch._foreach_add_(*map(list, zip(*added)))
        if fresh:
            gradients = given = [g for _, g in fresh]
            if not alone:
                given = [torch.empty_like(g) for g in gradients]
                torch._foreach_copy_(given, gradients)
            for (p, _), g in zip(fresh, given):
                p.grad = g
        return self._loss.clone()

    def choose(self, micro: Micro, setting: str | bool) -> Choice:
        """Captures for `micro`, and says whether to use the graph. setting: "auto", or True.

        "auto" times a micro-batch both ways, and takes a graph that is at least 2% faster. Where it does not fit into
        memory, or torch cannot capture the model, it is not used; True raises then.
        """

        def timed(function: Callable[[], object]) -> float:
            with low_weights(self.model, self.dtype):
                return 1e3 * self._graph.seconds(lambda: (function(), self._drop_gradients()))

        try:
            if setting is True:
                self.capture(micro)
                return Choice(True)
            # Before the capture, which gives the memory of single launches back.
            eager = timed(lambda: forward_backward(self.model, micro, self.dtype))
            self.capture(micro)
            graph = timed(lambda: self.run(micro, alone=True))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self._static = None
            self._drop_gradients()
            if setting is True:
                raise
            return Choice(False, why=f"the capture failed: {str(error).partition(chr(10))[0]}")
        return Choice(graph < _GAIN * eager, eager, graph)

    def _drop_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None


def possible(setting: str | bool, world: World) -> bool:
    """Whether a run may use a graph: on a CUDA device, by one process, which no other one's gradients wait for."""
    return setting is not False and world.device.type == "cuda" and world.size == 1


def check_setting(setting: str | bool, world: World) -> None:
    """ValueError where train.cuda_graph asks for what there cannot be."""
    if setting is True and not possible(setting, world):
        raise ValueError(
            f'train.cuda_graph: expected False or "auto" with {world.size} processes on {world.device.type}, got True; '
            "a graph needs a CUDA device, and one process"
        )


def find_graph(
    model: nn.Module, micro: Micro, dtype: torch.dtype, setting: str | bool, path: Path
) -> tuple[StepGraph | None, Choice]:
    """The graph for the micro-batches of a run, captured with `micro`; None where single launches are to be used.

    setting: "auto", or True
    path: of the file with the choice of "auto". It is written before the first step; a resumed run does as it says.
    """
    known = Choice(**json.loads(path.read_text())) if setting == "auto" and path.is_file() else None
    if known is not None and not known.taken:
        return None, known
    graph = StepGraph(model, dtype)
    choice = graph.choose(micro, setting if known is None else True)
    if setting == "auto" and known is None:
        replace_json(path, choice._asdict(), what="the choice of a CUDA graph")
    return (graph, choice) if choice.taken else (None, choice)


def _kind(micro: Micro) -> dict[str, object]:
    """What a graph holds fixed of a micro-batch's arguments."""
    return {
        name: (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else value
        for name, value in micro.inputs.items()
    }
