"""Runs of diffusers' own pipelines on the miniature models."""

import warnings

import pytest
import torch

from odesolvers.models import load_stable_diffusion

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise(n=2):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def build(diffusers, name, **options):
    """A scheduler, with those of the options that its class has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of diffusers
        kind = getattr(diffusers, name)
        known = kind.__init__.__wrapped__.__code__.co_varnames
        return kind(**{k: v for k, v in options.items() if k in known})


def theirs(pipeline, scheduler, n):
    """The pipeline's own latents, from standard normal ones, and the first input of its network."""
    pipeline.scheduler = scheduler
    seen = []
    handle = pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    try:
        found = pipeline(
            ["a cat"] * 2,
            num_inference_steps=n,
            guidance_scale=1.0,
            latents=noise(),
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
    finally:
        handle.remove()
    return found, *seen[0]


def refused(path, match, **options):
    with pytest.raises(ValueError, match=f"could not be read as .*{match}"):
        load_stable_diffusion(path, **options)
