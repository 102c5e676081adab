"""Jobs with a pipeline of diffusers: prompts, guidance, and pictures through the autoencoder."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import odesolvers as ode
from odesolvers.jobs import Job, Shards, report, verify, work
from odesolvers.models import save_tiny_stable_diffusion
from odesolvers.opening import Model, open_model

EXACT = "BDIA(DDIM(), DampedStepRatio(), FixedPoint())"


@pytest.fixture
def folder(tmp_path: Path, diffusers: ModuleType) -> Path:
    save_tiny_stable_diffusion(tmp_path / "tiny")
    return tmp_path / "tiny"


def job(kind: str, folder: Path, source: str) -> tuple[Job, Model]:
    model = open_model(str(folder), torch.device("cpu"), None, None)
    levels = tuple(model.sigmas(4, None, {}).tolist())
    settings = {"guidance": 3.0, "dtype": "float64", "batch": 2, "shard_size": 4}
    return Job(kind, str(folder), source, EXACT, levels, **settings), model  # type: ignore[arg-type]


def test_prompts_are_sampled_as_the_pipeline_is_without_a_job(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("a cat\na dog\na house\n")
    described, model = job("sample", folder, f"prompts:{tmp_path / 'prompts'}@2")
    described.prepare(tmp_path / "out", model)
    assert work(tmp_path / "out", model=model) == 2
    assert verify(tmp_path / "out", pictures=4, model=model)["largest"] == 0.0
    shards = Shards(tmp_path / "out")
    for first, prompts in ((0, ["a cat", "a dog"]), (4, ["a dog", "a house"])):
        denoiser, extra = model.guided(prompts, 3.0, None)
        x = model.draw([first, first + 1], described.sigmas[0], torch.float64)
        expected = ode.parse(EXACT).sample(denoiser, x, described.sigmas, extra_args=extra).x
        found = torch.stack([shards[first + k]["x"] for k in (0, 1)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_pictures_go_through_the_autoencoder_and_back_to_the_bit(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 255, (70, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{k}.png")
        (tmp_path / "pictures" / f"{k}.txt").write_text(f"prompt {k}")
    described, model = job("roundtrip", folder, str(tmp_path / "pictures"))
    described.prepare(tmp_path / "out", model)
    work(tmp_path / "out", model=model)
    assert report(tmp_path / "out")["errors"]["exact"] == 3
    assert Shards(tmp_path / "out")[0]["x"].shape[0] == 4  # latents


def test_memory_does_not_hold_the_prompts_of_earlier_shards(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("\n".join(f"prompt {k}" for k in range(12)))
    described, model = job("sample", folder, f"prompts:{tmp_path / 'prompts'}@1")
    described.prepare(tmp_path / "out", model)
    work(tmp_path / "out", model=model)
    assert len(model.denoiser._prompts) <= 2  # those of the last shard, by calls
