"""README.md's Python runs as printed, and the files that it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    exec("\n".join(blocks), {"__name__": "readme"})
    assert "tokens to predict" in capsys.readouterr().out
    assert (tmp_path / "tiny-bert" / "config.json").exists()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_named_files_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"\b(?:fastlm|tests|benchmarks|csrc|kernels)/[\w./]+\.\w+", text) + re.findall(
        r"\]\((\w[\w./]+)\)", text
    )
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("target", re.findall(r"^make (\S+)", README, re.M))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
