"""The report of `fastlm info`: versions, the machine, each op's backend here, and why other backends cannot run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import fastlm
from fastlm import _malloc, _native, _threads, cpu_rate
from fastlm.chip import auto_dtype
from fastlm.ops import _registry  # importing it imports the ops, which register their backends

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy")
BACKENDS = ("cpu", "triton", "cuda", "sdpa", "flash_attn", "apex", "reference")
# The flags of /proc/cpuinfo that make the levels of FASTLM_CLONES (csrc/cpu/simd.h).
_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def version(package: str) -> str | None:
    """The installed version of a package, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _clone(flags: set[str]) -> str:
    """The level of machine code that the CPU kernels run."""
    if flags >= _V4:
        return "x86-64-v4 (AVX-512)"
    return "x86-64-v3 (AVX2, FMA)" if flags >= _V3 else "portable"


def machine() -> dict[str, object]:
    """The machine and the software, to be stored with a result; JSON types only."""
    name, flags = cpu_rate.cpu_info()
    gpu = torch.cuda.is_available()
    return {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": name,
        "cpu_code": _clone(flags),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": _threads.state(),
        "openmp": [Path(path).name for path in _native.openmp_libraries()],
        "allocator": _malloc.state(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if gpu else [],
        "cuda": torch.version.cuda,
    }


def _auto(op: str, device: str, dtype: torch.dtype) -> str:
    order = _registry.auto(op, device)
    return next((name for name in order if _registry.reason(op, name, device, dtype) is None), "reference")


def _words(entry) -> str:
    """What an entry of a table of "auto" runs, and whether a measurement says so."""
    kernel = f"{entry.backend}'s {entry.kernel} kernel" if entry.kernel else entry.backend
    return kernel if entry.measured else f"{kernel} (predicted, not measured)"


def backends_table(device: str) -> list[str]:
    """One line per op with its backends on `device`, then each reason why a backend cannot run, once."""
    columns = [name for name in BACKENDS if any(name in _registry.backends(op) for op in _registry.ops())]
    reasons: list[str] = []

    def word(op, backend, dtype):
        if backend not in _registry.backends(op):
            return "-"
        why = _registry.reason(op, backend, device, dtype)
        if why is None:
            return "auto" if backend == _auto(op, device, dtype) else "yes"
        if why not in reasons:
            reasons.append(why)
        return f"no ({reasons.index(why) + 1})"

    def cell(op, backend):
        words = [word(op, backend, dtype) for dtype in (torch.float32, torch.bfloat16)]
        return "/".join(dict.fromkeys(words))  # one word where both dtypes have the same

    rows = [(f"on {device}", *columns), *((op, *(cell(op, name) for name in columns)) for op in _registry.ops())]
    lines = [f"{row[0]:<24}" + "".join(f"{word:<14}" for word in row[1:]).rstrip() for row in rows]
    lines += [f"  ({i}) {reason}" for i, reason in enumerate(reasons, 1)]
    for op in _registry.ops():
        for p in _registry.preferences(op, device):
            head = "auto is" if p.displaces else f'backend="{p.backend}" runs'
            lines.append(f"  {op}: {head} {_words(p)} {p.why}")
    return lines


def _units() -> str:
    """What multiplies bfloat16 in the CPU's attention."""
    isa = _native.cpu().isa()
    return f", attention in bfloat16 multiplies on {isa}" if isa.startswith(("amx", "avx512-bf16")) else ""


def _architectures(cuda) -> str:
    """nvcc's "800,900" as "sm_80, sm_90"."""
    return ", ".join(f"sm_{int(code) // 10}" for code in cuda.architectures().split(","))


def _rates() -> str:
    """Measures the CPU's matrix products; a run takes the best that was measured as the peak of MFU."""
    cpu_rate.remember(cpu_rate.measure())
    float32, bfloat16 = rates = cpu_rate.both()
    text = (
        f"float32 {float32.flops / 1e9:,.0f} GFLOP/s, bfloat16 {bfloat16.flops / 1e9:,.0f} GFLOP/s "
        f"({bfloat16.flops / float32.flops:.3g} times as many) in large matrix products"
    )
    if all(rate.steady for rate in rates):
        return text
    busy = max(rate.busy for rate in rates)
    return f"{text}; other work had up to {busy:.0%} of the machine, try again"


def _auto_dtypes(gpu: bool) -> str:
    """What train.dtype = "auto" is here. The CPU's rates are known: `_rates` measures them."""
    found = [f"auto is {auto_dtype(torch.device('cpu'))}"]
    if gpu:
        found.append(f"on cuda {auto_dtype(torch.device('cuda'))}")
    return "; ".join(found)


def report() -> str:
    """The text of `fastlm info`."""
    m = machine()
    missing_cpu, missing_cuda = _native.missing_cpu(), _native.missing_cuda()
    cuda = _native.cuda()
    gpus = [
        f"{d.name}, sm_{d.capability}, {d.multiprocessors} SMs, {d.l2_bytes >> 20} MB L2"
        for d in (cuda.devices() if missing_cuda is None else ())
    ]
    versions = ", ".join(f"{package} {m[package] or 'not installed'}" for package in PACKAGES)
    openmp = _native.openmp_libraries()
    rows = {
        "fastlm": f"{m['fastlm']} in {Path(fastlm.__file__).parent}",
        "versions": f"Python {m['python']}, {versions}",
        "CPU": f"{m['cpu']}, {m['cores']} cores",
        "threads": m["waiting"],
        "CPU's rate": _rates(),
        "train.dtype": _auto_dtypes(bool(m["gpu"])),
        "CPU kernels": missing_cpu or f"built; they run {m['cpu_code']} code here{_units()}",
        "AdamW": "torch's fused one" if missing_cpu else "fastlm's for float32 on the CPU, else torch's fused one",
        "OpenMP": ", ".join(openmp) if openmp else "none mapped",
        "allocator": m["allocator"],
        "CUDA kernels": f"built for {_architectures(cuda)}" if cuda else missing_cuda,
        "CUDA devices": "; ".join(gpus) or missing_cuda,
        "torch's CUDA": f"{m['cuda'] or 'built without'}" + (f", {', '.join(m['gpu'])}" if m["gpu"] else ", no device"),
    }
    lines = [f"{name:<14}{value}" for name, value in rows.items()]
    for device in ["cpu"] + (["cuda"] if m["gpu"] else []):
        lines += ["", *backends_table(device)]
    legend = 'auto: what backend="auto" runs, if shapes and options allow; a/b: float32/bfloat16'
    return "\n".join([*lines, "", legend])
