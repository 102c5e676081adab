"""Options and files of the command line: what is taken, and what is refused in one line."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from odesolvers import (
    BDIA,
    DampedStepRatio,
    Euler,
    StepRatio,
    cli,
    karras_sigmas,
)
from odesolvers.cli import app, choices, pictures, report, work

from .shell import DIGITS, Shell, setup_of


def test_labels_are_read() -> None:
    digits, letters = choices.MODELS["digits"], choices.MODELS["letters"]
    assert digits.labels("3") == (3,)
    assert digits.labels("0-3,7") == (0, 1, 2, 3, 7)
    assert letters.labels("A-C, Z") == (0, 1, 2, 25)
    for text in ("", "a", "1,", "5-3", "-1", "5-", "12"):
        with pytest.raises(ValueError, match=r"labels are 0 to 9, got .*: give one"):
            digits.labels(text)


def test_every_grid_can_be_asked_for() -> None:
    for name in choices.GRIDS:
        assert len(setup_of(f"sample --grid {name} --steps 5{DIGITS}").sigmas) == 6
    sigmas = setup_of("sample --steps 9 --rho 3" + DIGITS).sigmas
    assert torch.equal(sigmas, karras_sigmas(9, rho=3.0))


def test_the_default_solver() -> None:
    assert setup_of("sample" + DIGITS).solver == BDIA(Euler(), DampedStepRatio())
    text = '"BDIA(Euler(), gamma=StepRatio(2))"'
    assert setup_of(f"sample --solver {text}{DIGITS}").solver == BDIA(Euler(), StepRatio(2))


@pytest.mark.parametrize("command", ["", "-h", *(f"{c[0].__name__} -h" for c in app.COMMANDS[:-1])])
def test_help_fits_the_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(command.split())
    assert not caught.value.code
    output = capsys.readouterr().out
    assert output.startswith("usage: odesolvers")
    assert max(len(line) for line in output.splitlines()) <= 80


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("frobnicate", "choose from"),
        ("--steps 3", "see `odesolvers --help`"),
        ("--bogus", "COMMAND"),
        ("sample more", "odesolvers sample takes no 'more'; see `odesolvers sample --help`"),
        ("sample --stepps 3", "odesolvers sample takes no '--stepps'"),
        ("sample --step 3", "odesolvers sample takes no '--step'"),
        ("sample --count", "--count: expected one argument"),
        ("sample --solver Heun()", "no 'Heun' to name a solver by; did you mean 'HeunEDM'? Known:"),
        ("sample --solver HeunEDM", "'HeunEDM' is neither a number"),
        ("sample --solver 'BDIA('", "'BDIA(' is not an expression"),
        ("sample --solver StepRatio(2)", "--solver must name a solver such as BDIA(Euler()"),
        ("sample --solver 'BDIA(Euler(), gamma=3)'", "gamma must be in (0, 1]"),
        ("sample --solver \"__import__('os')\"", "no '__import__' to name a solver by"),
        ("sample --weights absent.json", "there is no file absent.json"),
        ("calibrate --base EDICT()", "--base must name a method such as Euler()"),
        ("sample --model digit", "'digit' (choose from"),
        ("sample --grid karas", "'karas' (choose from"),
        ("sample --dtype int8", "'int8' (choose from"),
        ("sample --steps 1", "needs n >= 2"),
        ("sample --sigma-min 90", "0 < sigma_min < sigma_max"),
        ("sample --sigma-min low", "--sigma-min: must be a finite number, got 'low'"),
        ("sample --grid vp --sigma-max 3", "the grid vp takes no --sigma-max"),
        ("sample --count 0", "--count: must be a whole number from 1 to 10000, got '0'"),
        ("sample --seed -1", "--seed: must be a whole number from 0 to 2^63 - 1, got '-1'"),
        ("sample --labels 1 --guidance 2", "needs labels, and a model that was trained without"),
        ("sample --labels 12", "labels are 0 to 9, got '12'"),
        ("sample --labels ''", "labels are 0 to 9, got ''"),
        ("sample --device nowhere", "device 'nowhere' cannot be used here"),
        ("sample --save state.pt", "must end in .safetensors"),
        ("roundtrip --count 1 --steps 3 --solver Euler()", "cannot be inverted"),
        ("roundtrip --count 1 --steps 3 --solver 'BDIA(Euler(), 0)'", "cannot be inverted"),
        ("invert", "required: FILE"),
        ("invert absent.png", "there is no file absent.png"),
        ("invert absent.safetensors", "there is no file absent.safetensors"),
        ("sample --from absent.safetensors", "there is no file absent.safetensors"),
        ("invert .", "there is no file ."),
    ],
)
def test_bad_options_are_explained(shell: Shell, command: str, message: str) -> None:
    model = "" if "--model" in command or not command[0].isalpha() else DIGITS
    assert message in shell.refused(command + model)


def test_files_of_another_kind_are_explained(shell: Shell) -> None:
    def message(name: str) -> str:
        return shell.refused(f"invert {name}{DIGITS}")

    Path("text.txt").write_text("no image")
    assert "text.txt cannot be read as an image: give" in message("text.txt")
    Path("text.npy").write_text("no array")
    assert "not an array saved by numpy.save" in message("text.npy")
    Path("text.safetensors").write_text("no state, nor any other safetensors file")
    assert "not a saved state" in message("text.safetensors")
    np.save("large.npy", np.full((8, 8), 3.0))
    assert "floating point in [-1, 1]" in message("large.npy")
    np.save("flat.npy", np.zeros(64))
    assert "(B, C, H, W), got (64,)" in message("flat.npy")
    Path("text.json").write_text("{")
    message_of_weights = shell.refused("sample --weights text.json" + DIGITS)
    assert "text.json is not a calibration" in message_of_weights
    np.save("digit.npy", -np.ones((8, 8)))
    shell.capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(shlex.split(f"invert digit.npy --steps 3 --out picture.xyz{DIGITS}"))
    assert (
        "picture.xyz does not end as an image file does: use .png" in shell.capsys.readouterr().err
    )


@pytest.fixture
def _not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line as before its first import."""
    for module in (app, choices, pictures, report, work):
        monkeypatch.delitem(sys.modules, module.__name__)
        monkeypatch.delattr(cli, module.__name__.split(".")[-1])


@pytest.mark.usefixtures("_not_imported")
@pytest.mark.parametrize(
    ("absent", "hint"),
    [
        ("rich.console", "rich tqdm pillow matplotlib"),
        ("tqdm", "rich tqdm pillow matplotlib"),
        ("PIL", "rich tqdm pillow matplotlib"),
        ("matplotlib.figure", "rich tqdm pillow matplotlib"),
        ("safetensors.torch", "safetensors"),
        ("sklearn.datasets", "scikit-learn"),
    ],
)
def test_missing_extras_are_named(
    shell: Shell, absent: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    shell.capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(f"sample --count 1 --steps 3 --save s.safetensors{DIGITS}".split())
    assert caught.value.code == 2
    assert f"pip install {hint}" in shell.capsys.readouterr().err


def test_the_library_does_not_import_the_command_line() -> None:
    code = """
import sys, odesolvers, odesolvers.models
assert 'odesolvers.cli' not in sys.modules
sys.modules['rich'] = None
import odesolvers.cli.__main__
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("Error: the command line needs rich: pip install rich tqdm ")
