"""Checksums of shards while they are in use: a shard is checked before a row of it is given out.

`need` checks the shards of a batch that were not checked yet, on as many threads as there are cores. `check_ahead` lets
one thread check the others meanwhile, of all datasets of a run: more threads would take cores from the steps. So the
first step waits for its own shards alone, and a failing shard ends the run before a row of it is trained on, and by the
next batch after the thread has found it. What changes on the disk after a shard was checked is not seen.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

_UNKNOWN, _UNDER_WAY, _GOOD, _BAD = range(4)


class Verification:
    """The state of `count` shards.

    check   called with a shard's number, in any thread, once a shard: why it cannot be used, or None. An error that it
            raises leaves the shard unchecked: `need` raises it, and the next `need` of the shard checks again
    """

    def __init__(self, count: int, check: Callable[[int], str | None]):
        self._check = check
        self._states = bytearray(count)
        self._left = count  # that are not good
        self._reasons: dict[int, str] = {}
        self._changed = threading.Condition()

    def need(self, shards: Iterable[int]) -> dict[int, str]:
        """Wait until each of `shards` is checked; the reason of each shard that failed until now, these or others."""
        if self._left:
            missing = [shard for shard in shards if self._states[shard] != _GOOD]
            if len(missing) > 1:
                with ThreadPoolExecutor(min(len(missing), len(os.sched_getaffinity(0)))) as pool:
                    list(pool.map(self._one, missing))
            elif missing:
                self._one(missing[0])
        return self._reasons

    def check_all(self) -> None:
        """Check the shards that were not checked yet, the first first."""
        for shard in range(len(self._states)):
            # An error of the check says nothing of the shard: `need` checks it again, and raises it in the reader.
            with suppress(Exception):
                self._one(shard)

    def _one(self, shard: int) -> None:
        with self._changed:
            while self._states[shard] == _UNDER_WAY:
                self._changed.wait()
            if self._states[shard] != _UNKNOWN:
                return
            self._states[shard] = _UNDER_WAY
        state = _UNKNOWN
        try:
            reason = self._check(shard)
            state = _GOOD if reason is None else _BAD
        finally:
            with self._changed:
                self._states[shard] = state
                self._left -= state == _GOOD
                if state == _BAD:
                    self._reasons[shard] = reason
                self._changed.notify_all()


def check_ahead(verifications: Sequence[Verification]) -> threading.Thread:
    """The thread, started here, that checks all shards of these, one after another."""

    def check() -> None:
        for verification in verifications:
            verification.check_all()

    thread = threading.Thread(target=check, name="checksums of shards", daemon=True)
    thread.start()
    return thread
