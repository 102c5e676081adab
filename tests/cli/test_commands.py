"""The commands, run as a person would, on few images and few steps."""

from __future__ import annotations

import dataclasses
import re

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
    karras_sigmas,
)
from odesolvers.cli import choices, report, work
from odesolvers.models import IdealDenoiser, load_digits

from .shell import DIGITS, Shell, code_std, setup_of

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
    assert "pip install '.[extra]'" in output
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
