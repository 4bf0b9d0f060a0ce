"""benchmarks/run_gpu.sh on a machine without a GPU: its plan, its imports, its refusals."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
PARTS = ("tests", "sanitizer", "ops", "train")


def run(*arguments, path=ROOT):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(path)}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def files():
    return sorted(path for path in (ROOT / "benchmarks").rglob("*") if "__pycache__" not in path.parts)


def test_dry_run_prints_the_plan_and_checks_the_imports():
    before = files()
    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"  {part}, at most" in done.stdout for part in PARTS)
    assert done.stdout.count(": ok") == 10
    assert files() == before


def test_dry_run_of_one_part_names_a_failing_import(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('planted')")
    done = run("--dry-run", "ops", path=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert "triton: ImportError: planted" in done.stdout
    assert "train, at most" not in done.stdout


def test_an_unknown_part_is_refused():
    done = run("speed")
    assert done.returncode == 2
    assert "tests sanitizer ops train; got speed" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", str(SCRIPT), str(ROOT / ".ci" / "run")], check=True)
