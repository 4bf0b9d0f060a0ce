"""README.md's Python and the programs in docs/ run as printed, and the files that they name exist."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in DOCS)]


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    with pytest.warns(UserWarning, match="the head starts anew"):
        exec("\n".join(blocks), {"__name__": "readme"})
    assert "tokens to predict" in capsys.readouterr().out
    assert (tmp_path / "tiny-bert" / "config.json").exists()


def programs(page: Path):
    """A page's programs: (path, Python that starts with a comment of that path, command, its output)."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    blocks = [block for block in blocks if block[0] != "sh"]  # commands without a program: test_training_page.py
    assert [kind for kind, _ in blocks] == ["python", "bash", "text"] * (len(blocks) // 3)
    for (_, code), (_, command), (_, output) in zip(blocks[::3], blocks[1::3], blocks[2::3]):
        yield pytest.param(code, command, output, id=code.split()[1])


@pytest.mark.parametrize(("code", "command", "output"), [program for page in DOCS for program in programs(page)])
def test_program_prints_what_the_page_says(code, command, output, tmp_path):
    """Run in the repository, with a directory of its own for /tmp; register numbers are the compiler's to choose."""
    if "compile_cuda" in code and shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        pytest.skip("nvcc is not installed")
    if "triton" in code:
        pytest.importorskip("triton")
    (tmp_path / Path(code.split()[1]).name).write_text(code)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace("/tmp/", f"{tmp_path}/")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    def comparable(text):
        return re.sub(r"%([a-z]+)\d+", r"%\1", text.replace(f"{tmp_path}/", "/tmp/"))

    assert comparable(done.stdout) == comparable(output)


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = [ROOT / path for path in re.findall(r"\b(?:fastlm|tests|benchmarks|csrc|kernels)/[\w./]+\.\w+", text)]
    named += [(ROOT / name).parent / path for path in re.findall(r"\]\((\w[\w./]+)\)", text)]
    assert named
    assert [path for path in named if not path.exists()] == []


@pytest.mark.parametrize("target", re.findall(r"^make (\S+)", README, re.M))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
