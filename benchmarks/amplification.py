"""Amplification of errors by an inversion, by rule for gamma and by grid.

Prints the largest product of the factors by which consecutive steps up the grid multiply the alternating
mode of the recurrence, in variance-preserving units (the state over sqrt(1 + sigma^2)); 1 is neutral. No
model is called: see `odesolvers.stability_report`.

    python -m benchmarks.amplification        # a second
"""

from __future__ import annotations

import torch

from odesolvers import (
    BDIA,
    DDIM,
    ConstantGamma,
    GammaRule,
    StepRatio,
    ddim_timesteps,
    karras_sigmas,
    sigmas_from_alphas_cumprod,
    stability_report,
)

from .common import shown, table

RULES: list[GammaRule] = [ConstantGamma(1.0), ConstantGamma(0.96), StepRatio(1), StepRatio(2)]
STEPS = (10, 20, 50, 100)


def stable_diffusion(n: int, spacing: str, offset: int) -> torch.Tensor:
    """The levels of Stable Diffusion's schedule, ending at 0."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    steps = ddim_timesteps(n, spacing=spacing, offset=offset)  # type: ignore[arg-type]
    return sigmas_from_alphas_cumprod(torch.cumprod(1 - betas, 0), steps)


def amplification(rule: GammaRule, sigmas: torch.Tensor) -> float:
    """The largest product of consecutive factors up the grid."""
    return stability_report(BDIA(DDIM(), rule), sigmas).amplification_inverting_vp


def main() -> None:
    grids = {
        "Stable Diffusion, trailing": lambda n: stable_diffusion(n, "trailing", 0),
        "Stable Diffusion, leading": lambda n: stable_diffusion(n, "leading", 1),
        "Karras 80 to 0.002": karras_sigmas,
    }
    lines = [
        [name, shown(rule), *(f"{amplification(rule, make(n)):.3g}" for n in STEPS)]
        for name, make in grids.items()
        for rule in RULES
    ]
    print(table(["grid", "rule", *(f"{n} steps" for n in STEPS)], lines, words=(0, 1)))


if __name__ == "__main__":
    main()
