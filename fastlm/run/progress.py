"""Progress on stderr: one live line on a terminal, elsewhere a plain line every ten seconds."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from fastlm.data import Dataset, prepare

_PLAIN_EVERY = 10.0  # seconds between plain lines


class ProgressLine:
    """A context manager around a job of `total` units.

    update(done, text) shows how far it is; note(text) prints a line that stays.
    """

    def __init__(self, label: str, total: int, console: Console | None = None):
        self.label, self.total = label, total
        self.console = console or Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self._last, self._plain = time.monotonic(), ""  # when the last plain line was printed, and what it said
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> ProgressLine:
        if self.live:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, text="")
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self._bar.stop()

    def update(self, done: int, text: str) -> None:
        if self.live:
            self._bar.update(self._task, completed=done, text=text)
        elif text != self._plain and (time.monotonic() - self._last >= _PLAIN_EVERY or done == self.total):
            self._last, self._plain = time.monotonic(), text
            self.console.print(f"{self.label} {text}", markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """12 s, 3:05, 1:02:03."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}:{minutes:02}:{seconds % 60:02}"
    return f"{minutes}:{seconds % 60:02}" if minutes else f"{seconds} s"


_STAGES = {"checksums": "reading", "tokenizer": "training the tokenizer", "rows": "packing rows"}


def prepare_with_progress(paths, tokenizer, out, **settings) -> Dataset:
    """`fastlm.data.prepare`, with a line for each of its stages."""
    stage, line = None, None

    def show(name: str, done: int, total: int) -> None:
        nonlocal stage, line
        if name != stage:
            if line is not None:
                line.__exit__()
            stage, line = name, ProgressLine(_STAGES.get(name, name), total).__enter__()
        line.update(done, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB")

    try:
        return prepare(paths, tokenizer, out, progress=show, **settings)
    finally:
        if line is not None:
            line.__exit__()
