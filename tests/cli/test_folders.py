"""Many pictures and states at once: prompts for each, files that cannot be read, folders of states."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import odesolvers
from odesolvers import BDIA, Calibrated, DampedStepRatio, Euler, State, cli, opening
from odesolvers.editing import interpolate
from odesolvers.models import load_emoji
from odesolvers.parsing import CONSTRUCTORS

from .shell import DIGITS, Shell, files, pixels
from .test_commands import FEW, GRID, label, save_drawings, to_bytes


def save_digits(count: int, folder: str = "photos") -> None:
    Path(folder).mkdir(exist_ok=True)
    for k in range(count):
        picture = np.random.default_rng(k).integers(0, 255, (8, 8)).astype(np.uint8)
        Image.fromarray(picture).save(f"{folder}/{k}.png")


def codes(folder: str) -> list[torch.Tensor]:
    return [State.load(name).current for name in files(folder) if name.endswith(".safetensors")]


# prompts


def test_each_picture_has_its_prompt(shell: Shell) -> None:
    save_digits(3)
    shell.run(f"invert photos --prompt 1 --prompt 2 --prompt 3 --out each{DIGITS}")
    for k in range(3):
        shell.run(f"invert photos/{k}.png --prompt {k + 1} --out alone{k}{DIGITS}")
        assert torch.equal(codes("each")[k], codes(f"alone{k}")[0])
        assert State.load_with_notes(f"each/{k}.safetensors")[1]["prompt"] == str(k + 1)
    shell.run(f"edit photos --to 4 --to 5 --to 6 --guidance 1 --out edits{DIGITS}")
    shell.run(f"edit photos/1.png --to 5 --guidance 1 --out one{DIGITS}")
    assert (pixels("edits/1.png") == pixels("one/1.png")).all()
    shell.run(
        f"sample each --prompt 7 --prompt 8 --prompt 9 --out again{DIGITS.split(' --steps')[0]}"
    )
    shell.run("sample each/2.safetensors --prompt 9 --out last")
    assert (pixels("again/2.png") == pixels("last/2.png")).all()


@pytest.mark.parametrize(
    "command",
    ["invert photos", "edit photos --to 3", "roundtrip photos", "watermark detect photos --key k"],
)
def test_other_numbers_of_prompts_are_refused(shell: Shell, command: str) -> None:
    save_digits(3)
    message = shell.refused(f"{command} --prompt 1 --prompt 2{DIGITS}")
    assert "--prompt is given 2 times, for 3 pictures: give one for all of them, or one" in message
    assert "--prompt is given 3 times, for 2 pictures" in shell.refused(
        f"sample --count 2 --prompt 1 --prompt 2 --prompt 3{DIGITS}"
    )


def test_a_picture_that_gets_another_prompt_is_made_again(shell: Shell) -> None:
    save_digits(2)
    shell.run(f"invert photos/0.png photos/1.png --prompt 1 --prompt 2{DIGITS}")
    before = codes("out/invert")
    output = shell.run(f"invert photos/1.png photos/0.png --prompt 1 --prompt 2{DIGITS}")
    assert output == "wrote 2 pictures in out/invert\n"
    assert not torch.equal(codes("out/invert")[0], before[0])


def test_an_interpolation_has_a_prompt_for_each_end(shell: Shell) -> None:
    images = save_drawings()
    command = f"interpolate photos --frames 3 --guidance 1 --dtype float64 --solver damped{FEW}"
    shell.run(f"{command} --prompt cat-face --prompt flag")
    noise = 0.02 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    a, b = (images[k : k + 1].double() + noise for k in (0, 1))
    options: Any = {"frames": 3, "source": label("cat-face"), "target": label("flag")}
    right = interpolate(BDIA(Euler(), DampedStepRatio()), load_emoji(), a, b, GRID, **options)
    assert abs(pixels("out/interpolate/002.png") - to_bytes((right[1].x - noise)[0])).max() <= 1
    assert abs(pixels("out/interpolate/003.png") - pixels("photos/1.png")).max() <= 1


# files that cannot be read


def test_files_that_cannot_be_read_are_skipped_and_listed(shell: Shell) -> None:
    save_digits(4)
    Path("photos/1.png").write_bytes(Path("photos/1.png").read_bytes()[:60])
    Path("photos/notes.txt").write_text("no picture")
    Path("photos/broken.safetensors").write_text("no state")
    command = f"invert photos{DIGITS}"
    assert shell.refused(command) == "Error: 3 of 6 files were skipped, see above"
    skipped = [line for line in shell.error.splitlines() if line.startswith("Skipped: ")]
    assert [line.split()[1] for line in skipped] == [
        f"photos/{name}" for name in ("1.png", "broken.safetensors", "notes.txt")
    ]
    assert "is a damaged picture" in skipped[0]
    assert "not a saved state" in skipped[1]
    assert "cannot be read as an image" in skipped[2]
    assert [name for name in files("out") if name.endswith("png")] == [
        f"out/invert/{k}.png" for k in (0, 2, 3)
    ]
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("photos/1.png")  # repaired
    assert shell.refused(command) == "Error: 2 of 6 files were skipped, see above"
    assert "out/invert/1.png" in files("out")
    assert (
        shell.refused(f"roundtrip photos{DIGITS}") == "Error: 1 of 5 files were skipped, see above"
    )
    shell.refused(f"watermark detect photos --key k{DIGITS}")
    assert shell.error.count("Skipped") == 1
    assert "notes.txt cannot be read" in shell.refused(
        f"interpolate photos/0.png photos/notes.txt{DIGITS}"
    )


# folders of states


def test_folders_of_states_are_taken_again(shell: Shell) -> None:
    shell.run(f"sample --count 2 --prompt 3 --dtype float64 --save --out a{DIGITS}")
    shell.run("invert a --out b")
    shell.run("sample b --save --out c")
    for first, last in zip(codes("a"), codes("c"), strict=True):
        assert (first - last).norm() < 1e-9 * first.norm()
    for folder in ("a", "b"):  # samples, and the codes of them: the same edits
        shell.run(f"edit {folder} --to 5 --guidance 1 --save --out edited_{folder}")
    for one, other in zip(codes("edited_a"), codes("edited_b"), strict=True):
        assert (one - other).norm() < 1e-9 * one.norm()
    shell.run("edit a --to 3 --out same")  # under its own prompt
    assert (pixels("same/000001.png") == pixels("a/000001.png")).all()
    shell.run("invert edited_a --out code")
    for one, other in zip(codes("code"), codes("b"), strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()
    assert "a/000000.safetensors is none of the pictures that the command takes" in (
        shell.refused(f"roundtrip a/000000.safetensors --out x{DIGITS}")
    )
    save_digits(1)
    assert "there are no states in photos" in shell.refused("sample photos --out x")


def test_the_strength_of_an_edit_of_a_state(shell: Shell) -> None:
    shell.run(f"sample --count 1 --prompt 3 --save --out a{DIGITS}")
    shell.run("invert a --out b")
    shell.run("edit a --to 5 --guidance 1 --strength 0.4 --out weak")
    shell.run("edit a --to 5 --guidance 1 --out strong")
    away = [
        abs(pixels(f"{f}/000000.png") - pixels("a/000000.png")).mean() for f in ("weak", "strong")
    ]
    assert away[0] < away[1]
    assert "--strength is for pictures and samples, and b/000000.safetensors is noise" in (
        shell.refused("edit b --to 5 --guidance 1 --strength 0.4 --out x")
    )
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("mask.png")
    assert "--mask is for pictures" in shell.refused("edit a --to 5 --mask mask.png --out x")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "--solver codes",
            "with solver = BDIA(Euler(), gamma=DampedStepRatio()), not BDIA(Euler()",
        ),
        ("--steps 8", "on a grid of its own, 6 steps from 80 to 0: leave out --steps"),
        ("--sigma-max 70 --rho 6", "leave out --sigma-max, --rho"),
        ("--grid exponential", "leave out --grid"),
        ("--count 2", "--count is for pictures from noise, not from states"),
        ("--seed 2", "--seed is for pictures from noise"),
        ("--batch 2", "--batch is for pictures from noise"),
        ("--dtype float64", "with dtype = torch.float32, not torch.float64"),
    ],
)
def test_options_that_contradict_a_state_are_refused_by_name(
    shell: Shell, options: str, words: str
) -> None:
    shell.run(f"sample --count 1 --save --out a{DIGITS}")
    shell.run("invert a --out b")
    assert words in shell.refused(f"sample b --out c {options}")
    assert files("c") == []
    shell.run("sample b --out c --solver damped --steps 6 --model digits")  # those of the state


def test_a_sample_is_not_sampled_under_another_prompt(shell: Shell) -> None:
    shell.run(f"sample --count 1 --prompt 3 --save --out a{DIGITS}")
    assert "another prompt changes nothing: invert it first" in shell.refused("sample a --prompt 5")


def test_a_model_is_opened_once(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    load, what = opening.BUNDLED["digits"]
    opened = []
    entry = (lambda: opened.append(1) or load()), what
    monkeypatch.setitem(opening.BUNDLED, "digits", entry)  # type: ignore[arg-type]
    save_digits(4)
    for command in (
        f"sample --count 4 --save --out a{DIGITS}",
        "invert a --out b",
        "sample b --out c",
        "edit b --to 3 --guidance 1 --out d",
        f"invert photos{DIGITS}",
        f"roundtrip photos{DIGITS}",
        f"watermark detect photos --key k{DIGITS}",
    ):
        opened.clear()
        shell.run(command)
        assert len(opened) == 1, command


# masks, calibrations, messages


def test_a_mask_is_drawn_over_the_photo(shell: Shell) -> None:
    """A wide photo, stored lying on its side, and a mask over it as it is shown."""
    wide = np.random.default_rng(0).integers(0, 255, (32, 64, 3)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(wide, 1).copy()).save("photo.png", exif=turned)
    mask = np.zeros((32, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save("mask.png")
    shell.run(f"edit photo.png --prompt cat-face --to flag --mask mask.png{FEW}")
    found, given = pixels("out/edit/photo.png"), wide[:, 16:48].astype(int)
    assert (found[:, :16] == given[:, :16]).all()
    assert abs(found[:, 16:] - given[:, 16:]).mean() > 3
    shell.run(
        f"edit photo.png --prompt cat-face --to flag --mask mask.png --fit pad --out pad{FEW}"
    )
    found = pixels("pad/photo.png")
    assert (found[:7] == 255).all()  # what was added is kept
    Image.fromarray(mask.T.copy()).save("tall.png")
    assert (
        "the mask tall.png is 32 x 64 pixels: draw one over the photo as it is shown, 64 x 32"
        in (
            shell.refused(
                f"edit photo.png --prompt cat-face --to flag --mask tall.png --out x{FEW}"
            )
        )
    )


def test_levels_that_were_learned_are_those_of_the_run(shell: Shell) -> None:
    shell.run(f"calibrate --levels --sigma-min 0.05 --count 4 --runs 30 --out rule.json{DIGITS}")
    rule = Calibrated.load("rule.json")
    assert rule.levels_learned
    sample = "sample --model digits --count 1 --save --solver \"load('rule.json')\""
    shell.run(f"{sample} --out a")
    assert State.load("a/000000.safetensors").sigmas == rule.levels
    shell.run(f"{sample} --steps 9 --out b")
    assert State.load("b/000000.safetensors").sigmas == tuple(rule.sigmas_in(9).tolist())
    message = shell.refused(f"{sample} --steps 6 --rho 4 --out c")
    assert "or leave out --steps, --grid, --sigma-min and --sigma-max for its own levels" in message


def test_list_names_every_constructor_and_every_prompt(shell: Shell) -> None:
    from odesolvers.extend import IntegrationApproximator, Solver
    from odesolvers.models.emoji import emoji_groups

    output = shell.run("list")
    words = set(output.replace(",", " ").split())

    def below(kind: type) -> set[str]:
        found = set[str]()
        for made in kind.__subclasses__():
            public = made.__module__.startswith("odesolvers.") and hasattr(
                odesolvers, made.__name__
            )
            found |= below(made) | ({made.__name__} if public else set())
        return found

    kinds = (Solver, IntegrationApproximator, odesolvers.GammaRule)
    classes = set[str]().union(*map(below, kinds)) - {kind.__name__ for kind in kinds}
    assert {"EDICT", "Euler", "PerStep"} <= classes
    assert classes <= words
    assert CONSTRUCTORS.keys() <= words
    plain = " ".join(output.split())
    assert all(name in plain for names in emoji_groups().values() for name in names)
    assert max(map(len, output.splitlines())) <= 80


def test_help_shows_the_steps_and_the_guidance_of_the_models(shell: Shell) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    output = " ".join(shell.capsys.readouterr().out.split())
    steps = {name: load().steps for name, (load, _) in opening.BUNDLED.items()}
    scales = {name: load().guidance for name, (load, _) in opening.BUNDLED.items()}
    assert f"(emoji {steps['emoji']}; pipelines 50; others" in output
    assert f"others {steps['digits']})" in output
    assert f"with a prompt: emoji {scales['emoji']:g}; others 1" in output


def test_the_emoji_are_named_by_their_subgroup(shell: Shell) -> None:
    options = "--model emoji --steps 3 --guidance 1 --count 1"
    shell.run(f"sample {options} --prompt cat-face --out a")
    shell.run(f"sample {options} --prompt 'cat-face, twemoji' --out b")
    shell.run(f"sample {options} --prompt 'person, medium, dark' --out c")
    assert (pixels("a/000000.png") != pixels("b/000000.png")).any()
    for prompt in ("cat", "cat-face, blue", "cat-face, noto, twemoji"):
        message = shell.refused(f"sample {options} --prompt '{prompt}' --out d")
        assert f"got '{prompt}'" in message
        assert "`odesolvers list` names all" in message
    assert "did you mean 'cat-face'?" in shell.refused(f"sample {options} --prompt cat --out d")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample --prompt 3 --guidance 2", "guidance leads away from no prompt, which this model"),
        ("sample --guidance 2", "--guidance changes nothing without a prompt"),
        ("sample --prompt 3 --negative 5", "--negative changes nothing without guidance"),
        ("sample --save --batch 4", "--batch is 1 for states and exact solvers"),
        ("sample --solver exact --batch 4", "--batch is 1 for states and exact solvers"),
        ("roundtrip --fit pad", "--fit is for pictures, not for noise"),
        ("watermark embed --key ''", "--key: must not be empty"),
        ("watermark detect out --key ''", "--key: must not be empty"),
        ("watermark detect out --key k --guidance 3", "watermark detect takes no '--guidance'"),
        ("calibrate --solver edict", "calibrate takes no '--solver'"),
        ("sample --steps -1", "--steps: must be a whole number from 1 to 10000, got '-1'"),
        ("roundtrip --compare nothing", "'nothing'"),
    ],
)
def test_what_would_change_nothing_is_refused(shell: Shell, command: str, words: str) -> None:
    Path("out").mkdir()
    model = "" if "--steps" in command else DIGITS
    assert words in shell.refused(command + model)


def test_guidance_of_digits_leads_away_from_another_digit(shell: Shell) -> None:
    shell.run(f"sample --prompt 3 --guidance 2 --negative 5 --count 1{DIGITS}")


def test_an_error_is_not_hidden_by_results_of_other_settings(shell: Shell) -> None:
    shell.run(f"sample --prompt 3 --count 1{DIGITS}")
    assert "prompts of this model are 0 to 9, got 'x'" in shell.refused(
        f"sample --prompt x --count 1{DIGITS}"
    )
    save_digits(1)
    assert "0.png is none of the states" in shell.refused("sample photos/0.png")
    message = shell.refused(f"sample --prompt 4 --guidance 1 --count 1{DIGITS}")
    assert (
        "holds results of other settings: guidance was not given and is 1.0, prompt was 3 and"
        in (message)
    )
    shell.run(f"watermark embed --key a --count 1{DIGITS}")
    message = shell.refused(f"watermark embed --key b --count 1{DIGITS}")
    assert "other settings: another key; give" in message
    assert shlex.split(message)[0] == "Error:"


def test_no_pipeline_is_loaded_to_say_that_settings_differ(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.run(f"sample --count 1{DIGITS}")
    monkeypatch.setattr("odesolvers.cli.work.open_model", lambda *_: pytest.fail("opened"))
    assert "holds results of other settings" in shell.refused("sample --count 1 --model folder")


def test_results_of_other_pictures_are_not_replaced(shell: Shell) -> None:
    save_digits(3)
    shell.run(f"interpolate photos/0.png photos/1.png --frames 2{DIGITS}")
    other = f"interpolate photos/0.png photos/2.png --frames 2{DIGITS}"
    before = pixels("out/interpolate/002.png")
    assert "other settings: other pictures; give" in shell.refused(other)
    assert (pixels("out/interpolate/002.png") == before).all()
    shell.run(f"{other} --again")
    assert (pixels("out/interpolate/002.png") != before).any()


def test_a_calibration_is_not_replaced(shell: Shell) -> None:
    command = f"calibrate --count 1 --runs 2{DIGITS}"
    shell.run(command)
    assert "out/gamma.json is there" in shell.refused(command)
    shell.run(f"{command} --again")


def test_a_solver_that_does_not_exist_is_refused_before_the_work(shell: Shell) -> None:
    assert "'nothing'" in shell.refused(f"roundtrip --compare belm --compare nothing{DIGITS}")
    assert files() == []


def test_a_calibration_of_another_range_has_its_own_levels(shell: Shell) -> None:
    levels = odesolvers.karras_sigmas(5, 0.05, 10.0)
    Calibrated("Euler()", tuple(levels.tolist()), (0.5, 0.75, 0.625, 0.7)).save("g.json")
    sample = "sample --model digits --count 1 --save --solver \"load('g.json')\""
    shell.run(f"{sample} --out a")
    assert State.load("a/000000.safetensors").sigmas == tuple(levels.tolist())
    message = shell.refused(f"{sample} --steps 6 --out b")
    assert "calibrated on levels from 10 to 0, this grid begins at 80" in message
    assert "or leave out --steps" in message


def test_a_warning_is_said_once(shell: Shell) -> None:
    save_digits(3)
    shell.run("invert photos --steps 5 --model digits")
    assert shell.error.count("Warning: the code of a lone image") == 1
    assert "StepRatio(1)" not in shell.error.split("Use ")[1].split(";")[0]
