"""benchmarks/run_gpu.sh on a machine without a GPU: plan, imports, error messages."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm.bench import steps
from fastlm.testing.cases import CASES
from fastlm.train import load_recipe

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
PARTS = ("tests", "ops", "train", "profile", "report")


def run(*arguments, path=ROOT, python=sys.executable):
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": str(path)}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def files():
    return sorted(path for path in (ROOT / "benchmarks").rglob("*") if "__pycache__" not in path.parts)


def test_dry_run_prints_the_plan_and_checks_the_imports():
    before = files()
    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"  {part}, at most" in done.stdout for part in PARTS)
    assert done.stdout.count(": ok") == 12
    assert "sanitizer, at most" not in done.stdout
    # What is planned is what the programs take, and less than ten minutes.
    assert int(re.search("together at most (\\d+) s", done.stdout)[1]) < 600
    plan = dict(re.findall(r"  (\w+), at most \d+ s: (.*)", done.stdout))
    assert "fastlm profile bert-base --device cuda" in plan["profile"]
    names = re.search("--recipe (.*?) --", plan["train"])[1].split()
    assert names[0] == "bert-base"
    assert load_recipe("bert-base").data.row_tokens == 512
    assert set(names[1:]) <= steps.STEPS.keys()
    assert "--stop-after 30" in plan["train"]
    assert files() == before


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_a_script_is_the_main_of_a_module_and_names_itself(script):
    """The scripts are thin: usage in the docstring, and a main of fastlm/bench."""
    found = runpy.run_path(str(ROOT / "benchmarks" / script))
    assert found["main"].__module__.startswith("fastlm.bench.")
    assert f"python benchmarks/{script}" in found["__doc__"]


def test_dry_run_of_one_part_names_a_failing_import(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('planted')")
    done = run("--dry-run", "ops", path=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert "triton: ImportError: planted" in done.stdout
    assert "train, at most" not in done.stdout
    # Alone, a part has the ten minutes for itself.
    assert "ops, at most 580 s" in done.stdout
    assert "--seconds 540" in done.stdout


def test_the_tests_of_a_failing_op_stop_no_others(tmp_path):
    """The part as a GPU would run it, in a tree of its own, with a PYTHON that notes what it is to do."""
    for folder in ("benchmarks", "tests", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    notes, python = tmp_path / "notes", tmp_path / "bin" / "python"
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200'\n")
    # The list of ops is Python's own to give.
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n'
        f'echo "$*" >>{notes}\ncase "$*" in *\'[gelu\') exit 1 ;; esac\n'
    )
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHON": str(python),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    command = ["bash", str(tmp_path / "benchmarks" / "run_gpu.sh"), "tests"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr
    results = tmp_path / "benchmarks" / "results" / "nvidia-h200"
    assert "tests: exit 1 after" in (results / "status.txt").read_text()
    assert len(list(results.glob("tests-*.log"))) == len(CASES)
    noted = notes.read_text().splitlines()
    assert {line.split("[")[1] for line in noted if "test_ops.py -k [" in line} == set(CASES)
    # The rest of the tests are not those of the ops once more, one after the other.
    rest = [sys.executable, *noted[-1].split(), "--collect-only"]
    collected = subprocess.run(rest, cwd=ROOT / "tests", capture_output=True, text=True, timeout=200).stdout
    assert "tests/test_bert.py::" in collected
    assert "tests/test_ops.py::" not in collected


def test_a_sanitizer_is_planned_by_its_name():
    done = run("--dry-run", "sanitizer", python="true")
    assert "  sanitizer, at most 280 s" in done.stdout
    assert "  tests, at most" not in done.stdout


def test_an_unknown_part_is_refused():
    done = run("speed")
    assert done.returncode == 2
    assert "tests ops train profile report sanitizer; got speed" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", str(SCRIPT), str(ROOT / ".ci" / "run")], check=True)
