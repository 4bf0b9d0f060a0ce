"""The commands of docs/data.md run as they are written."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from fastlm import _malloc, _threads, cli
from fastlm.data import open_dataset

PAGE = Path(__file__).parent.parent / "docs/data.md"


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "corpus").mkdir()
    lines = [f"Line {i} says that {i} times {i} is {i * i}. {'It says more. ' * (i % 40)}" for i in range(120)]
    words = " ".join(f"word{i}" for i in range(60))
    lines += [f"{words} and one", f"{words} and two"]
    (tmp_path / "corpus/a.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_malloc, "tune", lambda: "")
    monkeypatch.setattr(_threads, "wait_policy", lambda: None)
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for command in block.replace("\\\n", " ").strip().split("\n"):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, (command, capsys.readouterr().err)
    shown = capsys.readouterr().out
    assert "⟦" in shown
    assert "near duplicate: " in shown
    rows, fitted = open_dataset("rows"), open_dataset("fitted")
    assert rows.text_tokens == fitted.text_tokens
    assert rows.fill[0] > fitted.fill[0] > 0.9
    assert Path("fitted.png").is_file()
