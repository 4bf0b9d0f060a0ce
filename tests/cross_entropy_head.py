"""A small head, and its gradient by torch: what test_cross_entropy*.py share."""

import torch
import torch.nn.functional as F

ROWS, VOCABULARY, FEATURES = 6, 37, 5


def make_head(generator):
    """hidden, weight (a leaf), target with one ignored row."""
    hidden = torch.randn(ROWS, FEATURES, generator=generator)
    weight = torch.randn(VOCABULARY, FEATURES, generator=generator).requires_grad_()
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    target[1], target[4] = -100, VOCABULARY - 1
    return hidden, weight, target


def eager_gradient(hidden, weight, target, **options):
    return torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), target, **options), weight)[0]
