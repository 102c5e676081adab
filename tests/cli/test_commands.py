"""The commands, run as a person would, on few pictures and few steps."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from odesolvers import (
    BDIA,
    Calibrated,
    DampedStepRatio,
    Euler,
    State,
    StepRatio,
    karras_sigmas,
    stability_report,
)
from odesolvers.editing import edit, mark, matches
from odesolvers.models import (
    ClassifierFreeGuidance,
    IdealDenoiser,
    emoji_drawings,
    emoji_labels,
    load_digits,
    load_emoji,
)

from .shell import DIGITS, Shell, files, pixels

GRID = karras_sigmas(7, 0.02, append_zero=False)
FEW = " --steps 6"


def to_bytes(x: torch.Tensor) -> np.ndarray:
    """Images (C, H, W) in [-1, 1] as a picture has them."""
    return ((x.double().clamp(-1, 1) + 1) * 127.5).round().int().permute(1, 2, 0).numpy()


def save_drawings(count: int = 2, folder: str = "photos") -> torch.Tensor:
    """Drawings that were not trained on, as files, and their values."""
    Path(folder).mkdir(exist_ok=True)
    drawings = emoji_drawings()
    images = drawings.images[drawings.withheld][24 : 24 + count]
    for k, image in enumerate(images):
        Image.fromarray(to_bytes(image).astype(np.uint8)).save(f"{folder}/{k}.png")
    return torch.stack([torch.from_numpy(to_bytes(i)).permute(2, 0, 1) / 127.5 - 1 for i in images])


def label(name: str) -> dict[str, torch.Tensor]:
    return {"class_labels": emoji_labels(name) if name else 0 * emoji_labels("cat-face")}


# sample, invert, and the states between them


def test_samples_are_those_of_the_library(shell: Shell) -> None:
    output = shell.run(f"sample --count 3 --seed 5 --prompt cat-face --prompt flag {FEW}")
    assert output == "wrote 3 pictures in out/sample\n"
    assert files() == [f"out/sample/00000{k}.png" for k in (5, 6, 7)]
    generator = torch.Generator().manual_seed(6)
    x = (80 * torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.float64)).float()
    guided = ClassifierFreeGuidance(load_emoji(), 3.0)
    extra = {"positive": label("flag"), "negative": label("")}
    right = BDIA(Euler(), DampedStepRatio()).sample(guided, x, GRID, extra_args=extra).x
    assert abs(pixels("out/sample/000006.png") - to_bytes(right[0])).max() <= 1


def test_there_and_back_by_states(shell: Shell) -> None:
    shell.run("sample --count 2 --prompt 3 --dtype float64 --save" + DIGITS)
    shell.run("invert out/sample/000000.safetensors out/sample/000001.safetensors")
    code = State.load("out/invert/000001.safetensors")
    generator = torch.Generator().manual_seed(1)
    noise = 80 * torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    assert code.partner is not None
    assert (code.partner - noise).norm() < 1e-6 * noise.norm()
    assert re.search(r"000001: code of mean -?0\.\d+, standard deviation [01]\.\d+", shell.error)
    shell.run("sample out/invert/000000.safetensors --out again --save")
    assert (pixels("again/000000.png") == pixels("out/sample/000000.png")).all()
    first, notes = State.load_with_notes("out/sample/000000.safetensors")
    assert notes["prompt"] == "3"
    assert torch.allclose(State.load("again/000000.safetensors").current, first.current, atol=1e-9)
    shell.run("sample out/invert/000000.safetensors --prompt 5 --out five")
    assert (pixels("five/000000.png") != pixels("again/000000.png")).any()


def test_options_that_contradict_a_state_are_refused(shell: Shell) -> None:
    shell.run("sample --count 1 --prompt 3 --save" + DIGITS)
    state = "out/sample/000000.safetensors"
    assert "made with prompt = 3, not 5" in shell.refused(f"invert {state} --prompt 5")
    assert "with guidance = 1.0, not 2.0" in shell.refused(f"invert {state} --guidance 2")
    assert "leave out --dtype" in shell.refused(f"invert {state} --dtype float64")
    assert "with model = digits, not emoji" in shell.refused(
        f"sample {state} --model emoji --out x"
    )
    State.load(state).save("bare.safetensors")
    assert "was not saved by a command" in shell.refused("invert bare.safetensors --out y")


def test_fixed_point_goes_back_to_the_bit(shell: Shell) -> None:
    shell.run("sample --solver exact --count 2 --save" + DIGITS)
    shell.run("invert out/sample/000001.safetensors")
    shell.run("sample out/invert/000001.safetensors --save --out again")
    a, b = (State.load(f"{f}/000001.safetensors") for f in ("out/sample", "again"))
    assert torch.equal(a.current, b.current)


def test_the_default_of_codes_is_the_recommended_one(shell: Shell) -> None:
    save_drawings(1)
    shell.run(f"invert photos/0.png --prompt cat-face {FEW} --dtype float64")
    code = State.load("out/invert/0.safetensors")
    assert code.solver == repr(BDIA(Euler(), StepRatio(1)))
    assert code.sigmas == tuple(GRID.tolist())
    assert pixels("out/invert/0.png").shape == (32, 32, 3)
    shell.run("sample out/invert/0.safetensors")
    # Back to the picture with the noise of the last level, 0.02, that was added to it.
    difference = pixels("out/sample/0.png") - pixels("photos/0.png")
    assert 0.3 < np.sqrt((difference**2).mean()) / (0.02 * 127.5) < 1.2


# edit


def test_an_edit_is_that_of_the_library(shell: Shell) -> None:
    images = save_drawings()
    shell.run(
        f"edit photos --prompt cat-face --to flag {FEW} --dtype float64 --strength 0.8 --guidance 2"
    )
    assert files("out") == ["out/edit/0.png", "out/edit/1.png"]
    noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    x = images[1:].double() + 0.02 * noise
    options: Any = {
        "source": label("cat-face"),
        "target": label("flag"),
        "guidance": 2.0,
        "strength": 0.8,
    }
    options["negative"] = label("")
    right = edit(BDIA(Euler(), DampedStepRatio()), load_emoji(), x, GRID, **options)
    assert abs(pixels("out/edit/1.png") - to_bytes((right.x - 0.02 * noise)[0])).max() <= 1
    shell.run(
        f"edit photos/1.png --prompt cat-face --to cat-face --guidance 1 --out same.png {FEW}"
    )
    assert abs(pixels("same.png") - pixels("photos/1.png")).max() <= 1


def test_a_saved_edit_leads_back_to_the_code_of_the_picture(shell: Shell) -> None:
    save_drawings(1)
    options = f"--prompt cat-face --solver damped --dtype float64 {FEW}"
    shell.run(f"edit photos --to flag {options} --save")
    shell.run(f"invert photos {options} --out code")
    shell.run("invert out/edit/0.safetensors")
    codes = [State.load(f"{f}/0.safetensors").partner for f in ("code", "out/invert")]
    assert codes[0] is not None
    assert codes[1] is not None
    assert (codes[0] - codes[1]).norm() < 1e-9 * codes[0].norm()


@pytest.mark.parametrize("solver", ["damped", "exact"])
def test_outside_of_the_mask_the_picture_is_as_it_was(shell: Shell, solver: str) -> None:
    save_drawings(1)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save("mask.png")
    command = f"edit photos/0.png --prompt cat-face --to flag --mask mask.png --solver {solver}"
    shell.run(command + FEW)
    found, given = pixels("out/edit/0.png"), pixels("photos/0.png")
    assert (found[:, :16] == given[:, :16]).all()
    assert abs(found[:, 16:] - given[:, 16:]).mean() > 3


def test_a_code_of_half_the_way_is_noise_of_its_own_level(shell: Shell) -> None:
    save_drawings(1)
    shell.run(
        "edit photos/0.png --prompt cat-face --to flag --strength 0.5 --solver codes --steps 24"
    )
    said = shell.error.split("standard deviation ")[1].split()[0]
    assert 0.5 < float(said) < 2  # and not 0.04, which is that over the first level


# interpolate


def test_an_interpolation_ends_at_the_pictures(shell: Shell) -> None:
    save_drawings()
    output = shell.run(f"interpolate photos/0.png photos/1.png --frames 4 {FEW}")
    assert output == "wrote 4 pictures in out/interpolate\n"
    assert files("out") == [f"out/interpolate/00{k}.png" for k in (1, 2, 3, 4)]
    for frame, photo in ((1, 0), (4, 1)):
        got, given = pixels(f"out/interpolate/00{frame}.png"), pixels(f"photos/{photo}.png")
        assert abs(got - given).max() <= 1
    assert abs(pixels("out/interpolate/002.png") - pixels("photos/0.png")).mean() > 3
    assert "two pictures" in shell.refused("interpolate photos/0.png --out x")


# watermark


def test_a_watermark_is_found_by_its_key_alone(shell: Shell) -> None:
    shell.run(f"watermark embed --key mine --count 2 --prompt cat-face {FEW}")
    output = shell.run(f"watermark detect out/watermark --key mine --prompt cat-face {FEW}")
    found = [float(p) for p in re.findall(r"p = 10\^(-?[\d.]+)", output)]
    assert len(found) == 2
    assert max(found) < -10
    output = shell.run(f"watermark detect out/watermark --key other {FEW}")
    assert min(float(p) for p in re.findall(r"p = 10\^(-?[\d.]+)", output)) > -4
    assert "mine" not in Path("out/watermark/.odesolvers.json").read_text()
    marked = mark(torch.ones(1, 3, 32, 32), "mine")
    assert matches(marked, "mine").agreeing.item() == 3072
    assert "takes no 'out/watermark'" in shell.refused("watermark embed out/watermark --key a")


# roundtrip, calibrate, report, list


def test_a_round_trip_compares_solvers(shell: Shell) -> None:
    save_drawings(1)
    output = shell.run(f"roundtrip photos --compare ddim --compare edict --dtype float64 {FEW}")
    rows = {line.split()[1]: line.split() for line in output.splitlines()[1:-1]}
    assert list(rows) == ["damped", "ddim", "edict"]
    assert float(rows["damped"][3]) < 1e-12 < 1e-3 < float(rows["ddim"][3])
    assert rows["ddim"][2] == "6+6"
    assert pixels("out/roundtrip/0.png").shape == (96, 3 * (32 * 3 + 4), 3)  # enlarged
    output = shell.run("roundtrip --compare damped --out noise" + DIGITS)
    assert [line.split()[1] for line in output.splitlines()[1:-1]] == ["damped"]


def test_weights_that_were_learned_serve_as_a_solver(shell: Shell) -> None:
    output = shell.run(
        "calibrate --sigma-min 0.05 --count 4 --runs 8 --out deep/rule.json" + DIGITS
    )
    assert "encoding error" in output
    assert output.endswith("wrote deep/rule.json\n")
    rule = "\"load('deep/rule.json')\""
    shell.run(f"sample --sigma-min 0.05 --solver {rule} --count 1 --save{DIGITS}")
    Path("deep/rule.json").unlink()
    shell.run("invert out/sample/000000.safetensors")  # the state carries the weights
    state = State.load("out/sample/000000.safetensors")
    assert state.solver.startswith("BDIA(Euler(), gamma=Calibrated(")


def test_other_weights_in_a_file_of_the_same_name_are_noticed(shell: Shell) -> None:
    sigmas = tuple(karras_sigmas(4).tolist())
    command = "sample --count 1 --model digits --steps 4 --solver \"load('g.json')\""
    Calibrated("Euler()", sigmas, (0.5, 0.75, 0.625)).save("g.json")
    shell.run(command)
    assert "1 of 1 are finished" in shell.run(command)
    Calibrated("Euler()", sigmas, (0.5, 0.75, 0.5)).save("g.json")
    assert "other settings: solver was BDIA(Euler(), gamma=Calibrated(" in shell.refused(command)


def test_the_report_is_that_of_the_library(shell: Shell) -> None:
    output = shell.run("report --model emoji --steps 6")
    assert output == f"{stability_report(BDIA(Euler(), DampedStepRatio()), GRID)}\n"


def test_list_names_what_the_options_take(shell: Shell) -> None:
    output = shell.run("list")
    for name in ("damped", "codes", "exact", "ddim", "emoji", "digits", "karras", "hub id"):
        assert name in output
    assert max(len(line) for line in output.splitlines()) <= 80


# finished results, and folders


def test_what_is_finished_is_not_made_again(shell: Shell) -> None:
    save_drawings(3)
    command = f"edit photos --prompt cat-face --to flag {FEW}"
    shell.run(command)
    before = {name: Path(name).stat().st_mtime_ns for name in files("out")}
    Path("out/edit/1.png").unlink()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save("photos/2.png")  # another picture
    output = shell.run(command)
    assert output == "1 of 3 are finished in out/edit\nwrote 2 pictures in out/edit\n"
    after = {name: Path(name).stat().st_mtime_ns for name in files("out")}
    assert [before[name] == after[name] for name in sorted(before)] == [True, False, False]
    message = shell.refused(command.replace("--to flag", "--to heart"))
    assert (
        "out/edit holds results of other settings: to was flag and is heart; give another --out"
        in message
    )
    assert "wrote 3" in shell.run(command.replace("--to flag", "--to heart") + " --again")


def test_more_samples_go_on_from_those_that_are_there(shell: Shell) -> None:
    shell.run("sample --count 2" + DIGITS)
    first = pixels("out/sample/000001.png")
    assert "wrote 2 pictures" in shell.run("sample --count 4 --batch 1" + DIGITS)
    assert (pixels("out/sample/000001.png") == first).all()
    shell.run("sample --count 4 --batch 3 --out other" + DIGITS)  # the batch changes nothing
    for k in range(4):
        assert abs(pixels(f"other/00000{k}.png") - pixels(f"out/sample/00000{k}.png")).max() <= 1


# networks of one's own, and EDM's

OWN = """
import torch
class Denoiser:
    shape = (1, 8, 8)
    sigma_min, sigma_max = 0.01, 50.0
    def __call__(self, x, sigma, mean=0.0):
        v = (sigma**2).reshape(-1, 1, 1, 1).to(x)
        return (0.09 * x + v * mean) / (0.09 + v)
    def condition(self, prompts):
        return {"mean": float(prompts[0] or 0)}
def load():
    return Denoiser()
def poor():
    return lambda x, sigma: x
"""


def test_a_function_of_ones_own_is_a_model(shell: Shell) -> None:
    Path("mine_for_test.py").write_text(OWN)
    shell.run("sample --model mine_for_test:load --prompt 0.5 --guidance 1 --count 2 --save")
    state = State.load("out/sample/000001.safetensors")
    assert state.sigmas == tuple(karras_sigmas(18, 0.01, 50.0).tolist())
    shift = 1 - 0.3 / math.hypot(0.3, 50)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    right = 0.5 * shift + 50 * z * 0.3 / math.hypot(0.3, 50)
    assert (state.current - right).abs().max() < 0.1
    assert "attribute `shape`" in shell.refused("sample --model mine_for_test:poor --out x")
    assert "cannot be imported" in shell.refused("sample --model mine_for_test:none --out x")
    assert "cannot be imported" in shell.refused("sample --model no_such_module:f --out x")


def test_edm_checkpoints_are_models(shell: Shell) -> None:
    from odesolvers.models import save_edm
    from odesolvers.models.edm import EDMPrecond, SongConfig, SongUNet

    config = SongConfig(
        img_resolution=8,
        in_channels=3,
        out_channels=3,
        label_dim=4,
        model_channels=8,
        channel_mult=(1,),
        num_blocks=1,
        attn_resolutions=(),
    )
    save_edm(EDMPrecond(SongUNet(config)), "net.safetensors")
    output = shell.run("sample --model net.safetensors --prompt 3 --count 1 --steps 4")
    assert "wrote 1 picture in out/sample" in output
    assert pixels("out/sample/000000.png").shape == (8, 8, 3)
    assert "prompts of this model are 0 to 3, got '4'" in shell.refused(
        "sample --model net.safetensors --prompt 4 --out x"
    )


def test_the_digits_are_the_ideal_denoiser(shell: Shell) -> None:
    """Its samples are digits of the data, whatever the noise."""
    shell.run("sample --count 3 --model digits --steps 18 --prompt 7 --save")
    images, labels = load_digits()
    for k in range(3):
        x = State.load(f"out/sample/00000{k}.safetensors").current
        nearest = torch.cdist(x.flatten(1), images.flatten(1)).argmin()
        assert labels[nearest] == 7
    assert IdealDenoiser(images, labels) is not None
