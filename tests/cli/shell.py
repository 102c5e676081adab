"""Commands run as a person would."""

from __future__ import annotations

import shlex

import pytest

from odesolvers import cli
from odesolvers.cli import app, work

DIGITS = " --model digits"


class Shell:
    """Runs commands in this process; `error` is the stderr of the last one."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.error = ""

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
        output, self.error = self.capsys.readouterr()
        *_, message = self.error.splitlines()
        assert message.startswith("Error: ")
        assert not output
        return message


def setup_of(command: str) -> work.Setup:
    """The setup of a command's options."""
    return work.Setup.of(app.parser().parse_args(shlex.split(command)))


def code_std(output: str) -> float:
    return float(output.split("standard deviation ")[1].split()[0])
