"""`fastlm profile`: where the time of a training step goes, by op and by layer.

It profiles the step of a recipe on drawn ids (steps.py): forward, backward, clipping, AdamW, after a warm-up. A
module's range has its name, "layers.3.attention", and in backward "layers.3 backward"; an op's has torch's name, for
fastlm's ops "fastlm::attention_fwd" and "attention_fwdBackward".

    torch    torch's profiler, on any device: a table of ops, one of modules, on a GPU one of kernels, a Chrome trace
    nsys     Nsight Systems: kernels, NVTX ranges and CUDA graphs on one time line
    ncu      Nsight Compute: every counter of the step's first kernels

nsys and ncu start this command again inside of them. There the profiled steps lie between cudaProfilerStart and
cudaProfilerStop, and ranges are NVTX ranges.
"""

from __future__ import annotations

import csv
import errno
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch.autograd.profiler import record_function

from fastlm.bench.step_contenders import fastlm_step
from fastlm.bench.steps import find_step
from fastlm.storage import atomic_file

TOOLS = ("torch", "nsys", "ncu")
TRACE, OPS, MODULES, KERNELS = "trace.json", "ops.csv", "modules.csv", "kernels.csv"
_WARMUP = 3
_MEASURED = 12  # kernels that ncu measures, a layer's forward; all sections replay each some forty times


@dataclass(frozen=True)
class Row:
    """An op or a module: calls and milliseconds of a step, its own ("self") and with what it calls ("total").

    On a GPU milliseconds of the kernels that it launches, else of the host. A kernel is a row of its own there.
    """

    name: str
    calls: float
    self_ms: float
    total_ms: float


def command(tool: str, out: Path, arguments: Sequence[str]) -> list[str]:
    """The command line of a tool around `fastlm profile` with these arguments; its results go to `out`."""
    inside = [sys.executable, "-m", "fastlm", "profile", *arguments, "--inside"]
    if tool == "nsys":
        options = [
            f"--output={out / 'step'}",
            "--force-overwrite=true",
            "--trace=cuda,nvtx,cublas,osrt",
            "--capture-range=cudaProfilerApi",
            "--capture-range-end=stop",
            "--cuda-graph-trace=node",
        ]
        return ["nsys", "profile", *options, *inside]
    options = [
        f"--export={out / 'kernels'}",
        "--force-overwrite",
        "--profile-from-start=off",
        "--nvtx",
        "--set=full",
        # By default ncu locks the clock to its base; the times would not be those of a training step.
        "--clock-control=none",
        "--import-source=yes",
        "--graph-profiling=node",
        f"--launch-count={_MEASURED}",
    ]
    return ["ncu", *options, *inside]


def profile(
    recipe: str,
    out: str | Path,
    *,
    device: str = "cpu",
    steps: int = 3,
    settings: Sequence[str] = (),
    vocab_size: int = 30522,
    tools: Sequence[str] = TOOLS,
    say: Callable = print,
) -> list[Row]:
    """Profiles `steps` steps of a recipe with each tool, and writes what they find into the directory `out`.

    recipe: a name, a TOML file, or one of steps.STEPS; settings: as of `fastlm pretrain --set`. say: prints a
    string or a rich table. nsys and ncu run where they are installed and the device is a GPU; their command lines are
    said in any case. Returns the rows of ops, empty without the torch tool. ValueError for an unknown recipe or tool.
    """
    out = Path(out)
    if unknown := set(tools) - set(TOOLS):
        raise ValueError(f"tools: expected of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    rows = []
    if "torch" in tools:
        out.mkdir(parents=True, exist_ok=True)
        rows = _with_torch(*_build(recipe, settings, vocab_size, device), out, steps, say)
    else:
        find_step(recipe, settings, vocab_size)
    arguments = [recipe, "--out", str(out), "--device", device, "--steps", str(steps), "--vocab", str(vocab_size)]
    if settings:
        arguments += ["--set", *settings]
    for tool in tools:
        if tool != "torch":
            out.mkdir(parents=True, exist_ok=True)
            _with_nsight(tool, command(tool, out, arguments), device, say)
    return rows


def inside(recipe: str, *, device: str, steps: int, settings: Sequence[str] = (), vocab_size: int = 30522) -> None:
    """The steps for nsys and ncu: NVTX ranges, between cudaProfilerStart and cudaProfilerStop."""
    model, step = _build(recipe, settings, vocab_size, device)
    for number in range(_WARMUP):
        step(number)
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx(), named_ranges(model):
        _run(step, steps)
        torch.cuda.synchronize()


@contextmanager
def named_ranges(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every module of `model` runs in a range of its name, and in backward the members of its lists do."""
    open_ranges: list[record_function] = []

    def enter(name):
        def hook(*_):
            open_ranges.append(record_function(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_):
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    with ExitStack() as handles:
        for name, module in model.named_modules():
            if not name:
                continue
            handles.callback(module.register_forward_pre_hook(enter(name)).remove)
            handles.callback(module.register_forward_hook(leave, always_call=True).remove)
            # Their outputs have a gradient as a whole, and so has what they are given; what a norm or a Linear takes
            # shows in the ops.
            if name.rpartition(".")[2].isdigit():
                handles.callback(module.register_full_backward_pre_hook(enter(f"{name} backward")).remove)
                handles.callback(module.register_full_backward_hook(leave).remove)
        yield


def _build(recipe, settings, vocab_size, device):
    """(model, step)."""
    made, inputs = find_step(recipe, settings, vocab_size, device)
    device = torch.device(device)
    model = inputs.model.to(device)
    batches = [tuple(x.to(device) for x in batch) for batch in inputs.batches]
    return model, fastlm_step(model, made.train, batches)[1]


def _run(step, steps: int) -> None:
    for number in range(steps):
        with record_function(f"step {number}"):
            step(number)


def _with_torch(model, step, out: Path, steps: int, say) -> list[Row]:
    from torch.profiler import ProfilerActivity

    gpu = next(model.parameters()).is_cuda
    for number in range(_WARMUP):
        step(number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler, named_ranges(model):
        _run(step, steps)
        if gpu:
            torch.cuda.synchronize()
    with atomic_file(out / TRACE, what="the trace") as partial:
        profiler.export_chrome_trace(str(partial))
        if not partial.read_bytes().rstrip().endswith(b"}"):  # the profiler says nothing of a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))
    names = {name for name, _ in model.named_modules() if name}
    names |= {f"{name} backward" for name in names}
    ops, modules, kernels = [], [], []
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if event.key.startswith(("step ", "Optimizer.", "ProfilerStep")) or (on_device and event.key in names):
            continue  # a range as the device saw it, idle time and all, is the host's once more
        own, total = (
            (event.self_device_time_total, event.device_time_total)
            if gpu
            else (event.self_cpu_time_total, event.cpu_time_total)
        )
        row = Row(event.key, event.count / steps, own / 1e3 / steps, total / 1e3 / steps)
        (kernels if on_device else modules if event.key in names else ops).append(row)
    ops.sort(key=lambda row: -row.self_ms)
    modules.sort(key=lambda row: -row.total_ms)
    kernels.sort(key=lambda row: -row.self_ms)
    files = {OPS: ops, MODULES: modules, **({KERNELS: kernels} if gpu else {})}
    for name, rows in files.items():
        _write_csv(out / name, rows)
    whole = sum(row.self_ms for row in ops)
    where = "GPU" if gpu else "host"
    say(_table(f"{where} time by op, {whole:.1f} ms a step", ops, "self_ms", whole))
    if gpu:
        say(_table("GPU time by kernel", kernels, "self_ms", sum(row.self_ms for row in kernels)))
    layers = [row for row in modules if row.name.removesuffix(" backward").count(".") < 2]
    say(_table(f"{where} time by module, what it calls included", layers, "total_ms", whole))
    say(f"{out}/: {TRACE} (for chrome://tracing or ui.perfetto.dev), {', '.join(files)}")
    return ops


def _write_csv(path: Path, rows: list[Row]) -> None:
    with atomic_file(path, what="the table") as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "calls", "self_ms", "total_ms"])
        writer.writerows([r.name, f"{r.calls:g}", f"{r.self_ms:.4f}", f"{r.total_ms:.4f}"] for r in rows)


def _table(title: str, rows: list[Row], by: str, whole: float, most: int = 20) -> Table:
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    out.add_column("name", no_wrap=True, max_width=46)
    for column in ("calls", "ms", "share"):
        out.add_column(column, justify="right", no_wrap=True, min_width=8)
    for row in rows[:most]:
        ms = getattr(row, by)
        out.add_row(row.name, f"{row.calls:g}", f"{ms:.2f}", f"{ms / whole:.1%}" if whole else "")
    return out


def _with_nsight(tool: str, line: list[str], device: str, say) -> None:
    say(f"\n{tool}: {shlex.join(line)}")
    if torch.device(device).type != "cuda":
        say(f"  not run: the device is {device}, and {tool} sees a GPU's kernels")
    elif shutil.which(tool) is None:
        say(f"  not run: {tool} is not installed; it comes with NVIDIA's CUDA toolkit")
    else:
        done = subprocess.run(line)
        say(f"  exit status {done.returncode}")
