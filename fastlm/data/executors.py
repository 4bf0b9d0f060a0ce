"""Where the tasks of a preparation run: in this process, in spawned ones, or on the workers of a Ray cluster.

An executor is called as run(function, tasks), with a function of a module and tasks that have `path`, the file that the
function writes, and `name`. It yields each task when it is done.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.connection import wait

from fastlm.data._extras import require

Run = Callable[[Callable, Sequence], Iterator]

_THREADS = "RAYON_NUM_THREADS"  # of `tokenizers` and `rensa`; read when a process first uses one of them


@contextmanager
def in_processes(processes: int) -> Iterator[Run]:
    """Run tasks in so many processes, or a lone task in this one.

    New processes are spawned: a fork would copy locks that threads of ours hold. They stay until the block ends. The
    cores are divided among them.
    """
    pool = None

    def run(function: Callable, tasks: Sequence) -> Iterator:
        nonlocal pool
        if processes == 1 or len(tasks) <= 1:
            yield from map(function, tasks)
            return
        if pool is None:
            threads = max(1, len(os.sched_getaffinity(0)) // processes)
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(threads,))
        for done in as_completed([pool.submit(function, task) for task in tasks]):
            yield done.result()

    try:
        yield run
    except BaseException as error:
        if pool is not None:
            # After a ValueError `fastlm.data.kept` removes the directory of the parts, in which other workers write.
            pool.shutdown(wait=isinstance(error, ValueError), cancel_futures=True)
        raise
    if pool is not None:
        pool.shutdown()


def _begin(threads: int) -> None:
    """Set the process's threads, and end it when its parent does: a worker waits forever for one that was killed."""
    os.environ.setdefault(_THREADS, str(threads))
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()


@contextmanager
def on_ray(processes: int | None, address: str) -> Iterator[Run]:
    """Run tasks on the workers of a Ray cluster.

    processes   tasks at a time; None: as many as the cluster has cores
    address     of the cluster's head; "": one is started on this machine, and ended with the block

    ValueError where a worker's file cannot be seen from here: the machines have to share the directory.
    """
    ray = require("ray")
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is reported is the user's decision
        where = {"address": address} if address else {"address": "local", "num_cpus": processes}
        ray.init(**where, log_to_driver=False, logging_level="ERROR")

    running: list = []

    def run(function: Callable, tasks: Sequence) -> Iterator:
        nonlocal running
        most = processes or int(ray.cluster_resources()["CPU"])
        remote, left = ray.remote(_of_one_core), deque(tasks)
        while left or running:
            while left and len(running) < most:
                running.append(remote.remote(function, left.popleft()))
            (done,), running = ray.wait(running, num_returns=1)
            task = ray.get(done)
            if not task.path.exists():
                raise ValueError(
                    f"out: expected a directory that all machines of the Ray cluster share, got {task.path.parent}, "
                    f"in which the part of {task.name} by a worker is not found"
                )
            yield task

    try:
        yield run
    except ValueError:
        if running:  # as in `in_processes`
            ray.wait(running, num_returns=len(running))
        raise
    finally:
        if started:
            ray.shutdown()


def _of_one_core(function: Callable, task):
    os.environ.setdefault(_THREADS, "1")  # Ray gives a task one core
    return function(task)
