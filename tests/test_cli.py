"""The commands, run as a person would, on few images and few steps."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odesolvers import (
    BDIA,
    DDIM,
    DampedStepRatio,
    Euler,
    FixedPoint,
    State,
    StepRatio,
    cli,
    karras_sigmas,
)
from odesolvers.cli import app, choices, pictures, report, work
from odesolvers.models import IdealDenoiser, load_digits

DIGITS = " --model digits"


@pytest.fixture(scope="module")
def models() -> dict[str, choices.Model]:
    """The models, each loaded once."""
    cached = {name: functools.cache(model.load) for name, model in choices.MODELS.items()}
    return {n: dataclasses.replace(m, load=cached[n]) for n, m in choices.MODELS.items()}


@pytest.fixture(autouse=True)
def _elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, choices.Model]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name, model in models.items():
        monkeypatch.setitem(choices.MODELS, name, model)


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


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def setup_of(command: str) -> work.Setup:
    """The setup of a command's options."""
    return work.Setup.of(app.parser().parse_args(shlex.split(command)))


def code_std(output: str) -> float:
    return float(output.split("standard deviation ")[1].split()[0])


# roundtrip


def test_roundtrip_prints_every_solver_and_draws(shell: Shell) -> None:
    output = shell.run("roundtrip --count 2 --steps 5 --out deep/trip.png")
    for name in choices.METHODS.split():
        assert len(re.findall(rf"^{re.escape(name)} +\d", output, re.MULTILINE)) == 2
    for name in choices.OTHERS.split():
        assert len(re.findall(rf"^{re.escape(name)} +\d", output, re.MULTILINE)) == 1
    assert "gamma=1 " in output
    assert "gamma=DampedStepRatio() " in output
    assert "9+7 " in output.split("HeunEDM()")[1].split("\n")[0]  # 2 * 4 + 1, 2 * 3 + 1
    assert "wrote deep/trip.png" in output
    assert max(len(line) for line in output.splitlines()) <= 80
    with Image.open("deep/trip.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 100


def test_roundtrip_numbers_are_those_of_the_library() -> None:
    setup = setup_of("roundtrip")
    (row,) = work.compare(setup, [("", "", setup.solver)], count=6, seed=3)
    images, _ = load_digits()
    solver, sigmas = BDIA(Euler(), DampedStepRatio()), karras_sigmas(18)
    denoiser = IdealDenoiser(images)
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise = (80 * noise).float()
    there = solver.sample(denoiser, noise, sigmas)
    back = solver.invert(denoiser, there.state, sigmas)
    assert row.solver == solver
    assert torch.equal(row.noise, noise)
    assert torch.equal(row.samples, there.x)
    assert torch.equal(row.recovered, back.x)
    assert row.evaluations == (18, 17)
    assert row.error == pytest.approx(((back.x - noise).norm() / noise.norm()).item())
    assert row.error < 1e-3
    distances = [((x - images).flatten(1).norm(dim=1).min() / 8).item() for x in there.x]
    assert row.distance == pytest.approx(np.median(distances), rel=0.5, abs=1e-6)
    assert row.distance < 1e-2
    assert row.again < 1e-6
    mean, std = row.latent
    assert 0.2 < std < 0.4
    assert abs(mean) < 0.1


def test_the_findings_follow_the_numbers() -> None:
    poor = setup_of('roundtrip --solver "BDIA(HeunEDM(), gamma=1)"')
    good = setup_of("roundtrip")
    solvers = [("", "poor", poor.solver), ("", "good", good.solver)]
    rows = list(work.compare(good, solvers, count=4, seed=0))
    assert "Its samples are digits" in report.findings(rows, good)[0]
    assert "Its samples are not digits" in report.findings(rows, poor)[0]
    assert "1 of the 2 solvers" in report.findings(rows, good)[1]
    assert not any("solvers" in sentence for sentence in report.findings(rows[1:], good))
    assert "standard deviation 0." in report.findings(rows, good)[-1]
    wide = dataclasses.replace(rows[1], latent=(0.0, 30.0))
    assert "amplifies errors" in report.findings([wide], good)[-1]


def test_a_chosen_solver_that_is_not_in_the_table_is_added() -> None:
    known = work.compared(BDIA(Euler(), DampedStepRatio()))
    chosen = BDIA(Euler(), 0.9)
    section, name, solver = work.compared(chosen)[-1]
    assert (section, name, solver) == ("--solver", repr(chosen), chosen)
    assert work.compared(BDIA(Euler(), 1.0)) == known
    assert len(work.compared(chosen)) == len(known) + 1


# sample and invert


def test_sample_then_invert_gives_the_noise_back(shell: Shell) -> None:
    output = shell.run("sample --count 3 --seed 7 --save a/state.safetensors" + DIGITS)
    assert "18 evaluations of the denoiser for 3 digits" in output
    assert float(output.split("median: ")[1].split()[0]) < 1e-2
    output = shell.run("invert a/state.safetensors --save code.safetensors")
    assert "17 evaluations" in output
    code = State.load("code.safetensors")
    noise = setup_of("sample" + DIGITS).noise(3, seed=7)
    assert code.partner is not None
    assert work.relative(code.partner, noise) < 1e-3
    assert code_std(output) == pytest.approx(noise.div(80).std().item(), abs=1e-3)
    for name in ("out/samples.png", "out/inverted.png"):
        with Image.open(name) as picture:
            assert picture.height == 2 * 64 + 6


def test_sampling_from_a_code_ends_where_it_came_from(shell: Shell) -> None:
    options = "--count 2 --labels 3,8 --dtype float64 --save state.safetensors"
    shell.run(f"sample {options}{DIGITS}")
    shell.run("invert state.safetensors --save code.safetensors")
    shell.run("sample --from code.safetensors --save again.safetensors")
    first = State.load("state.safetensors")
    again, notes = State.load_with_notes("again.safetensors")
    assert work.relative(again.current, first.current) < 1e-10
    assert notes["labels"] == [3, 8]
    images, labels = load_digits()
    nearest = torch.cdist(first.current.flatten(1), images.double().flatten(1)).argmin(1)
    assert labels[nearest].tolist() == [3, 8]


def test_a_code_may_be_sampled_under_another_label(shell: Shell) -> None:
    shell.run("sample --count 1 --steps 8 --labels 3 --save state.safetensors" + DIGITS)
    shell.run("invert state.safetensors --save code.safetensors")
    shell.run("sample --from code.safetensors --labels 5")
    message = shell.refused("invert state.safetensors --labels 5")
    assert "labels = (3,), not (5,)" in message


def test_a_fixed_point_code_of_an_image_may_be_sampled_under_another_label(shell: Shell) -> None:
    np.save("digit.npy", load_digits()[0][0].numpy())
    solver = BDIA(Euler(), StepRatio(1), FixedPoint())
    options = f'--solver "{solver}" --steps 8 --labels 0 --save code.safetensors'
    shell.run(f"invert digit.npy {options}{DIGITS}")
    shell.run("sample --from code.safetensors --labels 5")


def test_fixed_point_goes_back_to_the_bit(shell: Shell) -> None:
    solver = BDIA(Euler(), DampedStepRatio(), FixedPoint())
    options = f'--solver "{solver}" --count 2 --steps 6 --save s.safetensors'
    shell.run(f"sample {options}{DIGITS}")
    shell.run("invert s.safetensors --save code.safetensors")
    shell.run("sample --from code.safetensors --save again.safetensors")
    first, again = State.load("s.safetensors"), State.load("again.safetensors")
    assert torch.equal(first.current, again.current)


def test_the_solver_and_grid_of_a_state_are_its_own(shell: Shell) -> None:
    options = '--count 1 --solver "BDIA(DDIM(), 0.9)" --steps 9 --save s.safetensors'
    shell.run(f"sample {options}{DIGITS}")
    assert "8 evaluations" in shell.run("invert s.safetensors")
    shell.run('invert s.safetensors --solver "BDIA(DDIM(), gamma=0.90)" --steps 9')
    message = shell.refused('invert s.safetensors --solver "BDIA(DDIM(), 0.8)"')
    assert "comes from another solver" in message
    assert "comes from another grid" in shell.refused("invert s.safetensors --steps 10")
    assert "leave out --dtype" in shell.refused("invert s.safetensors --dtype float64")
    assert "leave out --model" in shell.refused("invert s.safetensors --model letters")


def test_a_state_saved_by_the_library_needs_to_be_told_its_model(shell: Shell) -> None:
    solver, denoiser = BDIA(DDIM(), 1.0), IdealDenoiser(load_digits()[0])
    solution = solver.sample(denoiser, torch.randn(1, 1, 8, 8) * 80, karras_sigmas(5))
    solution.state.save("s.safetensors")
    message = shell.refused("invert s.safetensors")
    assert "s.safetensors names no model; the commands need --model letters or digits" in message
    shell.run("invert s.safetensors --model digits")
    solution.state.save("s.safetensors", {"model": "mine"})
    assert "s.safetensors names the model mine" in shell.refused("invert s.safetensors")
    flat = solver.sample(lambda x, sigma: 0 * x, torch.randn(1, 3) * 80, karras_sigmas(5))
    flat.state.save("s.safetensors")
    message = shell.refused("invert s.safetensors --model digits")
    assert "states of shape (3,), digits are (1, 8, 8)" in message


def test_a_lone_image_is_inverted(shell: Shell) -> None:
    digit = load_digits()[0][0]
    np.save("digit.npy", digit.numpy())
    output = shell.run("invert digit.npy --save code.safetensors --dtype float64" + DIGITS)
    assert 0.1 < code_std(output) < 1
    shell.run("sample --from code.safetensors --save again.safetensors")
    assert work.relative(State.load("again.safetensors").current[0], digit) < 1e-10
    Image.fromarray(np.full((40, 40, 3), 255, np.uint8)).save("white.png")
    assert "evaluations" in shell.run("invert white.png --steps 5" + DIGITS)
    assert "Warning" not in shell.error


def test_a_warning_is_one_line_on_stderr(shell: Shell) -> None:
    np.save("digit.npy", load_digits()[0][0].numpy())
    shell.run(f'invert digit.npy --solver "BDIA(Euler(), 0.3)"{DIGITS}')
    (warning,) = (line for line in shell.error.splitlines() if "Warning: " in line)
    assert "code of a lone image" in warning


# edit, and the letters


def test_edit_draws_the_same_code_under_other_labels(shell: Shell) -> None:
    options = "--count 3 --labels 3,1,4 --to 0-2 --guidance 1 --steps 10 --dtype float64"
    output = shell.run(f"edit {options}{DIGITS}")
    assert "46 evaluations" in output  # 10 up from lone images; 9 down, under each of 4 labels
    assert re.search(r"back under its own label to \d\.\de-(0[6-9]|[12]\d)", output)
    with Image.open("out/edit.png") as picture:
        assert picture.width > 400


def test_real_images_are_of_the_labels_in_turn() -> None:
    setup = setup_of("edit --labels 3,1" + DIGITS)
    images, labels = setup.real_images(5, seed=0)
    assert labels == (3, 1, 3, 1, 3)
    nearest = torch.cdist(images.flatten(1), setup.images.flatten(1)).argmin(1)
    assert setup.classes[nearest].tolist() == [3, 1, 3, 1, 3]
    assert not torch.equal(images[0], images[2])


def test_an_edit_of_a_file_needs_its_label(shell: Shell) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("dark.png")
    assert "give --labels for dark.png" in shell.refused("edit dark.png --to 3" + DIGITS)
    shell.run("edit dark.png --labels 1 --to 3 --steps 5" + DIGITS)


def test_the_letters_are_the_default_where_they_are_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choices.default_model() == "letters"
    missing = dataclasses.replace(choices.MODELS["letters"], modules=("no_such_module",))
    monkeypatch.setitem(choices.MODELS, "letters", missing)
    assert choices.default_model() == "digits"


@pytest.mark.usefixtures("k_diffusion")
def test_the_commands_run_on_the_letters(shell: Shell) -> None:
    output = shell.run("sample --count 2 --labels A,Z --steps 4 --save a.safetensors")
    assert "4 evaluations of the denoiser for 2 letters" in output
    assert State.load_with_notes("a.safetensors")[1]["guidance"] == 3.0
    assert "guidance = 3.0, not 1.0" in shell.refused("invert a.safetensors --guidance 1")
    shell.run("invert a.safetensors --save n.safetensors --model letters")
    noise = setup_of("sample --steps 4").noise(2, seed=0)
    code = State.load("n.safetensors").partner
    assert code is not None
    assert work.relative(code, noise) < 1e-3
    shell.run("sample --from n.safetensors --labels Z --model letters")
    message = shell.refused("sample --from n.safetensors --labels 5")
    assert "labels are A to Z, got '5'" in message
    output = shell.run("edit --count 2 --to B --steps 4 --dtype float64")
    assert 0.8 < code_std(output) < 1.2  # less without the noise of the last level
    assert re.search(r"back under its own label to \d\.\de-(0[5-9]|[12]\d)", output)


# list


def test_list_names_everything(shell: Shell) -> None:
    output = shell.run("list")
    names = " ".join([*choices.LISTED.values(), choices.METHODS, *choices.GRIDS, *choices.MODELS])
    for name in [*names.split(), *(loader[0] for loader in choices.LOADERS)]:
        assert re.search(rf"^{re.escape(name)} ", output, re.MULTILINE)
    assert "odesolvers[extra]" in output
    assert "load('FILE.json')" in output
    assert re.search(r"^digits .* digits +yes", output, re.MULTILINE)
    assert max(len(line) for line in output.splitlines()) <= 80


def test_list_says_what_is_not_installed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(choices.MODELS["letters"], modules=("no_such_module",))
    monkeypatch.setitem(choices.MODELS, "letters", missing)
    assert re.search(r"^letters .* letters +no", shell.run("list"), re.MULTILINE)


# calibrate


def test_weights_that_were_learned_serve_as_a_solver(shell: Shell) -> None:
    grid = "--steps 5 --sigma-min 0.05" + DIGITS
    output = shell.run(f"calibrate {grid} --count 4 --runs 8 --out deep/rule.json")
    assert "wrote deep/rule.json (weights)" in output
    assert "encoding error" in output
    output = shell.run(f"sample {grid} --weights deep/rule.json --count 2 --save s.safetensors")
    assert "5 evaluations" in output
    assert "4 evaluations" in shell.run("invert s.safetensors")
    shell.run("invert s.safetensors --weights deep/rule.json")
    rule = "load('deep/rule.json')"
    shell.run(f'sample {grid} --count 2 --solver "BDIA(Euler(), {rule}, FixedPoint())"')
    message = shell.refused(f'sample {grid} --solver "BDIA(DDIM(), {rule})"')
    assert "calibrated for Euler()" in message
    message = shell.refused("sample --weights deep/rule.json --solver Euler()" + DIGITS)
    assert "leave out --solver, or --weights" in message


# options


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
        ("sample --sigma-min low", "--sigma-min: invalid float value: 'low'"),
        ("sample --grid vp --sigma-max 3", "the grid vp takes no --sigma-max"),
        ("sample --count 0", "--count: must be a whole number, 1 or more, got '0'"),
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


def test_an_interrupted_command_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    interrupted = dataclasses.replace(choices.MODELS["digits"], load=interrupt)
    monkeypatch.setitem(choices.MODELS, "digits", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["sample", "--model", "digits"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "Interrupted\n"


@pytest.fixture
def _not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line as before its first import."""
    for module in (app, choices, pictures, report, work):
        monkeypatch.delitem(sys.modules, module.__name__)
        monkeypatch.delattr(cli, module.__name__.split(".")[-1])


@pytest.mark.usefixtures("_not_imported")
@pytest.mark.parametrize(
    ("absent", "extra"),
    [
        ("rich.console", "cli"),
        ("tqdm", "cli"),
        ("PIL", "cli"),
        ("matplotlib.figure", "cli"),
        ("safetensors.torch", "cli"),
        ("sklearn.datasets", "digits"),
    ],
)
def test_missing_extras_are_named(
    shell: Shell, absent: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    shell.capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(f"sample --count 1 --steps 3 --save s.safetensors{DIGITS}".split())
    assert caught.value.code == 2
    assert f"pip install 'odesolvers[{extra}]'" in shell.capsys.readouterr().err


def test_the_library_does_not_import_the_command_line() -> None:
    code = """
import sys, odesolvers, odesolvers.models
assert 'odesolvers.cli' not in sys.modules
sys.modules['rich'] = None
import odesolvers.cli.__main__
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "Error: the command line needs rich: pip install 'odesolvers[cli]'\n"


# pictures


def test_a_contact_sheet_holds_every_image_in_its_place() -> None:
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 20, 32)
    sheet = pictures.contact_sheet(images)
    height, width, gap = 40, 64, pictures.GAP
    assert sheet.shape == (2 * height + gap, 3 * width + 2 * gap, 3)
    for k, value in enumerate([0, 64, 128, 191, 255]):
        top, left = k // 3 * (height + gap), k % 3 * (width + gap)
        assert (sheet[top : top + height, left : left + width] == value).all()
    assert (sheet[height : height + gap] == pictures.SLATE).all()
    assert (sheet[height:, 2 * (width + gap) - gap :] == pictures.SLATE).all()


def test_a_contact_sheet_clips_and_takes_colours() -> None:
    images = torch.tensor([3.0, -1.0, -7.0]).reshape(1, 3, 1, 1)
    assert (pictures.contact_sheet(images) == [255, 0, 0]).all()
    with pytest.raises(ValueError, match=r"got \(1, 4, 2, 2\)"):
        pictures.contact_sheet(torch.zeros(1, 4, 2, 2))


def test_signs_have_colours() -> None:
    red, white, blue = pictures.signed_colours(torch.tensor([1.0, 0, -1]).reshape(3, 1, 1, 1))
    assert red[0] > red[2]
    assert white.flatten().tolist() == [1, 1, 1]
    assert blue[2] > blue[0]
