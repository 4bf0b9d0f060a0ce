"""How fast a run is: the time of its steps, and apart from it that of evaluations and checkpoints."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SHOWN = 20  # steps that the rates are medians of: a step that something else slowed down does not show
_AHEAD = 200  # steps that the remaining time is computed from, with all that slowed them down


class Pace:
    """`step` after each step, `apart` around everything else. Times are in seconds.

    seconds    of the steps
    elsewhere  of the blocks in `apart`
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._since = clock, clock()
        self._rates: deque[tuple[float, float]] = deque(maxlen=_SHOWN)  # tokens and FLOPs a second
        self._times: deque[float] = deque(maxlen=_AHEAD)
        self._first: float | None = None  # of this process: it also loads kernels and fills the allocator
        self._blocks: dict[str, list[float]] = defaultdict(list)
        self.elsewhere = 0.0

    def start(self) -> None:
        self._since = self._clock()

    def step(self, tokens: int, flops: float) -> float:
        """Enter a step that ended now; its seconds, from the end of the step or of the block before."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        self._rates.append((tokens / seconds, flops / seconds))
        if self._first is None:
            self._first = seconds
        else:
            self._times.append(seconds)
        return seconds

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """The block's time is no step's; `what` it does, for `left`."""
        began = self._clock()
        try:
            yield
        finally:
            self._since = self._clock()
            self._blocks[what].append(self._since - began)
            self.elsewhere += self._since - began

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(tokens for tokens, _ in self._rates)

    @property
    def flops_per_s(self) -> float:
        return statistics.median(flops for _, flops in self._rates)

    def left(self, steps: int, **blocks: int) -> float:
        """Seconds that `steps` more steps take, and so many more blocks by what they do.

        What was not timed yet counts as nothing.
        """
        times = self._times or [self._first or 0.0]
        seconds = steps * statistics.fmean(times)
        for what, count in blocks.items():
            if self._blocks[what]:
                seconds += count * statistics.fmean(self._blocks[what])
        return seconds


def due(step: int, last: int, every: int) -> int:
    """How many of the steps after `step`, to `last`, are multiples of `every` or the last; every = 0: only the last."""
    if step >= last:
        return 0
    multiples = last // every - step // every if every else 0
    return multiples + (not every or last % every != 0)
