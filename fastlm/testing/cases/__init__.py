"""The OpCase of every op. `_case.py` defines OpCase; every other file here holds the cases of one op or a few.

CASES is discovered: each module's OpCase objects, modules by name and cases in the order of their definition. A new
op's file needs no entry in a list.
"""

import importlib
import pkgutil
from collections.abc import Iterable

from fastlm.testing.cases._case import OpCase, Variant


def discover(package: str, path: Iterable[str]) -> dict[str, OpCase]:
    """{op: case} of the modules in `path`, the directories of `package`."""
    found: dict[str, OpCase] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(path)):
        module = importlib.import_module(f"{package}.{name}")
        for case in vars(module).values():
            if isinstance(case, OpCase) and found.setdefault(case.op, case) is not case:
                raise ValueError(f"{module.__name__}: expected one OpCase per op, got another one of {case.op!r}")
    return found


CASES: dict[str, OpCase] = discover(__name__, __path__)

__all__ = ["CASES", "OpCase", "Variant"]
