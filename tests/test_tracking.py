"""TensorBoard and W&B: modules that only record what they are told stand in for the packages."""

import json
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from training import corpus, small

from fastlm import cli
from fastlm.data import prepare
from fastlm.run import tracking
from fastlm.run.metrics import MetricsFile, read_metrics
from fastlm.run.tracking import Tracked, check_logs, cut_events
from fastlm.train import loop, pretrain


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare(corpus(directory / "corpus.txt"), "train:200", directory / "rows", row_tokens=32, documents="line")
    return directory / "rows"


def record(step, extra=b""):
    """An event of `step` in an event file, as TensorBoard writes it; the checksums are not read."""
    varint, rest = b"", step
    while True:
        varint += bytes([rest & 0x7F | (0x80 if rest > 0x7F else 0)])
        rest >>= 7
        if not rest:
            break
    event = b"\x09" + struct.pack("<d", 1.0) + (b"\x10" + varint if step else b"") + b"\x2a\x01x" + extra
    return struct.pack("<Q", len(event)) + b"crcx" + event + b"crcx"


class SummaryWriter:
    """Writes events of steps, without values, and remembers the values."""

    made: list  # all of them

    def __init__(self, directory, purge_step=None):
        self.purge_step, self.scalars, self.flushed = purge_step, {}, 0
        self.made.append(self)
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{len(self.made)}"
        self.path.write_bytes(record(0))

    def add_scalar(self, name, value, step):
        if step not in self.scalars:
            with open(self.path, "ab") as file:
                file.write(record(step))
        self.scalars.setdefault(step, {})[name] = value

    def flush(self):
        self.flushed += 1

    def close(self):
        self.path = None


class WandB:
    """The module."""

    class errors:
        class CommError(Exception):
            pass

    def __init__(self):
        self.runs, self.answers, self.torn_down = [], True, 0

    def Settings(self, **settings):
        return settings

    def teardown(self):
        self.torn_down += 1

    def init(self, **arguments):
        if arguments["mode"] == "online" and not self.answers:
            raise self.errors.CommError("timed out")
        run = SimpleNamespace(arguments=arguments, logged={}, finished=False)
        run.log = lambda values, step: run.logged.setdefault(step, []).append(values)
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


@pytest.fixture
def trackers(monkeypatch):
    """(SummaryWriters, wandb), where neither package need be installed."""
    wandb = WandB()
    SummaryWriter.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(tracking, "_installed", lambda name: True)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere/netrc")
    return SummaryWriter.made, wandb


def test_what_is_no_log_or_not_installed(data, tmp_path, monkeypatch):
    assert check_logs(()) == ()
    with pytest.raises(ValueError, match="log: expected tensorboard or wandb, got 'mlflow'"):
        pretrain(small(), data, tmp_path / "run", log=["mlflow"])
    monkeypatch.setattr(tracking, "_installed", lambda name: False)
    with pytest.raises(ValueError, match=r"log: wandb is not installed; pip install 'fastlm\[wandb\]'"):
        pretrain(small(), data, tmp_path / "run", log=["wandb"])
    assert not (tmp_path / "run").exists()


def test_event_files_are_cut(tmp_path):
    path = tmp_path / "events.out.tfevents.1"
    steps = [0, 1, 2, 127, 128, 300, 70_000]
    path.write_bytes(b"".join(record(step, b"y" * step) if step < 400 else record(step) for step in steps))
    whole = path.read_bytes()
    assert cut_events(path, 10**9) == 70_000
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-3])  # the last one is torn
    assert cut_events(path, 10**9) == 300
    assert cut_events(path, 200) == 128
    assert path.read_bytes() == b"".join(record(step, b"y" * step) for step in steps[:5])
    assert cut_events(path, 0) == 0
    assert not path.exists()


def stopping(monkeypatch, after):
    """A run that ends as if it were killed, after so many steps."""
    original = loop.train_step

    def step(model, optimizer, micros, **arguments):
        if int(micros[0].inputs["rng"][1]) == after:
            raise KeyboardInterrupt
        return original(model, optimizer, micros, **arguments)

    monkeypatch.setattr(loop, "train_step", step)
    return original


def test_a_resumed_run_has_each_step_once(data, tmp_path, monkeypatch, trackers):
    """Killed after step 10, resumed from step 8; another log is no other run."""
    writers, wandb = trackers
    original = stopping(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        pretrain(small(), data, tmp_path, log=["tensorboard", "wandb", "wandb"])
    assert len(wandb.runs) == len(writers) == 1
    assert list(writers[0].scalars) == list(wandb.runs[0].logged) == list(range(1, 11))
    assert writers[0].purge_step is None
    assert writers[0].flushed == 2
    monkeypatch.setattr(loop, "train_step", original)
    pretrain(small(), data, tmp_path, log=["tensorboard", "wandb"])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    first, second = (path for path in sorted((tmp_path / "tensorboard").iterdir()))
    assert first.read_bytes() == b"".join(record(step) for step in range(9))
    assert second.read_bytes() == b"".join(record(step) for step in (0, 9, 10, 11, 12))
    assert writers[1].purge_step == 9
    assert writers[1].scalars[12] == {k: v for k, v in rows[11].items() if k != "step" and v is not None}
    assert {"loss", "grad_norm", "lr", "tokens", "tokens_per_s"} <= set(writers[1].scalars[12])
    one, two = wandb.runs
    assert one.arguments["id"] == two.arguments["id"]
    assert list(two.logged) == [9, 10, 11, 12]
    assert two.finished
    assert two.arguments["config"]["train"]["lr"] == 5e-3
    pretrain(small(train__max_steps=12), data, tmp_path)  # finished; and no log


def test_a_log_that_starts_late_has_the_steps_before(tmp_path, trackers):
    writers, wandb = trackers
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        metrics.add({"step": step, "loss": float(step), "mfu": None, "grad_norm": float("nan")})
    metrics.close()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.0").write_bytes(record(0) + record(1))
    tracked = Tracked(
        MetricsFile(tmp_path / "metrics.jsonl", 3), ("tensorboard", "wandb"), small(), tmp_path, 3, lambda text: None
    )
    tracked.add({"step": 4, "loss": float("inf"), "lr": 0.1})
    tracked.close()
    assert tracked.rows == 3
    assert writers[0].scalars == {2: {"loss": 2.0}, 3: {"loss": 3.0}, 4: {"lr": 0.1}}
    assert wandb.runs[0].logged == {1: [{"loss": 1.0}], 2: [{"loss": 2.0}], 3: [{"loss": 3.0}], 4: [{"lr": 0.1}]}
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[3]) == {"step": 4, "loss": None, "lr": 0.1}


def wandb_run(tmp_path, name, notes):
    out = tmp_path / name
    out.mkdir()
    Tracked(MetricsFile(out / "metrics.jsonl", 0), ("wandb",), small(), out, 0, notes.append).close()


def test_where_wandb_goes(tmp_path, monkeypatch, trackers):
    """Offline without a key, where told so, and where the server does not answer; it never asks for a key."""
    _, wandb = trackers
    modes, notes = lambda: [run.arguments["mode"] for run in wandb.runs], []
    wandb_run(tmp_path, "a", notes)
    assert modes() == ["offline"]
    assert re.fullmatch(r"wandb: offline run \w{8} in .*a/wandb; `wandb sync` uploads it", notes[0])
    monkeypatch.setenv("WANDB_API_KEY", "some-key")
    wandb_run(tmp_path, "b", notes)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb_run(tmp_path, "c", notes)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password some-key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb_run(tmp_path, "d", notes)
    assert modes() == ["offline", "online", "offline", "online"]
    assert wandb.runs[3].arguments["resume"] == "allow"
    assert wandb.runs[3].arguments["settings"] == {"init_timeout": 30.0}
    assert len(notes) == 2
    wandb.answers = False
    wandb_run(tmp_path, "e", notes)
    assert modes()[4] == "offline"
    assert wandb.torn_down == 1
    assert notes[2] == "wandb: its server does not answer (timed out); the run is logged offline"
    assert len({run.arguments["id"] for run in wandb.runs}) == 5


def test_the_real_tensorboard_reads_each_step_once(data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    original = stopping(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        pretrain(small(), data, tmp_path, log=["tensorboard"])
    monkeypatch.setattr(loop, "train_step", original)
    pretrain(small(), data, tmp_path, log=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [e.step for e in events.Scalars("loss")] == [row["step"] for row in rows]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])


def test_the_command_takes_logs(tmp_path, monkeypatch, capsys):
    """Refused before any text is read."""
    arguments = ["fastlm", "pretrain", "bert-mini", "--data", "none", "--out", str(tmp_path / "run"), "--log", "wandb"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(cli._malloc, "tune", lambda: "left alone in tests")
    monkeypatch.setattr(tracking, "_installed", lambda name: False)
    monkeypatch.setattr("warnings.showwarning", None)
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "error: log: wandb is not installed; pip install 'fastlm[wandb]' brings it, or leave it out\n"
    )
