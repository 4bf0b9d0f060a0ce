"""A contender of an op: a function over sets of inputs, and whether it computes what eager does."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch

from fastlm.bench.peers import Peer, Unsupported

# RMS difference from eager in float32, relative to its RMS: room for rounding and none for skipped work.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_MEANS = 0.05  # relative difference of the means of random integers


class OpRunner:
    """A function with its options over sets of inputs; every call takes the next set."""

    def __init__(
        self,
        function: Callable,
        sets: list[dict],
        options: dict,
        outputs: int | None = None,
        real=None,
        around: Callable = nullcontext,
    ):
        """`outputs`: how many leading outputs count (all); `real`, `around`: as of peers.Peer."""
        self.function, self.sets, self.options, self.real, self.around = function, sets, options, real, around
        self.count = outputs
        with around():
            first = self.outputs(sets[0])
        self.count = len(first)
        # A loss's cotangent is 1, as in training.
        self.cotangents = [
            (torch.randn_like if out.ndim else torch.ones_like)(out) for out in first if out.requires_grad
        ]
        self.next_set = itertools.cycle(sets).__next__

    @classmethod
    def of(cls, peer: Peer, sets: list[dict], options: dict) -> OpRunner:
        """A peer's, with its own form of the inputs."""
        if peer.adapt is None:
            return cls(peer.function, sets, options, around=peer.around)
        triples = [peer.adapt(inputs, options) for inputs in sets]
        own = [inputs for inputs, _, _ in triples]
        return cls(peer.function, own, triples[0][1], real=triples[0][2], around=peer.around)

    def outputs(self, inputs: dict, **options) -> tuple[torch.Tensor, ...]:
        out = self.function(**inputs, **{**self.options, **options})
        return (tuple(out) if isinstance(out, (tuple, list)) else (out,))[: self.count]

    def gradients(self, inputs, outputs, cotangents) -> dict[str, torch.Tensor | None]:
        leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        outputs = [out for out in outputs if out.requires_grad]
        return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)))

    def run(self, which: str):
        """One pass; what it returns keeps the results alive until the next call."""
        inputs = self.next_set()
        outputs = self.outputs(inputs)
        return outputs if which == "fwd" else self.gradients(inputs, outputs, self.cotangents)

    def results(self, **options) -> dict[str, torch.Tensor | None]:
        """Outputs, and gradients with the outputs themselves as cotangents, by name, in the op's own form.

        None for the gradient of what no output depends on.
        """
        inputs = self.sets[0]
        with self.around():
            outputs = self.outputs(inputs, **options)
            named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
            if self.cotangents:
                cotangents = [out.detach() for out in outputs if out.requires_grad]
                if self.real is not None:
                    cotangents = [c * self.real[..., None, None] for c in cotangents]
                named |= {f"d{name}": grad for name, grad in self.gradients(inputs, outputs, cotangents).items()}
        return {name: x if self.real is None or x is None else x[self.real] for name, x in named.items()}


def disagreement(got: dict, want: dict, bound: float) -> str | None:
    """How `got` differs from eager's results in float32, or None. Random integers are compared by their means.

    Peers with another form of an input (T5's table, where eager takes the bias) skip that gradient's check;
    forward-only peers skip all gradients.
    """
    for name, expected in want.items():
        if name not in got and name.startswith("output"):
            return f"{name} is missing"
        if name not in got or expected is None:
            continue
        if got[name] is None:
            return f"{name} is missing"
        x, y = got[name].double(), expected.double()
        if x.shape != y.shape:
            return f"{name} has shape {tuple(x.shape)}, eager's {tuple(y.shape)}"
        random = not expected.dtype.is_floating_point
        error = (x.mean() - y.mean()).abs() / y.mean().abs() if random else (x - y).norm() / y.norm()
        if not error <= (_MEANS if random else bound):
            return f"{name} is {error:.2g} away from eager's in float32"
    return None


def restore(inputs: dict, kept: dict[str, torch.Tensor]) -> list[str]:
    """Puts back the inputs that a contender has overwritten, and names them."""
    changed = [name for name, value in kept.items() if not torch.equal(inputs[name], value)]
    for name in changed:
        inputs[name].detach().copy_(kept[name])
    return changed


def reason(error: Exception, said: list[warnings.WarningMessage] = ()) -> str:
    """The first line of what went wrong. For SDPA, torch's warnings: why the one kernel that it may take cannot run."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if "No available kernel" in str(error):
        reasons = [str(warning.message).partition(" (Triggered")[0] for warning in said]
        return "; ".join(dict.fromkeys(text for text in reasons if not text.endswith("because:"))) or str(error)
    expected = isinstance(error, (Unsupported, ValueError))
    return (str(error) if expected else f"{type(error).__name__}: {error}").partition("\n")[0]
