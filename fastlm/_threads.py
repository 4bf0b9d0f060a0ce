"""The threads of the command line: how many a run is worth, and how they wait for each other.

A thread of the OpenMP pool that has no work spins for some milliseconds before it sleeps. On a core that another
process wants, all of that is lost: 150 steps of a tiny model took 41 s, not 1.6 (LOG.md). `wait_policy` ends the
spinning on shared cores before torch loads the pool, and `for_work` takes fewer threads for small work. The command
line calls both. `import fastlm` alone changes nothing of a program.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time

from fastlm import _cgroup

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # environment variables: the user's choice stays
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# FLOPs of a layer, forward and backward, that are worth a thread: its 50 parallel regions then take 0.1 ms each.
WORTH = 2.5e8
_SAMPLES, _APART = 5, 0.002  # of the number of running threads, and the seconds between them

_waiting = "as the library ships"
_count = "torch's choice"


def cores() -> float:
    """Cores that this process may use: its affinity, or fewer where its container's quota of time is smaller."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup.cpu_quota()
    return float(allowed) if quota is None else min(float(allowed), quota)


def others() -> float:
    """Threads of other processes that run or wait for a core now: the median of a few samples."""
    samples = []
    for _ in range(_SAMPLES):
        running = _cgroup.read(_cgroup.Path("/proc/loadavg")).split()
        samples.append(int(running[3].partition("/")[0]) - 1 if len(running) > 3 else 0)
        time.sleep(_APART)
    return statistics.median(samples)


def wait_policy() -> str:
    """Bound how long idle threads of the OpenMP pool spin; returns what `state` says of it.

    On cores that are shared, by a quota or with other running processes, they do not spin. It changes the environment
    of this process and of those that it starts, and has an effect only before torch is imported. What the user's
    environment says stays.
    """
    global _waiting
    given = [name for name in WAITING if name in os.environ]
    if given:
        _waiting = f"as the environment says ({', '.join(given)})"
    elif "torch" in sys.modules:
        _waiting = "as the library ships (torch was loaded before)"
    else:
        available, all_cores, running = cores(), os.cpu_count() or 1, others()
        wanted = math.ceil(available)
        if available < wanted or _cgroup.cpu_quota() is not None:
            reason = f"a quota allows {available:g} cores"
        elif wanted > 1 and running + wanted > all_cores:
            reason = f"{running:g} other threads run on the {all_cores} cores"
        else:
            reason = None
        if reason:
            os.environ["GOMP_SPINCOUNT"] = "0"
            os.environ["KMP_BLOCKTIME"] = "0"  # LLVM's and Intel's pool, in ms
            _waiting = f"they sleep at once, since {reason}"
        else:  # 1000 rounds, not the library's 300,000, cost an idle machine a fifth of its speed (LOG.md)
            _waiting = "as the library ships, since no other process runs"
    return _waiting


def for_work(flops: float | None = None) -> int:
    """Set torch's number of threads to what this process has cores for and the work is worth; returns it.

    flops: of the largest piece of work that ops divide, a layer's for one micro-batch; None: as large as can be.

    It depends on the recipe and the machine's limits alone, not on the load: a resumed run has the same number, and so
    the same bits.
    """
    global _count
    import torch

    given = [name for name in COUNTS if name in os.environ]
    if given:
        _count = f"as the environment says ({', '.join(given)})"
        return torch.get_num_threads()
    most = max(1, math.floor(cores()))
    count = min(torch.get_num_threads(), most)
    _count = "torch's choice" if count == torch.get_num_threads() else f"{cores():g} cores may be used"
    if flops is not None and (worth := max(1, math.floor(flops / WORTH))) < count:
        count, _count = worth, f"a layer's {flops / 1e9:.2g} GFLOP a micro-batch are worth no more"
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    return count


def state() -> str:
    """How many threads and why, and how they wait: a line for `fastlm info` and the provenance of a benchmark."""
    import torch

    return f"{torch.get_num_threads()} ({_count}; idle, {_waiting})"
