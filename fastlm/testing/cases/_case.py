"""OpCase: one description of an op, in the file of its name beside this one.

It says how inputs are made, and has odd small shapes for tests, real shapes for benchmarks, bytes and flops. The same
object drives tests/test_ops.py (forward, gradient, empty and non-contiguous inputs, dtypes, determinism, opcheck,
torch.compile, CUDA graphs) and benchmarks/bench_ops.py. A new op adds no test plumbing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Inputs = dict[str, object]


@dataclass(frozen=True)
class Variant:
    """One shape of an op, with the options of the call (keyword arguments that are not tensors).

    float32: names of inputs that stay float32 whatever the dtype (parameters of a bfloat16 model, say).
    inference: the call refuses inputs that require a gradient, so none does.
    """

    shape: dict[str, int]
    options: dict[str, object] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    inference: bool = False

    def words(self) -> set[str]:
        """Names of its dimensions and options, their values where those are words, and what stays float32.

        "inference" alone of a variant without a backward, which stands for no other's.
        """
        if self.inference:
            return {"inference"}
        named = {**self.shape, **self.options}
        return {*named, *(f"{k}={v}" for k, v in named.items() if isinstance(v, str)), *self.float32}

    def __str__(self) -> str:
        words = [f"{k}{v}" for k, v in self.shape.items()]
        words += [k if v is True else f"{k}={v}" for k, v in self.options.items()]
        return "-".join(words) + ("-params32" if self.float32 else "")


@dataclass(frozen=True)
class OpCase:
    """An op, described once.

    function(**inputs, **options, backend=...) and reference(**inputs, **options) return a tensor or a tuple of them:
    floating-point ones are held to the error bound, integer and boolean ones must be equal.
    make(generator, **shape) returns the inputs; floating-point tensors in float64, cast by `inputs` below.
    bytes(shape, options, itemsize, backward) counts what must be read and written at least once;
    flops likewise, 0 for an op bound by memory.
    benchmarks are for a CPU, benchmarks_cuda for a GPU, which the others would leave half idle.
    """

    op: str
    function: Callable
    reference: Callable
    make: Callable[..., Inputs]
    gradients: tuple[str, ...]
    tests: tuple[Variant, ...]
    benchmarks: tuple[Variant, ...]
    bytes: Callable[[dict, dict, int, bool], int]
    flops: Callable[[dict, dict, bool], int] = lambda shape, options, backward: 0
    benchmarks_cuda: tuple[Variant, ...] = ()
    # Compiled ahead of time for every architecture, in bfloat16: widths and options of real models, in rows so few that
    # making them costs nothing. 16 rows, since Triton compiles for what 16 divides and for what it does not.
    production: tuple[Variant, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    # Arguments that the op takes, and changes to them that it refuses: each with how the ValueError begins.
    accepted: dict[str, object] = field(default_factory=dict)
    refused: tuple[tuple[dict[str, object], str], ...] = ()
    gradcheck: tuple[Variant, ...] = ()  # small ones, for the reference in float64
    backends: tuple[str, ...] = ("cpu", "triton", "cuda", "reference")  # held to the bound where they can run
    thread_invariant: bool = True  # the bits do not depend on the number of threads (a BLAS does not promise that)

    def kinds(self) -> list[Variant]:
        """The first of `tests`, and few more that between them have every option, input and word of all.

        For tests that are too slow to run on each variant every day. Greedy: the most that is new; of equals the last,
        since the empty ones come early.
        """
        words = [variant.words() for variant in self.tests]
        chosen, missing = [0], set().union(*words) - words[0]
        while missing:
            best = max(range(len(words)), key=lambda i: (len(words[i] & missing), i))
            chosen.append(best)
            missing -= words[best]
        return [self.tests[i] for i in sorted(chosen)]

    def inputs(
        self, variant: Variant, seed: int, dtype: torch.dtype, device: str = "cpu", *, draw_on: str = "cpu"
    ) -> Inputs:
        """Inputs in `dtype`, requiring gradients where the op has them.

        draw_on: the device whose generator draws them; a CPU's draws the same for every device, and slowly.
        """
        with torch.device(draw_on):
            made = self.make(torch.Generator(draw_on).manual_seed(seed), **variant.shape)
        out = {}
        for name, value in made.items():
            if isinstance(value, torch.Tensor):
                if value.dtype == torch.float64:
                    value = value.to(torch.float32 if name in variant.float32 else dtype)
                value = value.to(device).requires_grad_(name in self.gradients and not variant.inference)
            out[name] = value
        return out

    @property
    def gradient_in_forward(self) -> bool:
        """Whether the forward also computes the gradient: `bytes` and `flops` leave nothing to the backward."""
        shape, options = self.benchmarks[0].shape, self.benchmarks[0].options
        return bool(self.gradients) and not (self.bytes(shape, options, 4, True) or self.flops(shape, options, True))

    def exact(self, inputs: Inputs) -> Inputs:
        """The same inputs, as rounded, in float64."""
        return {
            name: value.detach().double().requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor) and value.dtype.is_floating_point
            else value
            for name, value in inputs.items()
        }

    def run(self, function: Callable, variant: Variant, inputs: Inputs, **extra) -> tuple[torch.Tensor, ...]:
        """The outputs, always a tuple."""
        out = function(**inputs, **variant.options, **extra)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    def run_backward(self, inputs: Inputs, outputs, seed: int) -> dict[str, torch.Tensor]:
        """Gradients of Σ <output, fixed random cotangent>, by input name; an input that is not used has none."""
        outputs = [out for out in outputs if out.requires_grad]
        given = {name: inputs[name] for name in self.gradients if inputs.get(name) is not None}
        wanted = {name: value for name, value in given.items() if value.requires_grad}
        if not wanted:
            return {}
        generator = torch.Generator().manual_seed(seed)
        # Rounded to bfloat16 first, so that every dtype is given the same cotangent.
        cotangents = [
            torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype) for out in outputs
        ]
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
        return {name: grad for name, grad in zip(wanted, grads) if grad is not None}

    def everything(
        self, function: Callable, variant: Variant, inputs: Inputs, seed: int, **extra
    ) -> dict[str, torch.Tensor]:
        """Outputs, "output 0" and on, and gradients, "d x" for input x, of `run` and `run_backward`."""
        outputs = self.run(function, variant, inputs, **extra)
        grads = self.run_backward(inputs, outputs, seed)
        named = {f"output {i}": out for i, out in enumerate(outputs) if isinstance(out, torch.Tensor)}
        return {**named, **{f"d {name}": grad for name, grad in grads.items()}}


def draw_rng(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator)
