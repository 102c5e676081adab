"""Commands run as a person would."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odesolvers import cli

DIGITS = " --model digits --steps 6"


class Shell:
    """Runs commands in this process; `error` is the stderr of the last one, `said` its stdout."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.error = self.said = ""

    def run(self, command: str) -> str:
        """The output of a command that has to succeed."""
        self.capsys.readouterr()
        cli.main(shlex.split(command))
        output, self.error = self.capsys.readouterr()
        return output

    def refused(self, command: str) -> str:
        """The message of a command that has to end with the exit code 2 and one line on stderr."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(shlex.split(command))
        assert caught.value.code == 2
        _, self.error = self.capsys.readouterr()
        *_, message = self.error.splitlines()
        assert message.startswith("Error: ")
        return message


def pixels(path: str | Path) -> np.ndarray:
    """The bytes of a picture as whole numbers."""
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def files(folder: str = ".") -> list[str]:
    """The files below a folder that are not hidden."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return sorted(str(path) for path in found if not path.name.startswith("."))
