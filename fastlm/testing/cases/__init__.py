"""The OpCase of every op. `_case.py` defines OpCase; every other file here holds the cases of one op or a few.

CASES is discovered: each module's OpCase objects, modules by name and cases in the order of their definition. A new
op's file needs no entry in a list.
"""

import importlib
import pkgutil

from fastlm.testing.cases._case import OpCase, Variant


def _discover() -> dict[str, OpCase]:
    found: dict[str, OpCase] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{name}")
        for case in vars(module).values():
            if isinstance(case, OpCase) and found.setdefault(case.op, case) is not case:
                raise ValueError(f"{module.__name__}: expected one OpCase per op, got another one of {case.op!r}")
    return found


CASES: dict[str, OpCase] = _discover()

__all__ = ["CASES", "OpCase", "Variant"]
