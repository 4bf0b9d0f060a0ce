"""Progress on stderr: one live line on a terminal, elsewhere a plain line every ten seconds."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from fastlm.data import Dataset, prepare
from fastlm.terminal import fit, wrap

_PLAIN_EVERY = 10.0  # seconds between plain lines
_BAR, _NARROW_BAR = 24, 10  # columns; the narrow one on a terminal of fewer than _WIDE
_WIDE = 110


class ProgressLine:
    """A context manager around a job of `total` units.

    update(done, fields) shows how far it is; note(text) prints a line that stays. On a terminal the line shows the
    first fields that fit beside the bar.
    """

    def __init__(self, label: str, total: int, console: Console | None = None):
        self.label, self.total = label, total
        self.console = console or Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self._last, self._plain = time.monotonic(), ""  # when the last plain line was printed, and what it said
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=_BAR if self.console.width >= _WIDE else _NARROW_BAR),
            TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
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

    def update(self, done: int, fields: list[str]) -> None:
        text = "  ".join(fields)
        if self.live:
            bar = _BAR if self.console.width >= _WIDE else _NARROW_BAR
            others = 1 + len(self.label) + bar + 3  # the spinner, the label, the bar, and a space after each
            self._bar.update(self._task, completed=done, text=fit(fields, self.console.width - others))
        elif text != self._plain and (time.monotonic() - self._last >= _PLAIN_EVERY or done == self.total):
            self._last, self._plain = time.monotonic(), text
            self.console.print(f"{self.label} {text}", markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        width = self.console.width if self.live else None
        self.console.print(wrap(text, width), markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """12 s, 3:05, 1:02:03."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}:{minutes:02}:{seconds % 60:02}"
    return f"{minutes}:{seconds % 60:02}" if minutes else f"{seconds} s"


_STAGES = {
    "checksums": "reading",
    "cleaning": "reading and cleaning",
    "held out": "reading held-out text",
    "tokenizer": "training the tokenizer",
    "tokens": "tokenizing",
    "rows": "packing rows",
    "validation": "packing held-out rows",
}


def _pace(done: int, total: int, seconds: float) -> list[str]:
    """The rate and the time left of a stage after `seconds` and `done` of `total` bytes; none in the first second."""
    if seconds < 1.0 or not done:
        return []
    return [f"{done / seconds / 1e6:.1f} MB/s", f"{duration((total - done) * seconds / done)} left"]


def prepare_with_progress(paths, tokenizer, out, **settings) -> Dataset:
    """`fastlm.data.prepare`, with a line for each of its stages."""
    stage, line, began = None, None, 0.0

    def show(name: str, done: int, total: int) -> None:
        nonlocal stage, line, began
        if name != stage:
            if line is not None:
                line.__exit__()
            stage, line, began = name, ProgressLine(_STAGES.get(name, name), total).__enter__(), time.monotonic()
        line.update(done, [f"{done / 1e6:.1f} of {total / 1e6:.1f} MB", *_pace(done, total, time.monotonic() - began)])

    def note(text: str) -> None:  # before the first stage there is no line
        (line or ProgressLine("", 0)).note(text)

    try:
        return prepare(paths, tokenizer, out, progress=show, note=note, **settings)
    finally:
        if line is not None:
            line.__exit__()
