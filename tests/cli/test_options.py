"""Options and files of the command line: what is taken, and what is refused in one line."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import odesolvers
from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    DampedStepRatio,
    Euler,
    FixedPoint,
    cli,
    karras_sigmas,
    pictures,
)
from odesolvers.cli import commands, outputs, parser, work
from odesolvers.opening import SHORT, solver_of

from .shell import DIGITS, Shell, files

NAMES = list(parser.COMMANDS)


@pytest.mark.parametrize("command", ["", "-h", *(f"{name} -h" for name in NAMES)])
def test_help_fits_the_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(command.split())
    assert not caught.value.code
    output = capsys.readouterr().out
    assert output.startswith("usage: odesolvers")
    assert max(len(line) for line in output.splitlines()) <= 80


def test_help_says_the_defaults_that_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (
        ("invert", ["(codes)", "(out/invert)", "(emoji)"]),
        ("edit", ["(damped)", "(1.0)", "(out/edit)", "(crop)"]),
        ("calibrate", ["(16)", "(1000)", "(out/gamma.json)", "(by the steps: 80 or"]),
        ("interpolate", ["(9)", "(codes)", "   pictures, or folders of them"]),
        ("sample", ["   saved states, or folders of them"]),
    ):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        output = capsys.readouterr().out
        for word in words:
            assert word in output, (name, word)


def test_the_version_and_the_completion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"odesolvers {odesolvers.__version__}\n"
    for shell in ("bash", "zsh"):
        with pytest.raises(SystemExit):
            cli.main(["--print-completion", shell])
        script = capsys.readouterr().out
        assert "--strength" in script
        checked = [shell, "-n"] if shell == "bash" else ["true"]
        assert not subprocess.run(checked, input=script, text=True).returncode


def test_short_names_are_solvers() -> None:
    sigmas = karras_sigmas(5)
    assert solver_of("damped", "Euler()", sigmas) == BDIA(Euler(), DampedStepRatio())
    assert solver_of("codes", "DDIM()", sigmas).approximator == DDIM()  # type: ignore[attr-defined]
    assert solver_of("edict", "Euler()", sigmas) == EDICT()
    assert solver_of("exact", "Euler()", sigmas).arithmetic == FixedPoint()
    flow = karras_sigmas(5, 0.1, 2.0**20)  # a level that 40 fractional bits leave no room above
    solver_of("exact", "FlowEuler()", flow).arithmetic.check(parser.commands.ode.Grid.of(flow))
    for name in SHORT:
        solver_of(name, "Euler()", sigmas)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("frobnicate", "choose from"),
        ("--steps 3", "see `odesolvers --help`"),
        ("--bogus", "COMMAND"),
        ("list more", "odesolvers list takes no 'more'; see `odesolvers list --help`"),
        ("sample --stepps 3", "odesolvers sample takes no '--stepps'"),
        ("sample --step 3", "odesolvers sample takes no '--step'"),
        ("sample --count", "--count: expected one argument"),
        ("sample --solver Heun()", "no 'Heun' to name a solver by; did you mean 'HeunEDM'? Known:"),
        ("sample --solver HeunEDM", "'HeunEDM' is neither a number"),
        ("sample --solver 'BDIA('", "'BDIA(' is not an expression"),
        ("sample --solver StepRatio(2)", "--solver must name a solver such as 'BDIA(Euler()"),
        ("sample --solver 'BDIA(Euler(), gamma=3)'", "gamma must be in (0, 1]"),
        ("sample --solver \"__import__('os')\"", "no '__import__' to name a solver by"),
        ("sample --solver \"load('absent.json')\"", "absent.json"),
        ("calibrate --base EDICT()", "--base must name a method such as Euler()"),
        ("calibrate --out rule.txt", "--out must be a file such as rule.json"),
        ("calibrate --out g3", "--out must be a file such as g3.json"),
        ("sample --model digit", "there is no such file or folder, and it is no hub id"),
        ("sample --model absent/model.safetensors", "there is no file absent/model.safetensors"),
        ("sample --grid karas", "must be one of karras, exponential, vp, got 'karas'"),
        ("sample --dtype int8", "must be one of float32, float64, bfloat16, got 'int8'"),
        ("sample --steps 1", "needs n >= 2"),
        ("sample --sigma-min 90", "0 < sigma_min < sigma_max"),
        ("sample --sigma-min low", "--sigma-min: must be a finite number, got 'low'"),
        ("sample --grid vp --sigma-max 3", "the grid vp takes no --sigma-max"),
        ("sample --count 0", "--count: must be a whole number from 1 to 10000, got '0'"),
        (
            "sample --seed -1",
            "--seed: must be a whole number from 0 to 1000000000000000000, got '-1'",
        ),
        ("sample --prompt 12", "prompts of this model are 0 to 9, got '12'"),
        ("sample --prompt ''", "prompts of this model are 0 to 9, got ''"),
        ("sample --device nowhere", "device 'nowhere' cannot be used here"),
        ("sample --size 8 8", "--size is for pipelines"),
        ("sample --network float16", "--network is for EDM files and pipelines"),
        ("sample --out x.xyz", "x.xyz ends as no picture (.png"),
        ("sample --count 2 --out x.png", "x.png is one picture, and there are 2: give a folder"),
        ("invert", "odesolvers invert needs pictures: FILE"),
        ("invert absent.png", "there is no file or folder absent.png"),
        ("invert .", "there are no pictures or states in ."),
        ("edit a.png --to 3 --strength 0", "strength must be from"),
        ("edit a.png --to 3 --strength x", "--strength: must be a finite number"),
        ("edit a.png", "required: --to"),
        ("edit a.png --to 3 --mask absent.png", "there is no file or folder absent.png"),
        ("edit a.png --to 3 --mask a.png --save", "leave out --save"),
        ("edit a.png --to 3 --solver Euler()", "cannot: use BDIA(Euler())"),
        (
            "edit a.png b/a.png --to 3",
            "a.png and b/a.png have one name, and their results would be one file",
        ),
        ("sample a.png", "a.png is none of the states that the command takes"),
        ("interpolate a.png --frames 2", "two pictures are interpolated, got 1"),
        ("interpolate a.png a.png --frames 1", "from 2 to 10000, got '1'"),
        ("watermark a.png --key k", "invalid choice: 'a.png'"),
        ("watermark detect a.png", "required: --key"),
        ("watermark detect --key k", "odesolvers watermark detect needs pictures: FILE"),
    ],
)
def test_bad_options_are_explained(shell: Shell, command: str, message: str) -> None:
    known = command.split()[0] in ("sample", "edit", "invert", "interpolate", "calibrate")
    model = "" if "--model" in command or not known else " --model digits"
    if command != "invert .":
        Path("b").mkdir()
        for name in ("a.png", "b/a.png"):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(name)
    assert message in shell.refused(command + model)
    assert not [name for name in files() if name not in ("a.png", "b/a.png")]


def test_files_of_another_kind_are_explained(shell: Shell) -> None:
    def message(name: str) -> str:
        return shell.refused(f"invert {name}{DIGITS} --again")

    Path("text.txt").write_text("no image")
    assert "text.txt cannot be read as an image: give" in message("text.txt")
    Path("text.npy").write_text("no array")
    assert "not an array saved by numpy.save" in message("text.npy")
    Path("text.safetensors").write_text("no state, nor any other safetensors file")
    assert "not a saved state" in message("text.safetensors")
    np.save("large.npy", np.full((8, 8), 3.0))
    assert "floating point in [-1, 1]" in message("large.npy")
    np.save("many.npy", -np.ones((2, 1, 8, 8)))
    assert "many.npy holds 2 pictures: save each as a file of its own" in message("many.npy")
    Path("text.json").write_text("{")
    assert "text.json is not a calibration" in shell.refused(
        "sample --solver \"load('text.json')\"" + DIGITS
    )


def test_a_folder_may_have_a_point_in_its_name(shell: Shell) -> None:
    shell.run("sample --count 1 --out strength-0.6" + DIGITS)
    assert files() == ["strength-0.6/000000.png"]


def test_a_damaged_list_of_what_is_finished_is_explained(shell: Shell) -> None:
    shell.run("sample --count 1" + DIGITS)
    for content in ("{", "[]", '{"settings": {}, "done": {"a": 3}}'):
        Path("out/sample/.odesolvers.json").write_text(content)
        assert ".odesolvers.json is damaged" in shell.refused("sample --count 1" + DIGITS)
    shell.run("sample --count 1 --again" + DIGITS)


@pytest.fixture
def _not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line as before its first import."""
    for package, module in (
        (cli, commands),
        (cli, outputs),
        (cli, parser),
        (cli, work),
        (odesolvers, pictures),
    ):
        monkeypatch.delitem(sys.modules, module.__name__)
        monkeypatch.delattr(package, module.__name__.split(".")[-1])


@pytest.mark.usefixtures("_not_imported")
@pytest.mark.parametrize(
    ("absent", "hint"),
    [
        ("tqdm", "tqdm pillow safetensors shtab"),
        ("PIL", "tqdm pillow safetensors shtab"),
        ("shtab", "tqdm pillow safetensors shtab"),
        ("safetensors.torch", "safetensors"),
        ("sklearn.datasets", "scikit-learn"),
    ],
)
def test_missing_extras_are_named(
    shell: Shell, absent: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    from odesolvers import bundled, opening

    if absent == "sklearn.datasets":
        entry = bundled._digits, ""
        monkeypatch.setitem(opening.BUNDLED, "digits", entry)  # type: ignore[arg-type]
    shell.capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(shlex.split("sample --count 1 --save" + DIGITS))
    assert caught.value.code == 2
    assert f"pip install {hint}" in shell.capsys.readouterr().err


def test_the_library_does_not_import_the_command_line() -> None:
    code = """
import sys, odesolvers, odesolvers.models
assert 'odesolvers.cli' not in sys.modules
sys.modules['tqdm'] = None
sys.argv = ['odesolvers', 'list']
import odesolvers.__main__
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("Error: the command line needs tqdm: pip install tqdm ")
