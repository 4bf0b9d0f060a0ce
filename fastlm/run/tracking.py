"""The metrics of a run, also for TensorBoard and Weights & Biases where a user asks for them.

OUT/tensorboard/    event files. Steps after the one that is resumed from are cut off, and missing ones before it are
                    written from metrics.jsonl: each step is there once
OUT/wandb/          what wandb writes, and the number of the run, which a resumed run continues
"""

from __future__ import annotations

import importlib.util
import math
import netrc
import os
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from fastlm.run.metrics import MetricsFile, read_metrics

LOGS = ("tensorboard", "wandb")
_RUN = "fastlm-run-id"
_REACH = 30.0  # seconds that wandb may take to reach its server


def check_logs(log: Iterable[str]) -> tuple[str, ...]:
    """`log` without repetitions. ValueError for a name that is none, or a package that is not installed."""
    log = tuple(dict.fromkeys(log))
    for name in log:
        if name not in LOGS:
            raise ValueError(f"log: expected {' or '.join(LOGS)}, got {name!r}")
        if not _installed(name):
            raise ValueError(f"log: {name} is not installed; pip install 'fastlm[{name}]' brings it, or leave it out")
    return log


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Tracked:
    """A MetricsFile whose lines also go to the trackers in `log`."""

    def __init__(self, metrics: MetricsFile, log: Iterable[str], recipe, out: Path, step: int, say):
        """step: the one that the run continues after; say: called with a line for the user."""
        self._metrics, self.rows = metrics, metrics.rows
        before = read_metrics(metrics.path) if log else []
        self._trackers = []
        for name in log:
            if name == "tensorboard":
                self._trackers.append(_TensorBoard(out, step, before))
            else:
                self._trackers.append(_WandB(out, recipe, before, say))

    def add(self, row: dict) -> None:
        self._metrics.add(row)
        for tracker in self._trackers:
            tracker.add(row)

    def sync(self) -> None:
        """Before a checkpoint: no checkpoint is ahead of its metrics."""
        self._metrics.sync()
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        self._metrics.close()
        for tracker in self._trackers:
            tracker.close()


def _numbers(row: dict) -> dict[str, float]:
    """What of a line is drawn."""
    return {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)}


class _TensorBoard:
    def __init__(self, out: Path, step: int, before: list[dict]):
        from torch.utils.tensorboard import SummaryWriter

        directory = out / "tensorboard"
        last = max((cut_events(path, step) for path in sorted(directory.glob("events.out.tfevents.*"))), default=0)
        # A TensorBoard that is open has read the steps that were cut off: purge_step has it forget them.
        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if last else None)
        for row in before:
            if row["step"] > last:
                self.add(row)

    def add(self, row: dict) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def cut_events(path: Path, step: int) -> int:
    """Cut off the event file `path` where events of steps after `step` begin, or a torn one; the last step left.

    A file that is left without any event of a step is removed.
    """
    last = end = 0
    data = path.read_bytes()
    for start, event in _events(data):
        number = _step(event)
        if number > step:
            break
        last, end = max(last, number), start + len(event) + 16
    if last:
        os.truncate(path, end)
    else:
        path.unlink()
    return last


def _events(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(where it starts, the event) of each whole record: a length, its checksum, the event, its checksum (TFRecord)."""
    at = 0
    while at + 16 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            return
        yield at, data[at + 12 : at + 12 + length]
        at += 16 + length


def _step(event: bytes) -> int:
    """Of an Event in protocol buffers: field 1 is the time, a double, and field 2 the step, a varint; 0 without."""
    at = 9 if event[:1] == b"\x09" else 0
    if event[at : at + 1] != b"\x10":
        return 0
    number = shift = 0
    for byte in event[at + 1 :]:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return number


class _WandB:
    """Online where WANDB_MODE says so or there is a key, else offline. A server that does not answer delays nothing."""

    def __init__(self, out: Path, recipe, before: list[dict], say):
        import wandb

        stored = out / "wandb" / _RUN
        stored.parent.mkdir(parents=True, exist_ok=True)
        number = stored.read_text().strip() if stored.exists() else ""
        resumed = bool(number)
        if not resumed:
            number = uuid.uuid4().hex[:8]
            stored.write_text(number + "\n")
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        arguments = {
            "project": os.environ.get("WANDB_PROJECT") or "fastlm",
            "name": os.environ.get("WANDB_NAME") or out.name,
            "id": number,
            "dir": str(out),
            "config": {**recipe.to_dict(), "recipe": recipe.name},
            **({"resume": "allow"} if mode == "online" else {}),  # offline, the number alone joins the parts
        }
        try:
            self._run = wandb.init(mode=mode, settings=wandb.Settings(init_timeout=_REACH), **arguments)
        except wandb.errors.CommError as error:
            say(f"wandb: its server does not answer ({error}); the run is logged offline")
            wandb.teardown()  # its process still holds the run's number
            mode = "offline"
            self._run = wandb.init(mode=mode, **{k: v for k, v in arguments.items() if k != "resume"})
        if mode == "offline":
            say(f"wandb: offline run {number} in {out / 'wandb'}; `wandb sync` uploads it")
        for row in () if resumed else before:
            self.add(row)

    def add(self, row: dict) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def flush(self) -> None:
        pass  # wandb's own process has what was logged

    def close(self) -> None:
        self._run.finish()


def _has_key() -> bool:
    """Whether wandb would find a key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
