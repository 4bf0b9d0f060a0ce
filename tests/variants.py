"""What of the OpCases the interpreted GPU kernels run every day, and what under --all alone (the marker long)."""

import itertools

import pytest
import torch

# dtype -> seeds of an error bound, every day and under --all. Most in bfloat16, what one trains in.
SEEDS = {torch.float32: (1, 2), torch.bfloat16: (2, 5), torch.float16: (1, 2)}


def seeds(config, dtype):
    return range(SEEDS[dtype][config.getoption("--all")])


def of_its_kind(case, variant, *dtype):
    return variant in case.kinds()


def sweep(cases, dtypes=None, daily=of_its_kind):
    """Parameters (case, variant), with dtypes (case, variant, dtype); what is not `daily` is marked long."""
    parameters = []
    for case in cases:
        for variant in case.tests:
            for dtype in [()] if dtypes is None else [(dtype,) for dtype in dtypes]:
                name = "-".join([case.op, str(variant), *(str(d).removeprefix("torch.") for d in dtype)])
                marks = () if daily(case, variant, *dtype) else pytest.mark.long
                parameters.append(pytest.param(case, variant, *dtype, id=name, marks=marks))
    return parameters


def on_chips(cases, dtypes):
    """Parameters (case, variant, dtype, chip) of ptx.run: kinds; every day the first in bfloat16, "scattered"."""
    parameters = []
    for case in cases:
        chosen = [] if case.op == "mlm_mask" else case.kinds()  # which computes with integers
        for variant, dtype, chip in itertools.product(chosen, dtypes, ("high", "low", "scattered")):
            if dtype not in case.dtypes:
                continue
            daily = variant is chosen[0] and dtype == torch.bfloat16 and chip == "scattered"
            name = "-".join([case.op, str(variant), str(dtype).removeprefix("torch."), chip])
            parameters.append(
                pytest.param(case, variant, dtype, chip, id=name, marks=() if daily else pytest.mark.long)
            )
    return parameters
