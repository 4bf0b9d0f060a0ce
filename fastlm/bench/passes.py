"""The passes of an op that are timed: the forward with autograd on, and forward with all gradients."""

from __future__ import annotations

from fastlm.testing.cases import CASES

PASSES = ("fwd", "fwd+bwd")


def gradient_in_forward(op: str) -> bool:
    """Whether the op's forward also computes the gradient, as a fused loss does. Then "fwd" compares unlike work."""
    return op in CASES and CASES[op].gradient_in_forward


def label(op: str, which: str) -> str:
    """A pass as tables show it."""
    return f"{which} (with gradient)" if which == "fwd" and gradient_in_forward(op) else which
