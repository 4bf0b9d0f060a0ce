"""torch's own samples of modules (torch.testing._internal.common_modules) on the modules of fastlm.nn.

    python tests/peers/torch_suite.py [--module REGEX]

It needs the package `expecttest`, which torch's testing code imports. Every sample of a module that fastlm.nn has runs
in float32, float64 and bfloat16, for training and evaluation: torch's module and ours with the same weights and inputs,
outputs and gradients of inputs and parameters. In float64 each sample is torch.testing.assert_close to torch's. In the
other dtypes all samples of a module are judged together, tensor by tensor: the RMS error against float64 is at most
four times that of torch's module, as in the tests of whole models. What differs is printed, and the exit status is 1;
refused samples (a ValueError) are counted, with their reasons.
"""

import argparse
import collections
import copy
import re
import sys
import warnings
from pathlib import Path

import torch
from torch.testing._internal import common_modules

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import fastlm.nn
from fastlm.testing.compare import ModelComparison

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def samples(info, dtype, training):
    """Its generators of random numbers start anew: the same values in every dtype."""
    torch.manual_seed(0)
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def to(value, dtype):
    """A copy as a leaf, floating-point tensors in `dtype`; the tensors that are the same object stay one."""
    memo = {}

    def copied(x):
        if isinstance(x, torch.Tensor):
            if id(x) not in memo:
                y = x.detach().clone().to(dtype if x.is_floating_point() else x.dtype)
                memo[id(x)] = y.requires_grad_(x.requires_grad)
            return memo[id(x)]
        if isinstance(x, (list, tuple)):
            return type(x)(copied(y) for y in x)
        return {key: copied(y) for key, y in x.items()} if isinstance(x, dict) else x

    return copied(value), memo


def run(module, inputs, dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name."""
    module = module.to(dtype)
    module.zero_grad()
    (args, kwargs), leaves = to((inputs.args, inputs.kwargs), dtype)
    outputs = module(*args, **kwargs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    differentiable = [x for x in outputs if x.requires_grad]
    if differentiable:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in differentiable]
        torch.autograd.backward(differentiable, weights)
    named = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    gradients = [x.grad for x in leaves.values() if x.grad is not None]
    named |= {f"gradient of input {i}": x for i, x in enumerate(gradients)}
    return named | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def difference(info, sample, dtype, training, comparison) -> str | None:
    """None where ours is as torch's, as far as one sample says; adds to `comparison`. ValueError where ours refuses."""
    given, inputs = sample.constructor_input, sample.forward_input
    options = {**given.kwargs, "device": "cpu", "dtype": dtype} if made(info) else given.kwargs
    torch.manual_seed(0)
    theirs = info.module_cls(*given.args, **options).train(training)
    ours = getattr(fastlm.nn, info.module_cls.__name__)(*given.args, **options).train(training)
    ours.load_state_dict(theirs.state_dict())
    got = run(ours, inputs, dtype)
    eager, exact = run(copy.deepcopy(theirs), inputs, dtype), run(theirs, inputs, torch.float64)
    if got.keys() != eager.keys():
        return f"expected {', '.join(eager)}, got {', '.join(got)}"
    for name in got:
        x, y, z = got[name], eager[name], exact[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"{name}: expected {y.dtype} {tuple(y.shape)}, got {x.dtype} {tuple(x.shape)}"
        if dtype == torch.float64:
            torch.testing.assert_close(x, z, equal_nan=True)
            continue
        nan = x.isnan() & z.isnan()
        comparison.add(name, *(t.masked_fill(nan, 0) for t in (x, y, z)))
    return None


def made(info) -> bool:
    """Whether the constructor takes device and dtype."""
    return info.module_cls is not torch.nn.CrossEntropyLoss


def main():
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--module", default="", help="a regular expression of the names of modules")
    options = parser.parse_args()
    wrong = 0
    for info in common_modules.module_db:
        name = info.module_cls.__name__
        if name not in fastlm.nn.__all__ or not re.search(options.module, name):
            continue
        counts, reasons = collections.Counter(), collections.Counter()
        for dtype in DTYPES:
            comparison = ModelComparison()
            for training in (True, False):
                for place, sample in enumerate(samples(info, dtype, training)):
                    try:
                        bad = difference(info, sample, dtype, training, comparison)
                    except ValueError as error:
                        reasons[str(error)[:110]] += 1
                        counts["refused"] += 1
                        continue
                    except Exception as error:
                        bad = f"{type(error).__name__}: {str(error)[:200]}"
                    counts["equal" if bad is None else "different"] += 1
                    if bad is not None:
                        mode = "training" if training else "evaluation"
                        print(f"  {name}, sample {place} ({sample.desc}), {dtype}, {mode}: {bad}", flush=True)
            for failure in comparison.failures():
                counts["different"] += 1
                print(f"  {name}, all samples, {dtype}: {failure}", flush=True)
        wrong += counts["different"]
        print(f"{name}: " + ", ".join(f"{key} {counts[key]}" for key in ("equal", "refused", "different")), flush=True)
        for reason, count in reasons.most_common():
            print(f"  refused {count}: {reason}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
