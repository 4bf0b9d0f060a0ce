"""The only dispatch code: schemas, one autograd path, and which backend runs an op.

An op `fastlm::name` takes its backend as its last argument, a resolved name ("cpu", "triton", "cuda").
`backend="auto"` and the backends written in plain torch ("reference", "sdpa", ...) are decided before, by `choose`.

    choose(op, backend, x, ...)      in the public function: a name that can run, or a ValueError with the reason
    call(name, *args)                calls a raw op: past the dispatcher where nothing there would do anything
    define(schema, fake)             schema and shapes of a raw op, below autograd
    implement(name, backend)         decorator: one backend's implementation of a raw op
    differentiable(name, ...)        one Autograd-key function that redispatches below autograd
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastlm import _native
from fastlm.ops._autocast import device_type

# Device -> backends in the order `auto` tries them. Order by measurement; the measurement is in LOG.md.
AUTO: dict[str, dict[str, tuple[str, ...]]] = {
    op: {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
    for op in ("layer_norm", "rms_norm", "cross_entropy", "linear_cross_entropy", "mlm_mask")
}
AUTO |= {op: {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")} for op in ("gelu", "embedding", "dropout")}
# The order on cuda is a guess still: both ran on an H100, and were not timed beside each other.
AUTO["attention"] = {"cpu": ("cpu", "sdpa", "reference"), "cuda": ("triton", "cuda", "sdpa", "reference")}

_FLOATS = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# Backends that are plain differentiable torch functions: no raw op behind them.
COMPOSITE = ("reference", "sdpa", "flash_attn", "apex")

_library = torch.library.Library("fastlm", "DEF")  # lives as long as the process
_implementations: dict[tuple[str, str], object] = {}
_tensors: dict[str, tuple[int, ...]] = {}  # the arguments of a raw op that may be tensors
_functions: dict[str, type[torch.autograd.Function]] = {}  # of the raw ops that are differentiable
_backends: dict[str, set[str]] = {op: {"reference"} for op in AUTO}
_limits: dict[tuple[str, str], object] = {}


def limit(op: str, backend: str):
    """Decorator for f(x, **features) -> reason or None: what this backend of this op cannot do."""
    _backends[op].add(backend)

    def register(function):
        _limits[op, backend] = function
        return function

    return register


def offer(op: str, *backends: str) -> None:
    """Says that `op` has these backends, with no limit beyond device and dtype."""
    _backends[op].update(backends)


def backends(op: str) -> tuple[str, ...]:
    """The names of the backends that `op` has, whether or not they can run here."""
    return tuple(sorted(_backends[op]))


def _missing(backend: str, device: str) -> str | None:
    if backend == "cpu":
        return _native.missing_cpu() or (None if device == "cpu" else f"it runs on the cpu, the input is on {device}")
    if backend == "cuda":
        if device == "cpu" and _native.cuda_recorder is not None:
            return None
        return _native.missing_cuda() or (None if device == "cuda" else f"it runs on cuda, the input is on {device}")
    if backend == "triton":
        if not _triton_installed():
            return "triton is not installed"
        if device != "cuda" and not _triton_takes_cpu():
            return f"it runs on cuda, the input is on {device}; on the cpu only under TRITON_INTERPRET=1"
    return None


# torch.compile takes the answer as a constant (torch.compiler.assume_constant_result, whose import of the compiler takes
# a second): it looks past functools.cache, and cannot trace a search of sys.path or C++.
_missing._dynamo_marked_constant = True


@functools.cache  # a search of sys.path takes 36 µs, and `auto` asks at every call
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_takes_cpu() -> bool:
    """Whether Triton was told to interpret its kernels, or has a driver that runs them over CPU tensors."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    module = sys.modules.get("triton.runtime.driver")  # a driver can only have been set where triton is imported
    active = module and module.driver._active
    return bool(active) and active.get_active_torch_device().type == "cpu"


def reason(op: str, backend: str, device: str, dtype: torch.dtype | None, x=None, **features) -> str | None:
    """Why `backend` cannot run `op` on `device` with `dtype` (None: any), or None if it can."""
    if backend not in _backends[op]:
        return f"{op} has no such backend; it has {', '.join(backends(op))}"
    missing = _missing(backend, device)
    if missing:
        return missing
    if dtype is not None and dtype.is_floating_point and dtype not in _FLOATS.get(backend, (dtype,)):
        return f"it takes {', '.join(str(d) for d in _FLOATS[backend])}, not {dtype}"
    check = _limits.get((op, backend))
    return check(x, **features) if check and x is not None else None


def choose(op: str, backend: str, x: torch.Tensor, **features) -> str:
    """The backend that runs `op` on x: the one named, or for "auto" the first of AUTO that can."""
    device = device_type(x)
    if backend == "auto":
        for candidate in AUTO[op].get(device, ("reference",)):
            if reason(op, candidate, device, x.dtype, x, **features) is None:
                return candidate
        return "reference"
    why = reason(op, backend, device, x.dtype, x, **features)
    if why is not None:
        raise ValueError(f'backend="{backend}" cannot run {op} here: {why}. Use backend="auto" to let fastlm choose.')
    return backend


def define(schema: str, fake) -> None:
    """Defines fastlm::<schema>: no defaults, the last argument is `str backend`. `fake(*args)` gives empty outputs.

    An argument that the schema marks as written, Tensor(a!), has its version raised at every call.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    arguments = getattr(torch.ops.fastlm, name).default._schema.arguments
    _tensors[name] = tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type))
    torch.library.register_fake(f"fastlm::{name}", fake, lib=_library)

    def run(*args):
        try:
            function = _implementations[name, args[-1]]
        except KeyError:
            names = sorted(backend for op, backend in _implementations if op == name)
            raise ValueError(f"fastlm::{name}: backend is one of {names}, got {args[-1]!r}") from None
        return function(*args[:-1])

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)

    op = getattr(torch.ops.fastlm, name).default
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def raise_versions(keyset, *args):
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    if written:
        _library.impl(name, raise_versions, "ADInplaceOrView", with_keyset=True)


def _on_its_device(function):
    """`function(x, ...)` with x's CUDA device current: Triton launches there, whatever its tensors are on."""

    def run(x, *rest):
        device = x.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(x, *rest)
        with torch.cuda.device(device):
            return function(x, *rest)

    return run


def implement(name: str, backend: str):
    """Decorator: the implementation of fastlm::name for one backend; called with all arguments but the backend.

    The current device is then the first argument's; "cuda" sets it in C++.
    """

    def register(function):
        _implementations[name, backend] = _on_its_device(function) if backend == "triton" else function
        return function

    return register


def _refuse_tangents(name: str, args) -> None:
    """Forward-mode AD: an op that knows no tangent would give a derivative of 0, and say nothing."""
    for a in args:
        if isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            raise NotImplementedError(
                f'fastlm::{name} has no forward-mode derivative (jvp). Use reverse mode, or backend="reference".'
            )


def differentiable(name: str, setup_context, backward) -> None:
    """Registers the Autograd-key function of fastlm::name.

    setup_context(ctx, args, outputs) saves what backward needs; `args` are all of the op's.
    backward(ctx, *grads) returns a gradient, or None, for each argument; a gradient may come as None.
    Double backward and forward mode are refused.
    """
    op = getattr(torch.ops.fastlm, name).default
    below = torch._C._after_autograd_keyset

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, *args):
            ctx.set_materialize_grads(False)
            outputs = run(*args)
            setup_context(ctx, args, outputs)
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            return None, *backward(ctx, *grads)

    Function.__name__ = Function.__qualname__ = name  # the name that a profile and a graph show
    _functions[name] = Function

    def run(keyset, *args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)

        def redispatch(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & below, *args)

        if torch.is_grad_enabled():
            for a in args:  # a generator for any() takes as long as a small kernel
                if isinstance(a, torch.Tensor) and a.requires_grad:
                    return Function.apply(redispatch, *args)
        return redispatch(*args)

    _library.impl(name, run, "Autograd", with_keyset=True)


# ---- the shortest way to an implementation

_KEYS = torch._C.DispatchKey
# What a thread dispatches by where no mode, transform or trace is active; the second in inference mode.
_NO_MODE = torch._C.DispatchKeySet(_KEYS.BackendSelect)
_NO_MODE = {(_NO_MODE | torch._C.DispatchKeySet(_KEYS.ADInplaceOrView)).raw_repr(), _NO_MODE.raw_repr()}
_PLAIN_KEYS = {"CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"}
# Names of this module: what `call` asks costs it half as much as going through torch's modules each time.
_included, _keys_of = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys
_function_mode, _profiled = torch._C._is_torch_function_mode_enabled, torch.autograd._profiler_enabled
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


@functools.cache
def _is_plain(keys: int) -> bool:
    """Whether a tensor with these dispatch keys is a dense one on a CPU or a CUDA device, and nothing else."""
    text = str(torch._C.DispatchKeySet.from_raw_repr(keys))  # "DispatchKeySet(CPU, AutogradCPU)"
    return set(text[text.index("(") + 1 : -1].split(", ")) <= _PLAIN_KEYS


def call(name: str, *args):
    """torch.ops.fastlm.<name>(*args), for an op that writes to none of its arguments.

    The dispatcher comes twice to the same Python, once for autograd and once for the device. Where nobody else is to
    see the call (a compiler, a mode, a transform, a tensor subclass, a profiler), the implementation is called at once,
    within the same autograd function where there is something to differentiate.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return getattr(torch.ops.fastlm, name)(*args)
    implementation = _implementations.get((name, args[-1]))
    if implementation is None or _included().raw_repr() not in _NO_MODE or _function_mode() or _profiled():
        return getattr(torch.ops.fastlm, name)(*args)
    grad, differentiates = torch.is_grad_enabled(), False
    for i in _tensors[name]:
        a = args[i]
        if a is None:
            continue
        kind = type(a)
        if (kind is not _Tensor and kind is not _Parameter) or not _is_plain(_keys_of(a).raw_repr()):
            return getattr(torch.ops.fastlm, name)(*args)
        differentiates = differentiates or (grad and a.requires_grad)
    if not differentiates:
        return implementation(*args[:-1])
    if name not in _functions:
        return getattr(torch.ops.fastlm, name)(*args)
    return _functions[name].apply(lambda *args: implementation(*args[:-1]), *args)
