"""The commands, run as a person would, on a few digits."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from odesolvers import (
    BDIA,
    DDIM,
    DampedStepRatio,
    HeunEDM,
    InversionWarning,
    SmoothedOutput,
    State,
    StepRatio,
    karras_sigmas,
    storage,
)
from odesolvers.cli import choices, pictures, report, work
from odesolvers.cli.app import app
from odesolvers.models import IdealDenoiser, load_digits


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def run(command: str) -> str:
    """The output of a command on the digits, if it does not say on what."""
    if "--model" not in command and command.split()[0] != "list":
        command += " --model digits"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    return result.output


def refused(command: str) -> str:
    """The message of a command that has to end with exit code 2 and no traceback."""
    if "--model" not in command and "--from" not in command and "safetensors" not in command:
        command += " --model digits"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return work.relative(x, y)


# roundtrip


def test_roundtrip_prints_every_solver_and_draws() -> None:
    output = run("roundtrip --count 4 --steps 12 --out deep/trip.png")
    for name in choices.APPROXIMATORS:
        assert len(re.findall(rf"^ {name} +\d", output, re.MULTILINE)) == 2
    assert "γ = 1 " in output
    assert "γ = step-ratio-2 " in output
    assert "34+32" in output.split("heun-edm")[1].split("\n")[0]  # 2 + 3 * 10 + 2, 3 * 10 + 2
    assert "wrote deep/trip.png" in output
    assert max(len(line) for line in output.splitlines() if not re.search("it/s|s/it", line)) <= 80
    with Image.open("deep/trip.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 100


def test_roundtrip_numbers_are_those_of_the_library() -> None:
    settings = choices.Settings()
    setup, _ = work.Setup.of(choices.Options())
    (row,) = work.compare(setup, [settings], count=6, seed=3)
    images, _ = load_digits()
    solver, sigmas, denoiser = (
        BDIA(HeunEDM(), StepRatio(2)),
        karras_sigmas(18),
        IdealDenoiser(images),
    )
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise = (80 * noise).float()
    there = solver.sample(denoiser, noise, sigmas)
    back = solver.invert(denoiser, there.state, sigmas)
    assert torch.equal(row.trip.noise, noise)
    assert torch.equal(row.trip.samples, there.x)
    assert torch.equal(row.trip.recovered, back.x)
    assert row.trip.evaluations == (52, 50)
    assert row.trip.error == pytest.approx(((back.x - noise).norm() / noise.norm()).item())
    assert row.trip.error < 1e-4
    assert row.distances.max() < 1e-2
    each = [((x - images).flatten(1).norm(dim=1).min() / 8).item() for x in there.x]
    torch.testing.assert_close(row.distances.float(), torch.tensor(each), rtol=1e-2, atol=1e-6)
    assert row.code.error < 1e-6
    assert 0.2 < row.code.std < 0.4
    assert abs(row.code.mean) < 0.1


def test_the_findings_follow_the_numbers() -> None:
    setup, _ = work.Setup.of(choices.Options())
    good, bad = choices.Settings(), choices.Settings(gamma="1")
    rows = list(work.compare(setup, [bad, good], count=4, seed=0))
    assert "its samples are digits" in report.findings(rows, good, "digit")[0]
    assert "its samples are not digits" in report.findings(rows, bad, "digit")[0]
    assert "1 of the 2 solvers (γ = 1)" in report.findings(rows, good, "digit")[1]
    assert not any("solvers" in sentence for sentence in report.findings(rows[1:], good, "digit"))
    assert "standard deviation 0." in report.findings(rows, good, "digit")[-1]


def test_a_chosen_solver_that_is_not_in_the_table_is_added() -> None:
    rows = work.every_solver(choices.Settings(gamma="0.9"))
    assert len(rows) == 15
    assert rows[-1].gamma == "0.9"
    assert len(work.every_solver(choices.Settings(gamma="1.0"))) == 14


# sample and invert


def test_sample_then_invert_gives_the_noise_back() -> None:
    output = run("sample --count 3 --seed 7 --save a/state.safetensors")
    assert "52 evaluations of the denoiser for 3 digits" in output
    output = run("invert a/state.safetensors --save code.safetensors")
    assert "50 evaluations" in output
    code = State.load("code.safetensors")
    noise = work.Setup.of(choices.Options())[0].noise(3, seed=7)
    assert code.partner is not None
    assert relative(code.partner, noise) < 1e-4
    std = float(output.split("standard deviation ")[1].split()[0])
    assert std == pytest.approx(noise.div(80).std().item(), abs=1e-3)
    for name in ("out/samples.png", "out/inverted.png"):
        with Image.open(name) as picture:
            assert picture.height == 2 * 64 + 6


def test_sampling_from_a_code_ends_where_it_came_from() -> None:
    run("sample --count 2 --labels 3,8 --dtype float64 --save state.safetensors")
    run("invert state.safetensors --save code.safetensors")
    run("sample --from code.safetensors --save again.safetensors")
    first, again = State.load("state.safetensors"), State.load("again.safetensors")
    assert relative(again.current, first.current) < 1e-10
    assert storage.read("again.safetensors")[1]["labels"] == [3, 8]
    images, labels = load_digits()
    nearest = torch.cdist(first.current.flatten(1), images.double().flatten(1)).argmin(1)
    assert labels[nearest].tolist() == [3, 8]


def test_a_code_may_be_sampled_under_another_label() -> None:
    run("sample --count 1 --labels 3 --save state.safetensors")
    run("invert state.safetensors --save code.safetensors")
    run("sample --from code.safetensors --labels 5")
    assert "labels = (3,), not (5,)" in refused("invert state.safetensors --labels 5")


def test_the_solver_and_grid_of_a_state_are_its_own() -> None:
    run("sample --count 1 --approximator ddim --gamma 0.9 --steps 9 --save s.safetensors")
    assert "8 evaluations" in run("invert s.safetensors")
    run("invert s.safetensors --gamma 0.90 --steps 9")
    assert "comes from another solver" in refused("invert s.safetensors --gamma 0.8")
    assert "comes from another grid" in refused("invert s.safetensors --steps 10")
    assert "leave out --dtype" in refused("invert s.safetensors --dtype float64")


def test_a_state_saved_by_the_library_needs_to_be_told_its_solver() -> None:
    solver, denoiser = BDIA(DDIM(), 1.0), IdealDenoiser(load_digits()[0])
    solution = solver.sample(denoiser, torch.randn(1, 1, 8, 8) * 80, karras_sigmas(5))
    solution.state.save("s.safetensors")
    assert "give --approximator and --gamma" in refused("invert s.safetensors")
    run("invert s.safetensors --approximator ddim --gamma 1")


def test_a_lone_image_is_inverted() -> None:
    digit = load_digits()[0][0]
    np.save("digit.npy", digit.numpy())
    output = run("invert digit.npy --save code.safetensors --dtype float64")
    assert "standard deviation 0." in output
    run("sample --from code.safetensors --save again.safetensors")
    assert relative(State.load("again.safetensors").current[0], digit) < 1e-10
    Image.fromarray(np.full((40, 30, 3), 255, np.uint8)).save("white.png")
    assert "evaluations" in run("invert white.png")


# edit, and the letters


def test_edit_draws_the_same_code_under_other_labels() -> None:
    output = run("edit --count 3 --labels 3,1,4 --to 0-2 --guidance 1 --steps 10 --dtype float64")
    assert re.search(r"back under its own label to \d\.\de-(0[6-9]|[12]\d)", output)
    with Image.open("out/edit.png") as picture:
        assert picture.width > 400


def test_an_edit_of_a_file_needs_its_label() -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("dark.png")
    assert "give --labels for dark.png" in refused("edit dark.png --to 3")
    run("edit dark.png --labels 1 --to 3 --steps 10")


def test_the_letters_are_the_default_where_they_are_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choices.default_model() == "letters"
    missing = dataclasses.replace(choices.MODELS["letters"], modules=("no_such_module",))
    monkeypatch.setitem(choices.MODELS, "letters", missing)  # type: ignore[arg-type]
    assert choices.default_model() == "digits"


@pytest.mark.usefixtures("k_diffusion")
def test_the_commands_run_on_the_letters() -> None:
    out = run("sample --model letters --count 2 --labels A,Z --steps 4 --save a.safetensors")
    assert "4 evaluations of the denoiser for 2 letters" in out
    assert storage.read("a.safetensors")[1]["guidance"] == 3.0
    assert "guidance = 3.0, not 1.0" in refused("invert a.safetensors --guidance 1")
    run("invert a.safetensors --save n.safetensors --model letters")
    noise = work.Setup.of(choices.Options(model="letters", steps=4))[0].noise(2, 0)
    assert relative(State.load("n.safetensors").partner, noise) < 1e-3
    run("sample --from n.safetensors --labels Z --model letters")
    assert "labels are A to Z, got '5'" in refused("sample --from n.safetensors --labels 5")
    run("invert a.safetensors --model letters --save code.safetensors")
    with pytest.warns(InversionWarning, match="code of a lone image"):  # so few steps
        out = run("edit --model letters --count 2 --to B --steps 6 --dtype float64")
    assert re.search(r"back under its own label to \d\.\de-(0[5-9]|[12]\d)", out)


# list


def test_list_names_everything() -> None:
    output = run("list")
    for table in (choices.APPROXIMATORS, choices.GRIDS, choices.MODELS):
        for name in table:
            assert f" {name} " in output
    for loader in choices.LOADERS:
        assert f" {loader.name} " in output
    assert "odesolvers[digits]" in output
    assert "odesolvers[letters]" in output
    assert "yes" in output


def test_list_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = choices.ModelChoice(lambda: pytest.fail("loaded"), "x", ("no_such_module",), "y")
    monkeypatch.setattr(report, "MODELS", {"absent": absent})
    assert re.search(r"absent +y +odesolvers\[x\] +no", run("list"))


# calibrate


def test_weights_that_were_learnt_serve_where_a_gamma_is_asked_for() -> None:
    grid = "--steps 6 --sigma-min 0.05 --approximator euler"
    output = run(f"calibrate {grid} --count 4 --runs 15 --out deep/rule.json")
    assert "wrote deep/rule.json (weights)" in output
    assert "encoding error" in output
    output = run(f"sample {grid} --gamma deep/rule.json --count 4 --save s.safetensors")
    assert "6 evaluations" in output
    assert "StepRatio" not in run("invert s.safetensors")
    assert "calibrated for Euler()" in refused(
        "sample --steps 6 --approximator ddim --gamma deep/rule.json"
    )
    assert "no such file" in refused("sample --gamma other.json").lower()


# options


def test_gamma_is_read() -> None:
    assert choices.gamma("0.5") == 0.5
    assert choices.gamma("step-ratio-2") == StepRatio(2.0)
    assert choices.gamma("step-ratio-0.5") == StepRatio(0.5)
    assert choices.gamma("smoothed-1") == SmoothedOutput(1.0)
    assert choices.gamma("smoothed-step-ratio-1") == SmoothedOutput(StepRatio(1.0))
    assert choices.gamma("damped-0.3-1") == DampedStepRatio(0.3, 1.0)


@pytest.mark.parametrize(
    "text", ["2", "-1", "nan", "abc", "", "step-ratio", "step-ratio-inf", "damped-1", "damped-0-1"]
)
def test_bad_gammas_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not usable.*step-ratio-P"):
        choices.gamma(text)


def test_labels_are_read() -> None:
    digits, letters = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert choices.labels("3", digits) == (3,)
    assert choices.labels("0-3,7", digits) == (0, 1, 2, 3, 7)
    assert choices.labels("A-C, Z", letters) == (0, 1, 2, 25)
    for text in ("", "a", "1,", "5-3", "-1", "5-", "12"):
        with pytest.raises(ValueError, match=r"labels are 0 to 9, got .*: give one"):
            choices.labels(text, digits)


def test_every_grid_can_be_asked_for() -> None:
    for name in choices.GRIDS:
        assert len(choices.Options(grid=name, steps=5).sigmas()) == 6
    assert torch.equal(choices.Options(steps=9, rho=3.0).sigmas(), karras_sigmas(9, rho=3.0))
    with pytest.raises(ValueError, match="takes no --sigma-max"):
        choices.Options(grid="vp", sigma_max=3.0).sigmas()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample --approximator heun", "no approximator 'heun'; did you mean 'heun-edm'? Known:"),
        ("sample --model digit", "no model 'digit'; did you mean 'digits'?"),
        ("sample --grid karas", "did you mean 'karras'?"),
        ("sample --dtype int8", "no dtype 'int8'"),
        ("sample --gamma 3", "--gamma 3 is not usable"),
        ("sample --steps 1", "needs n >= 2"),
        ("sample --sigma-min 90", "0 < sigma_min < sigma_max"),
        ("sample --count 0", "--count must be 1 or more"),
        ("sample --labels 1 --guidance 2", "needs labels, and a model that was trained without"),
        ("sample --labels 12", "labels are 0 to 9, got '12'"),
        ("sample --device nowhere", "device 'nowhere' cannot be used here"),
        ("sample --count 1 --save state.pt", "must end in .safetensors"),
        ("sample --count 1 --out picture.xyz", "use .png"),
        ("sample --stepps 3", "No such option"),
        ("roundtrip --count 1 --steps 3 --gamma 0", "cannot be inverted"),
        ("invert absent.png", "there is no file absent.png"),
        ("invert absent.safetensors", "there is no file absent.safetensors"),
        ("sample --from absent.safetensors", "there is no file absent.safetensors"),
    ],
)
def test_bad_options_are_explained(command: str, message: str) -> None:
    assert message in refused(command)


def test_files_of_another_kind_are_explained() -> None:
    Path("text.txt").write_text("no image")
    assert "none of what can be inverted" in refused("invert text.txt")
    Path("text.npy").write_text("no array")
    assert "not an array saved by numpy.save" in refused("invert text.npy")
    Path("text.safetensors").write_text("no state, nor any other safetensors file")
    assert "not a saved state" in refused("invert text.safetensors")
    np.save("large.npy", np.full((8, 8), 3.0))
    assert "floating point in [-1, 1]" in refused("invert large.npy")
    np.save("flat.npy", np.zeros(64))
    assert "(B, C, H, W), got (64,)" in refused("invert flat.npy")


@pytest.mark.parametrize(
    ("absent", "command", "message"),
    [
        ("sklearn.datasets", "sample", "odesolvers[digits]"),
        ("tqdm", "roundtrip", "odesolvers[cli]"),
        ("PIL", "sample --count 1", "odesolvers[cli]"),
        ("safetensors", "sample --count 1 --save s.safetensors", "odesolvers[cli]"),
        ("matplotlib.figure", "roundtrip --count 1 --steps 3", "odesolvers[cli]"),
    ],
)
def test_missing_extras_are_named(
    absent: str, command: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    if absent == "safetensors":
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert message in refused(command)


def test_without_typer_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from odesolvers.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'odesolvers[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_nothing_in_the_library_imports_the_command_line() -> None:
    code = "import sys, odesolvers, odesolvers.models; print('odesolvers.cli' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False"


# pictures


def test_a_contact_sheet_holds_every_image_in_its_place() -> None:
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
    sheet = pictures.contact_sheet(images, magnify=2, gap=1)
    assert sheet.shape == (2 * 4 + 1, 3 * 6 + 2, 3)
    for k, value in enumerate([0, 64, 128, 191, 255]):
        top, left = k // 3 * 5, k % 3 * 7
        assert (sheet[top : top + 4, left : left + 6] == value).all()
    assert (sheet[4] == pictures.SLATE).all()
    assert (sheet[5:, 14:] == pictures.SLATE).all()


def test_a_contact_sheet_clips_and_takes_colours() -> None:
    images = torch.tensor([3.0, -1.0, -7.0]).reshape(1, 3, 1, 1)
    assert pictures.contact_sheet(images, magnify=1).tolist() == [[[255, 0, 0]]]
    with pytest.raises(ValueError, match=r"got \(1, 4, 2, 2\)"):
        pictures.contact_sheet(torch.zeros(1, 4, 2, 2))


def test_signs_have_colours() -> None:
    red, white, blue = pictures.signed_colours(torch.tensor([1.0, 0, -1]).reshape(3, 1, 1, 1))
    assert red[0] > red[2]
    assert white.flatten().tolist() == [1, 1, 1]
    assert blue[2] > blue[0]


def test_images_are_read_in_the_form_of_the_model() -> None:
    digits = load_digits()[0][:2]
    np.save("two.npy", digits.numpy())
    assert torch.equal(pictures.read_images(Path("two.npy"), (1, 8, 8)), digits)
    np.save("bytes.npy", np.array([[0, 255]], np.uint8))
    assert pictures.read_images(Path("bytes.npy"), (1, 1, 2)).tolist() == [[[[-1, 1]]]]
    left_white = np.zeros((20, 40), np.uint8)
    left_white[:, :20] = 255
    Image.fromarray(left_white).save("half.png")
    (image,) = pictures.read_images(Path("half.png"), (1, 8, 8))
    torch.testing.assert_close(image[:, :, :3], torch.ones(1, 8, 3))
    torch.testing.assert_close(image[:, :, 5:], -torch.ones(1, 8, 3))
    assert pictures.read_images(Path("half.png"), (3, 4, 4)).shape == (1, 3, 4, 4)
