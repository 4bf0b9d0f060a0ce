"""fastlm/testing/cases: a new op's file is found without an entry in a list."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from fastlm import ops
from fastlm.ops import _registry
from fastlm.testing import cases
from fastlm.testing.cases import CASES

FILES = sorted(path.stem for path in Path(cases.__file__).parent.glob("[!_]*.py"))


def test_every_op_has_a_case():
    assert CASES.keys() == set(_registry.ops())
    assert all(name == case.op and hasattr(ops, name) for name, case in CASES.items())


def test_the_order_is_that_of_files_and_definitions():
    modules = [importlib.import_module(f"{cases.__name__}.{name}") for name in FILES]
    defined = [value.op for module in modules for value in vars(module).values() if isinstance(value, cases.OpCase)]
    assert list(CASES) == list(dict.fromkeys(defined))


def test_a_new_file_is_found_and_a_second_case_of_an_op_refused(tmp_path, monkeypatch):
    package = tmp_path / "more_cases"
    package.mkdir()
    (package / "__init__.py").touch()
    lines = ["from dataclasses import replace", "from fastlm.testing.cases import CASES"]
    source = "\n".join([*lines, "NEW = replace(CASES['gelu'], op='{}')", ""])
    (package / "zelu.py").write_text(source.format("zelu"))
    (package / "elu.py").write_text(source.format("elu"))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = cases.discover("more_cases", [str(package)])
    assert list(found) == ["elu", "zelu"]
    assert dataclasses.replace(found["elu"], op="gelu") == CASES["gelu"]
    (package / "again.py").write_text(source.format("elu"))
    with pytest.raises(ValueError, match="expected one OpCase per op, got another one of 'elu'"):
        cases.discover("more_cases", [str(package)])
