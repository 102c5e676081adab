"""Equal to samplers that others wrote, on the same denoiser: k-diffusion's and diffusers'."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from odesolvers import (
    DDIM,
    DPMSolverPP2S,
    Euler,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
    ddim_timesteps,
    karras_sigmas,
    sigmas_from_alphas_cumprod,
)

from .problems import mixture, noise, relative_error

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS, ids=str)
@pytest.mark.parametrize(
    ("approximator", "sampler", "options"),
    [
        (Euler(), "sample_euler", {}),
        (DDIM(), "sample_euler", {}),
        (HeunEDM(), "sample_heun", {}),
        (Midpoint(), "sample_dpm_2", {}),
        (DPMSolverPP2S(), "sample_dpmpp_2s_ancestral", {"eta": 0.0}),
    ],
    ids=str,
)
def test_k_diffusion(
    k_diffusion: ModuleType,
    approximator: IntegrationApproximator,
    sampler: str,
    options: dict[str, float],
    dtype: torch.dtype,
    bound: float,
) -> None:
    x = noise(16, 3, sigma=80.0, dtype=dtype)
    sigmas = karras_sigmas(18).to(dtype)
    theirs = getattr(k_diffusion.sampling, sampler)(mixture(), x, sigmas, disable=True, **options)
    ours = approximator.sample(mixture(), x, sigmas).x
    assert relative_error(ours, theirs) < bound


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS, ids=str)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusers_ddim(
    diffusers: ModuleType, spacing: str, prediction: str, dtype: torch.dtype, bound: float
) -> None:
    """Their scheduler walks z = x / sqrt(1 + σ²) with the model's own prediction."""
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False,
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
        set_alpha_to_one=False,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(20)
    alphas = scheduler.alphas_cumprod
    timesteps = ddim_timesteps(20, spacing=spacing, offset=1 if spacing == "leading" else 0)  # type: ignore[arg-type]
    sigmas = sigmas_from_alphas_cumprod(alphas, timesteps, final="first")

    start = noise(16, 3, dtype=dtype)
    z = start.clone()
    for t in scheduler.timesteps:
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        x0 = mixture()(z / a, (s / a).expand(16))
        epsilon = (z - a * x0) / s
        output = {"epsilon": epsilon, "v_prediction": a * epsilon - s * x0, "sample": x0}
        z = scheduler.step(output[prediction], t, z).prev_sample
    theirs = z / alphas[0].sqrt()

    x = start / alphas[timesteps[0]].sqrt()
    assert relative_error(DDIM().sample(mixture(), x, sigmas).x, theirs) < bound
