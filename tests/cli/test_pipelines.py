"""The commands on miniature pipelines of diffusers: those of docs/gallery.md among them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from odesolvers import BDIA, DDIM, DampedStepRatio, State
from odesolvers.models import load_stable_diffusion, save_tiny_stable_diffusion
from odesolvers.opening import open_model
from odesolvers.pipelines import PipelineDenoiser

from ..tiny_pipelines import save_pipeline
from .shell import Shell, files, pixels

PAGE = Path(__file__).parents[2] / "docs" / "gallery.md"


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pipelines with random weights."""
    folder = tmp_path_factory.mktemp("stored")
    save_tiny_stable_diffusion(folder / "sd", "1.x")
    save_tiny_stable_diffusion(folder / "sdxl", "xl")
    return folder


@pytest.fixture
def _photos() -> None:
    """Photos larger than the model's pictures, of other proportions, and a mask."""
    rng = np.random.default_rng(0)
    Path("photos").mkdir()
    for name in ("photo.jpg", "a.jpg", "b.jpg", "photos/1.jpg", "photos/2.jpg"):
        ramp = np.linspace(0, 200, 40)[None, :, None] + rng.integers(0, 55, 3)
        Image.fromarray(np.broadcast_to(ramp, (30, 40, 3)).astype(np.uint8)).save(name)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save("mask.png")


def commands() -> list[str]:
    """The commands of the page for Stable Diffusion, in order."""
    text = PAGE.read_text().split("## Stable Diffusion")[1].split("\n## ")[0]
    return re.findall(r"^\$ odesolvers (.*?)(?: +# .*)?$", text.replace("\\\n", ""), re.MULTILINE)


@pytest.mark.usefixtures("_photos")
def test_the_commands_of_the_gallery_run(shell: Shell, stored: Path) -> None:
    """Word for word, but for the model, which is a tiny one, on the CPU, and 4 steps."""
    found = commands()
    assert {command.split()[0] for command in found} >= {
        "sample",
        "invert",
        "edit",
        "interpolate",
        "watermark",
        "roundtrip",
    }
    for command in found:
        small = re.sub(r"--model \S+", f"--model {stored / 'sd'}", command)
        assert small != command
        small = small.replace("--device cuda", "")
        small = re.sub(r"--(frames|steps|count) \d+", "", small)
        extra = {"interpolate": " --frames 2", "sample": " --count 2"}.get(command.split()[0], "")
        assert shell.run(f"{small} --steps 4{extra}"), command
    assert len(files("out")) >= 12


@pytest.mark.usefixtures("_photos")
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_samples_and_codes_are_those_of_the_library(shell: Shell, stored: Path, name: str) -> None:
    model = f"--model {stored / name} --steps 5"
    shell.run(f"sample {model} --prompt 'a cat' --guidance 4 --count 1 --save")
    state = State.load("out/sample/000000.safetensors")
    assert state.current.dtype == torch.float64
    denoiser = PipelineDenoiser(load_stable_diffusion(stored / name).pipeline)
    sigmas = denoiser.sigmas(5)
    x = denoiser.noise(1, float(sigmas[0]), torch.Generator().manual_seed(0))
    call = {"prompt": "a cat", "negative_prompt": "", "guidance_scale": 4.0}
    right = BDIA(DDIM(), DampedStepRatio()).sample(denoiser, x, sigmas, extra_args=call)
    assert torch.allclose(state.current, right.x, atol=1e-4)
    shown = ((denoiser.decode(right.x)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert abs(pixels("out/sample/000000.png") - shown).max() < 1
    shell.run(f"invert out/sample/000000.safetensors --model {stored / name}")
    code = State.load("out/invert/000000.safetensors").partner
    assert code is not None
    assert (code - x).norm() < 1e-8 * x.norm()


@pytest.mark.usefixtures("_photos")
@pytest.mark.parametrize("solver", ["damped", "exact"])
def test_outside_of_the_mask_every_pixel_of_the_photo_is_as_it_was(
    shell: Shell, stored: Path, solver: str
) -> None:
    model = f"--model {stored / 'sd'} --steps 5 --solver {solver}"
    shell.run(f"edit photo.jpg {model} --prompt 'a cat' --to 'a dog' --mask mask.png")
    from odesolvers.pictures import read_images

    given = (read_images(Path("photo.jpg"), (3, 16, 16), "crop")[0] + 1) * 127.5
    given = given.permute(1, 2, 0).numpy()
    found = pixels("out/edit/photo.png")
    assert abs(found[:, :8] - given[:, :8]).max() <= 0.5
    assert abs(found[:, 8:] - given[:, 8:]).max() > 5


def test_sizes_and_other_families(
    shell: Shell, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.run(f"sample --model {stored / 'sd'} --size 16 24 --count 1 --steps 5 --save")
    assert pixels("out/sample/000000.png").shape == (16, 24, 3)
    shell.run(f"invert out/sample/000000.safetensors --model {stored / 'sd'}")
    assert "multiples of 2 pixels, got 15 x 16" in shell.refused(
        f"sample --model {stored / 'sd'} --size 15 16 --out x"
    )
    assert "a pipeline's scheduler makes its grid" in shell.refused(
        f"sample --model {stored / 'sd'} --grid karras --out x"
    )
    for family in ("sd3", "flux"):  # without text encoders: to be opened, and to have a grid
        save_pipeline(tmp_path / family, family)
        model = open_model(str(tmp_path / family), torch.device("cpu"), None, (16, 16))
        assert model.method == "FlowEuler()"
        assert model.dtype == torch.float64
        picture = torch.zeros(1, 3, 16, 16)
        x = model.enter(picture, 0.0, torch.float64)
        assert model.leave(x).shape == picture.shape
        assert model.draw([1, 2], 5.0, torch.float64).std().item() == pytest.approx(6.0, rel=0.2)
        mask = model.mask(torch.ones(16, 16))
        assert mask.expand(x.shape).shape == x.shape


def test_folders_of_other_things_are_refused(shell: Shell, stored: Path) -> None:
    Path("empty").mkdir()
    assert "--model empty holds no pipeline" in shell.refused("sample --model empty --out x")
    shutil.copytree(stored / "sd", "custom")
    index = Path("custom/model_index.json")
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "MyPipeline"))
    assert "a pipeline of another library (MyPipeline)" in shell.refused(
        "sample --model custom --out x"
    )


def test_a_network_in_half_precision_has_states_in_double(shell: Shell, stored: Path) -> None:
    options: Any = f"--model {stored / 'sd'} --network bfloat16 --steps 4 --prompt 'a cat'"
    shell.run(f"sample {options} --count 1 --save")
    shell.run(f"invert out/sample/000000.safetensors --model {stored / 'sd'} --network bfloat16")
    code = State.load("out/invert/000000.safetensors").partner
    assert code is not None
    denoiser = PipelineDenoiser(load_stable_diffusion(stored / "sd").pipeline)
    x = denoiser.noise(1, float(denoiser.sigmas(4)[0]), torch.Generator().manual_seed(0))
    assert (code - x).norm() < 1e-6 * x.norm()
