"""Jobs with a pipeline of diffusers: prompts, guidance, and pictures through the autoencoder."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import odesolvers as ode
from odesolvers.cli import main
from odesolvers.jobs import Job, Output, Shards, report, verify, work
from odesolvers.jobs.runner import Runner
from odesolvers.jobs.weights import fingerprint
from odesolvers.models import save_tiny_stable_diffusion
from odesolvers.opening import Model, open_model

EXACT = "BDIA(DDIM(), DampedStepRatio(), FixedPoint())"


@pytest.fixture
def folder(tmp_path: Path, diffusers: ModuleType) -> Path:
    save_tiny_stable_diffusion(tmp_path / "tiny")
    return tmp_path / "tiny"


def job(kind: Any, folder: Path, source: str, **changes: Any) -> tuple[Job, Model]:
    model = open_model(str(folder), torch.device("cpu"), None, None)
    levels = tuple(model.sigmas(4, None, {}).tolist())
    settings: dict[str, Any] = {"guidance": 3.0, "dtype": "float64", "batch": 2, "shard_size": 4}
    return Job(kind, str(folder), source, EXACT, levels, **{**settings, **changes}), model


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


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_job_for_gpus_that_is_begun_without_one_has_the_weights_of_its_workers(
    folder: Path, tmp_path: Path
) -> None:
    """Without --network the workers run in float16. Here the CPU stands for their device."""
    begun = open_model(str(folder), CUDA, None, None, place=CPU)
    described, _ = job("sample", folder, "seeds:2", device="cuda")
    output = described.prepare(tmp_path / "out", begun)
    Runner(output, open_model(str(folder), CPU, torch.float16, None))
    for other in (torch.float32, torch.bfloat16):
        with pytest.raises(
            ValueError, match=r"is another one here than that which .*: weights was"
        ):
            Runner(output, open_model(str(folder), CPU, other, None))


def test_prompts_that_were_encoded_are_no_weights_and_settings_of_parts_are(folder: Path) -> None:
    model = open_model(str(folder), CPU, None, None)
    before = fingerprint(model.denoiser)
    x = torch.zeros(1, 4, 8, 8)
    model.denoiser(x, torch.ones(1), prompt="a cat")
    assert fingerprint(model.denoiser) == before
    for name in ("vae", "scheduler"):
        part = getattr(model.denoiser.pipeline, name)
        part.register_to_config(scaling_factor=0.5, prediction_type="v_prediction")
        assert fingerprint(model.denoiser) != before
        before = fingerprint(model.denoiser)


@pytest.mark.parametrize("network", ["bfloat16", "float16"])
def test_the_command_runs_pipelines_in_half_precision(
    network: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """States are float64 by default, as in the other commands: the way back is exact."""
    options = f"--model {folder} --network {network} --steps 4 --batch 2 --shard-size 2"
    prompts = "--prompt cat --prompt dog --solver exact"
    out = tmp_path / "out"
    main(f"batch sample --input seeds:4 {prompts} {options} --output {out}".split())
    assert "4 of 4 elements in 2 shards" in capsys.readouterr().out
    assert Output(out).job.dtype == "float64"
    main(f"batch verify --output {out} --model {folder} --per-shard 2".split())
    assert "4 elements lead back, with a relative error of at most 0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(
            f"batch sample --input seeds:4 {prompts} --steps 4 --batch 2 --shard-size 2 "
            f"--model {folder} --output {out}".split()
        )
    error = capsys.readouterr().err
    assert f"network was {network} and is None; weights was" in error
