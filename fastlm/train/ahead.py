"""What runs beside the steps of training: batches made ahead, and signals."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from fastlm.tasks import Micro, Task


def ahead(task: Task, mine: range, start: int, stop: int) -> Iterator[tuple[int, list[Micro]]]:
    """(step, its micro-batches `mine`) for each step, made by one thread of the host while the steps before run."""
    pin = task.device.type == "cuda"

    def make(step: int) -> list[Micro]:
        micros = [task.micro(step, m) for m in mine]
        return [micro.pin() for micro in micros] if pin else micros

    with ThreadPoolExecutor(1, thread_name_prefix="fastlm-batches") as thread:
        pending = deque()
        for step in range(start, stop):
            pending.append((step, thread.submit(make, step)))
            if len(pending) > 2:
                step, made = pending.popleft()
                yield step, made.result()
        for step, made in pending:
            yield step, made.result()


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list to which SIGTERM and SIGINT add their numbers; the second of the same does what it did before."""
    stop, before = [], {}

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
