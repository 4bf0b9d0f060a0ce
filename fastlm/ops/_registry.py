"""Dispatch: defines the torch ops, makes them differentiable, and chooses the backend that runs a call.

A *page*, fastlm/ops/<page>.py, defines one public op, or several (layer_norm and rms_norm share a page).

A *raw op*, torch.ops.fastlm.<name>, is what torch sees: a forward or a backward. A NamedTuple holds its arguments
(fastlm/ops/_args.py). The raw op takes the fields one by one, then the name of a backend with kernels ("cpu",
"triton", "cuda").

A *column*, the package fastlm/ops/_<backend>/, holds a backend's adapters. Its module <page>.py has a function for each
raw op of the page, with the raw op's name; the function takes the NamedTuple and runs the kernel. The backend has the
ops of a page if this file exists. The file is imported when `choose` or a raw op first asks for it.

A page declares its ops, when it is imported:
    page(__name__, "op", ...)               its public ops, their order of backends and their autocast rule
    define("name", Args, empty)             a raw op: schema, fake and implementations
    differentiable("name", save, backward)  the gradient of a raw op

Its public function checks the arguments, and then runs:
    choose("op", backend, x, ...)           the backend that runs the call; a ValueError with the reason if none can
    call("name", Args(...), backend)        the raw op
A backend in plain differentiable torch (COMPOSITE: "reference", "sdpa") has no raw op. The public function calls it.

In torch's dispatcher, a raw op first passes its Autograd key, where an autograd function saves what backward needs.
It then passes the key of its device, where the fields become the NamedTuple again and the adapter runs. `call` skips
the dispatcher if nothing else has to see the call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch
from torch.autograd import forward_ad

from fastlm import _native
from fastlm.ops import _autocast
from fastlm.ops._args import Layout, layout, returns
from fastlm.ops._autocast import device_type
from fastlm.ops._preferences import Preference, describes, measured_first

# Device -> backends, in the order in which "auto" tries those that the op has. A page may give another order. The order
# on cuda is a guess: Triton and CUDA C++ both ran on an H100 but were not timed beside each other.
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

_FLOATS = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "flash_attn": (torch.bfloat16, torch.float16),
    "apex": (torch.float32, torch.bfloat16, torch.float16),
}
# Backends that are plain differentiable torch functions. They have no raw op.
COMPOSITE = ("reference", "sdpa", "flash_attn", "apex")

# Backend that is another library -> the module that it needs, and what is said where that is missing.
_LIBRARIES = {
    "flash_attn": ("flash_attn", "flash_attn is not installed"),
    "apex": (
        "fused_layer_norm_cuda",
        "NVIDIA's apex is not installed with its CUDA extensions (the package index has another apex)",
    ),
}

_HERE = Path(__file__).parent
# Backend -> the pages that have a file in its column.
_COLUMNS = {
    column.name[1:]: {module.name for module in pkgutil.iter_modules([str(_HERE / column.name)])}
    for column in pkgutil.iter_modules([str(_HERE)])
    if column.ispkg and column.name.startswith("_")
}
# Backend -> its column's package. Its modules are imported at first use.
_PACKAGES = {backend: importlib.import_module(f"fastlm.ops._{backend}") for backend in _COLUMNS}

_library = torch.library.Library("fastlm", "DEF")  # lives as long as the process


class _Page(NamedTuple):
    name: str
    auto: Mapping[str, tuple[str, ...]]
    backends: tuple[str, ...]
    prefer: tuple[Preference, ...]


class _Raw:
    """A raw op: the layout of its arguments, and its implementations, which are found at first use."""

    def __init__(self, name: str, page: str, arguments: Layout):
        self.name, self.page, self.arguments = name, page, arguments
        self.implementations: dict[str, Callable] = {}
        self.function: type[torch.autograd.Function] | None = None  # set by `differentiable`
        self.flatten, self.tensors = arguments.flatten, arguments.tensors  # `call` reads them at every call

    def implementation(self, backend: str) -> Callable | None:
        """The adapter of a backend, a function of the arguments' NamedTuple; None where there is none."""
        found = self.implementations.get(backend)
        if found is None and backend not in COMPOSITE and self.page in _COLUMNS.get(backend, ()):
            found = getattr(column(self.page, backend), self.name)
            found = self.implementations[backend] = _on_its_device(found) if backend == "triton" else found
        return found


_pages: dict[str, _Page] = {}  # by op
_raw: dict[str, _Raw] = {}


def page(
    module: str,
    *ops: str,
    auto: Mapping[str, tuple[str, ...]] | None = None,
    prefer: tuple[Preference, ...] = (),
    autocast=None,
) -> None:
    """Declares the public ops of the page `module`.

    auto: device -> backends in the order that "auto" tries them. A device that is left out has the order of AUTO.
    prefer: what "auto" runs before that order, for some inputs.
    autocast: device -> the dtype to which autocast casts the inputs, "float32" or "low"; see fastlm.ops._autocast.
    """
    name = module.rpartition(".")[2]
    having = ("reference", *(backend for backend, pages in _COLUMNS.items() if name in pages))
    order = {
        device: tuple(backend for backend in backends if backend in having)
        for device, backends in {**AUTO, **(auto or {})}.items()
    }
    for op in ops:
        _pages[op] = _Page(name, order, tuple(sorted(having)), measured_first(prefer))
        if autocast:
            _autocast.POLICY[op] = autocast


def ops() -> tuple[str, ...]:
    """The names of all public ops."""
    return tuple(_pages)


def auto(op: str, device: str) -> tuple[str, ...]:
    """The backends that "auto" tries for `op` on `device`, in order."""
    return _pages[op].auto.get(device, ("reference",))


def preferences(op: str, device: str) -> list[Preference]:
    """What "auto" runs on `device` before that order, for some inputs."""
    return [preference for preference in _pages[op].prefer if preference.device == device]


def kernel(op: str, backend: str, x: torch.Tensor, **features) -> str:
    """Which of its kernels `backend` runs for x, by the same table; "": its usual one."""
    device = device_type(x)
    for entry in _pages[op].prefer:
        if entry.device == device and entry.backend == backend and describes(entry, x, features):
            return entry.kernel
    return ""


def backends(op: str) -> tuple[str, ...]:
    """The names of the backends that `op` has, whether or not they can run here."""
    return _pages[op].backends


def column(page: str, backend: str):
    """The module with a backend's adapters for a page."""
    _load(page, backend)
    return getattr(_PACKAGES[backend], page)


def _load(page: str, backend: str) -> None:
    """Imports a module of a column. It is then an attribute of the column's package."""
    module = importlib.import_module(f"fastlm.ops._{backend}.{page}")
    if not hasattr(module, "limit"):
        module.limit = None  # a lookup that fails takes 0.6 µs


_load._dynamo_marked_constant = True  # torch.compile cannot trace an import of a computed name


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
    if backend in _LIBRARIES:
        module, missing = _LIBRARIES[backend]
        if not _installed(module):
            return missing
        return None if device == "cuda" else f"it runs on cuda, the input is on {device}"
    return None


# torch.compile takes the answer as a constant, since it cannot trace a search of sys.path or C++.
# torch.compiler.assume_constant_result sets the same attribute, but it imports the compiler, which takes a second.
_missing._dynamo_marked_constant = True


@functools.cache  # a search of sys.path takes 36 µs, and `auto` asks at every call
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _triton_takes_cpu() -> bool:
    """Whether Triton interprets its kernels, or has a driver that runs them over CPU tensors."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    module = sys.modules.get("triton.runtime.driver")  # without an import of triton there is no driver
    active = module and module.driver._active
    return bool(active) and active.get_active_torch_device().type == "cpu"


def _limit(op: str, backend: str) -> Callable | None:
    """The backend's function f(x, **features) -> reason it cannot run, or None; None for a backend without limits."""
    if backend in COMPOSITE and backend not in _COLUMNS:
        return None
    page = _pages[op].name
    if torch.compiler.is_compiling():  # Dynamo may trace this twice: the first import must not change what it sees
        return column(page, backend).limit
    found = getattr(_PACKAGES[backend], page, None)  # at every call with "auto": no import, no call of ours
    if found is None or not hasattr(found, "limit"):  # not loaded, or imported by another module of the column
        found = column(page, backend)
    return found.limit


def reason(op: str, backend: str, device: str, dtype: torch.dtype | None, x=None, **features) -> str | None:
    """Why `backend` cannot run `op` on `device` with `dtype` (None: any), or None if it can."""
    if backend not in _pages[op].backends:
        return f"{op} has no such backend; it has {', '.join(backends(op))}"
    missing = _missing(backend, device)
    if missing:
        return missing
    if dtype is not None and dtype.is_floating_point and dtype not in _FLOATS.get(backend, (dtype,)):
        return f"it takes {', '.join(str(d) for d in _FLOATS[backend])}, not {dtype}"
    if x is None:
        return None
    check = _limit(op, backend)
    return check(x, **features) if check else None


def choose(op: str, backend: str, x: torch.Tensor, **features) -> str:
    """The backend that runs `op` on x: the one named, or for "auto" a preferred one, or the first in its order that
    can."""
    device = device_type(x)
    if backend == "auto":
        for preference in _pages[op].prefer:
            name = preference.backend
            wanted = preference.displaces and preference.device == device and describes(preference, x, features)
            if wanted and reason(op, name, device, x.dtype, x, **features) is None:
                return name
        for candidate in auto(op, device):
            if reason(op, candidate, device, x.dtype, x, **features) is None:
                return candidate
        return "reference"
    why = reason(op, backend, device, x.dtype, x, **features)
    if why is not None:
        raise ValueError(f'backend="{backend}" cannot run {op} here: {why}. Use backend="auto" to let fastlm choose.')
    return backend


def define(name: str, arguments: type, empty: Callable, *, writes: tuple[str, ...] = ()) -> None:
    """Defines the raw op fastlm::<name>. It belongs to the page whose module defines `empty`.

    arguments: a NamedTuple type, whose fields become the op's arguments (fastlm/ops/_args.py).
    empty(args) returns the outputs uninitialised. Its return annotation becomes the op's return type, and the function
        is the op's fake implementation. An adapter calls it for tensors to fill.
    writes: the names of the tensors that the op writes to. Every call raises their version, so that autograd notices.
    """
    raw = _raw[name] = _Raw(name, empty.__module__.rpartition(".")[2], layout(arguments))
    schema = f"{name}({raw.arguments.schema(writes)}, str backend) -> {returns(empty)}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    unflatten = raw.arguments.unflatten

    def run_fake(*args):
        refuse_onnx()
        return empty(unflatten(args[:-1]))

    def run(*args):
        implementation = raw.implementation(args[-1])
        if implementation is None:
            names = sorted(backend for backend, pages in _COLUMNS.items() if raw.page in pages)
            raise ValueError(f"fastlm::{name}: backend is one of {names}, got {args[-1]!r}")
        return implementation(unflatten(args[:-1]))

    torch.library.register_fake(f"fastlm::{name}", run_fake, lib=_library)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)

    op = getattr(torch.ops.fastlm, name).default
    written = [i for i, field in enumerate(raw.arguments.fields) if field.name in writes]

    def raise_versions(keyset, *args):
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    if written:
        _library.impl(name, raise_versions, "ADInplaceOrView", with_keyset=True)


def refuse_onnx() -> None:
    """ValueError in torch.onnx.export, whose own error names an op and no remedy. Called where a graph is traced."""
    onnx = sys.modules.get("torch.onnx")  # nothing is exported if torch has not imported it
    if onnx is not None and not torch.compiler.is_dynamo_compiling() and onnx.is_in_onnx_export():
        raise ValueError(
            "torch.onnx.export: expected a model without fastlm's ops, which ONNX does not know; call "
            "fastlm.unpatch(model) first, and fastlm.patch(model) afterwards"
        )


def _on_its_device(function):
    """`function`, run with the CUDA device of the first argument as the current one, on which Triton launches."""

    def run(args):
        first = args[0]
        while isinstance(first, tuple):  # a group of arguments
            first = first[0]
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(args)
        with torch.cuda.device(device):
            return function(args)

    return run


def _refuse_tangents(name: str, args) -> None:
    """Raises in forward-mode AD, where an op without a tangent would silently give a derivative of 0."""
    for a in args:
        if isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            raise NotImplementedError(
                f'fastlm::{name} has no forward-mode derivative (jvp). Use reverse mode, or backend="reference".'
            )


def _refuse_second_derivative(name: str) -> None:
    """Raises where a backward is asked for a graph of itself (create_graph=True).

    The gradients do not depend on the inputs by any graph, so a Hessian-vector product or a gradient penalty through
    them would silently be 0. torch's once_differentiable raises only if a gradient of the outputs requires a gradient.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"fastlm::{name} has no second derivative (double backward), and backward was called with "
            'create_graph=True. Use create_graph=False, or backend="reference".'
        )


def differentiable(name: str, save: Callable, backward: Callable, *, constant: tuple[str, ...] = ()) -> None:
    """Registers the gradient of the raw op `name`, at torch's Autograd key.

    save(args, outputs) returns what backward needs, a NamedTuple of the type in its return annotation. `args` is the
        NamedTuple of the op's arguments.
    backward(saved, needs, backend, *grads) returns {argument: gradient}. An argument that is left out has no gradient.
        `needs` has the type of `args`, with a bool in each field: whether that gradient is needed. `grads` are the
        gradients of the outputs; one may be None.
    constant: the names of the outputs through which no gradient flows.
    Double backward and forward mode raise an error.
    """
    raw, op = _raw[name], getattr(torch.ops.fastlm, name).default
    arguments, below = raw.arguments, torch._C._after_autograd_keyset
    names = tuple(field.name for field in arguments.fields)
    output_names = [r.name for r in op._schema.returns]
    constants = [output_names.index(output) for output in constant]
    saved = layout(get_type_hints(save)["return"])
    split, merge = saved.split, saved.merge

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, backend, args, *flat):
            ctx.set_materialize_grads(False)
            outputs = run(args)
            tensors, ctx.others = split(save(args, outputs))
            ctx.save_for_backward(*tensors)
            ctx.backend = backend
            if constants:
                ctx.mark_non_differentiable(*(outputs[i] for i in constants))
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            _refuse_second_derivative(name)
            needs = arguments.unflatten(ctx.needs_input_grad[3:])
            gradients = backward(merge(ctx.saved_tensors, ctx.others), needs, ctx.backend, *grads)
            return None, None, None, *map(gradients.get, names)

    Function.__name__ = Function.__qualname__ = name  # the name that a profile and a graph show
    raw.function = Function

    def run(keyset, *flat):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, flat)
        backend = flat[-1]

        def redispatch(args):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & below, *arguments.flatten(args), backend)

        if torch.is_grad_enabled():
            for a in flat:  # a generator for any() takes as long as a small kernel
                if isinstance(a, torch.Tensor) and a.requires_grad:
                    if torch._C._are_functorch_transforms_active():
                        raise NotImplementedError(
                            f"fastlm::{name} cannot be differentiated by torch.func (grad, vjp, jacrev, vmap). Use "
                            'torch.autograd, or backend="reference".'
                        )
                    return Function.apply(redispatch, backend, arguments.unflatten(flat[:-1]), *flat[:-1])
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *flat)

    _library.impl(name, run, "Autograd", with_keyset=True)


# ---- the shortest way to an implementation

_KEYS = torch._C.DispatchKey
# The keys that a thread adds to each dispatch if no mode, transform or trace is active; the second in inference mode.
_NO_MODE = torch._C.DispatchKeySet(_KEYS.BackendSelect)
_NO_MODE = {(_NO_MODE | torch._C.DispatchKeySet(_KEYS.ADInplaceOrView)).raw_repr(), _NO_MODE.raw_repr()}
_PLAIN_KEYS = {"CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"}
# Kept as names of this module: a lookup through torch's modules at each call would take twice as long.
_included, _keys_of = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys
_function_mode, _profiled = torch._C._is_torch_function_mode_enabled, torch.autograd._profiler_enabled
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


@functools.cache
def _is_plain(keys: int) -> bool:
    """Whether a tensor with these dispatch keys is a plain dense tensor on a CPU or a CUDA device."""
    text = str(torch._C.DispatchKeySet.from_raw_repr(keys))  # "DispatchKeySet(CPU, AutogradCPU)"
    return set(text[text.index("(") + 1 : -1].split(", ")) <= _PLAIN_KEYS


def _dispatch(name: str, args, backend: str):
    return getattr(torch.ops.fastlm, name)(*_raw[name].arguments.flatten(args), backend)


def call(name: str, args: tuple, backend: str):
    """Runs the raw op torch.ops.fastlm.<name> with a NamedTuple of its arguments. It must write to none of them.

    The dispatcher would call Python twice, once for autograd and once for the device. `call` runs the adapter directly
    if nothing else has to see the call: no compiler, mode, transform, tensor subclass or profiler. If a gradient is
    needed, the adapter runs inside the same autograd function as in the dispatcher.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return _dispatch(name, args, backend)
    raw = _raw[name]
    implementation = raw.implementations.get(backend) or raw.implementation(backend)
    if implementation is None or _included().raw_repr() not in _NO_MODE or _function_mode() or _profiled():
        return _dispatch(name, args, backend)
    grad, differentiates, flat = torch.is_grad_enabled(), False, raw.flatten(args)
    for i in raw.tensors:
        a = flat[i]
        if a is None:
            continue
        kind = type(a)
        if (kind is not _Tensor and kind is not _Parameter) or not _is_plain(_keys_of(a).raw_repr()):
            return _dispatch(name, args, backend)
        differentiates = differentiates or (grad and a.requires_grad)
    if not differentiates:
        return implementation(args)
    if raw.function is None:
        return _dispatch(name, args, backend)
    return raw.function.apply(implementation, backend, args, *flat)
