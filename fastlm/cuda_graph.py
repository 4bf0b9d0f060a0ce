"""Work of a CUDA device as one graph, which the host launches by one call: for training steps and for measurements."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import torch

_TIMED = 5  # runs that are timed
_T = TypeVar("_T")
# An allocator of torch may keep a pointer to a graph whose capture failed, so these objects, emptied, are never freed.
_failed: list[torch.cuda.CUDAGraph] = []


class CudaGraph:
    """torch.cuda.CUDAGraph by two functions, for which tests have a stand-in.

    share: another graph, whose memory and stream this one uses. The two never run at once, and what the one computed is
        lost when the other one runs. Not one whose capture failed.
    """

    def __init__(self, share: CudaGraph | None = None):
        self._graph = torch.cuda.CUDAGraph()
        self._stream = share._stream if share else torch.cuda.Stream()
        self._pool = share._pool if share else torch.cuda.graph_pool_handle()

    def warm(self, function: Callable[[], object]) -> None:
        """Runs it on the stream of the capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, function: Callable[[], _T]) -> _T:
        """What the function returns: tensors, which each `replay` writes anew.

        Where the capture fails, the error is raised and torch works as before: the current stream, the random numbers
        and the memory.
        """
        device = torch.cuda.current_device()
        generator = torch.cuda.default_generators[device]
        before = generator.clone_state()
        try:
            # torch.cuda.graph leaves its stream current where the end of the capture fails; the outer context does not.
            # Not of all threads: the one that makes the next batches pins memory meanwhile.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                return function()
        except BaseException:
            self._graph.reset()
            _failed.append(self._graph)
            generator.graphsafe_set_state(before)  # its own would wait for the end of the capture, and refuse to draw
            # Where torch did not end the capture, it would refuse to empty its cache, and so the next capture.
            with contextlib.suppress(RuntimeError):  # it did
                torch._C._cuda_endAllocateToPool(device, self._pool)
                torch._C._cuda_releasePool(device, self._pool)
            raise

    def replay(self) -> None:
        self._graph.replay()

    @staticmethod
    def seconds(function: Callable[[], object]) -> float:
        """The time of one call, on the device and the host together; the best of a few."""
        best = float("inf")
        for _ in range(_TIMED):
            torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        return best
