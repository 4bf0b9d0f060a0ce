"""The clock of a measurement.

Every function that measures takes one, so that tests hand in a clock that they move themselves.
"""

from __future__ import annotations

import time

import torch

_CYCLES_A_MS = 2e6  # of a GPU's clock, at most


class Clock:
    """Time of the host in seconds and, on a CUDA device, of the device in milliseconds.

    Events and sleeping kernels go to the device's current stream.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.on_gpu = torch.device(device).type == "cuda"

    def now(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.perf_counter()

    def wait(self) -> None:
        """Returns when the device has finished its queue."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def keep_busy(self, ms: float) -> None:
        """Queues a kernel that occupies the device for at least `ms` milliseconds."""
        torch.cuda._sleep(int(ms * _CYCLES_A_MS))

    def mark(self) -> torch.cuda.Event:
        """Queues an event, for `between`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Milliseconds of the device between two marks; waits for the second."""
        end.synchronize()
        return start.elapsed_time(end)
