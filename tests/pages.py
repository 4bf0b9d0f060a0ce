"""Commands of the documentation, run in this process."""

import shlex
from pathlib import Path

import pytest

from fastlm import _malloc, _threads, cli


def command_of(page, beginning):
    """The one line of docs/`page` that begins so; to name a whole line, end it with a line break."""
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines(keepends=True) if line.startswith(beginning)]
    return line


def run_command(line, folder, *more):
    """Runs `line` and further arguments in `folder`; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(_malloc, "tune", lambda: "left alone in tests")
        patch.setattr(_threads, "for_work", lambda flops=None: 2)
        patch.setattr(_threads, "wait_policy", lambda: None)
        patch.setattr("sys.argv", [*shlex.split(line), *map(str, more)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
    return exit.value.code or 0
