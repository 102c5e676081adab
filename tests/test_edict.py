"""EDICT from the paper alone: Wallace, Gokul, Naik 2022, section 4 and algorithms 1 and 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from odesolvers import EDICT, State, karras_sigmas

from .problems import gaussian, noise, relative_error


def predicted_noise(x: torch.Tensor, t: int) -> torch.Tensor:
    """ε(x, t), which the network knows by the variance-preserving state and the timestep."""
    return torch.tanh(x * (0.5 + 0.1 * t)) + 0.1 * x.roll(1, -1)


def coefficients(alphas: list[float], t: int) -> tuple[float, float]:
    """``a_t`` and ``b_t`` of the DDIM step from t to t - 1, equations 6 and 7, with ᾱ as α."""
    here, ahead = alphas[t], alphas[t - 1]
    return math.sqrt(ahead / here), math.sqrt(1 - ahead) - math.sqrt(ahead * (1 - here) / here)


def generate(
    alphas: list[float], x: torch.Tensor, y: torch.Tensor, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 14, from t = T to 0."""
    for t in range(len(alphas) - 1, 0, -1):
        a, b = coefficients(alphas, t)
        x_inter = a * x + b * predicted_noise(y, t)
        y_inter = a * y + b * predicted_noise(x_inter, t)
        x = p * x_inter + (1 - p) * y_inter
        y = p * y_inter + (1 - p) * x
    return x, y


def invert(
    alphas: list[float], x: torch.Tensor, y: torch.Tensor, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 15, from t = 0 to T."""
    for t in range(len(alphas) - 1):
        a, b = coefficients(alphas, t + 1)
        y_inter = (y - (1 - p) * x) / p
        x_inter = (x - (1 - p) * y_inter) / p
        y = (y_inter - b * predicted_noise(x_inter, t + 1)) / a
        x = (x_inter - b * predicted_noise(y, t + 1)) / a
    return x, y


ALPHAS = [0.98, 0.8, 0.5, 0.2, 0.1]


def in_the_papers_variables(alphas: list[float]) -> tuple[list[float], Callable[..., Any]]:
    """Noise levels and a denoiser for t = T to 0: ``x = z / sqrt(ᾱ)``, ``D = x - σ ε(z, t)``."""
    sigmas = [math.sqrt((1 - alpha) / alpha) for alpha in reversed(alphas)]

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t = len(alphas) - 1 - sigmas.index(float(sigma[0]))
        return x - sigma.unsqueeze(1) * predicted_noise(math.sqrt(alphas[t]) * x, t)

    return sigmas, denoiser


@pytest.mark.parametrize("last", [0.98, 1.0])
@pytest.mark.parametrize("p", [0.93, 0.6])
def test_edict_generates_by_equation_14_and_inverts_by_equation_15(p: float, last: float) -> None:
    """From two states that differ, so that formulas that exchange the two are told apart."""
    alphas = [last, *ALPHAS[1:]]
    sigmas, denoiser = in_the_papers_variables(alphas)
    solver, top, bottom = EDICT(p), math.sqrt(alphas[-1]), math.sqrt(last)

    noises = noise(4, 3), noise(4, 3, seed=1)
    start = State(noises[0] / top, noises[1] / top, 0, tuple(sigmas), repr(solver), coupled=True)
    there = solver.sample(denoiser, start, sigmas).state
    for ours, theirs in zip(
        (there.current, there.partner), generate(alphas, *noises, p), strict=True
    ):
        assert ours is not None
        assert relative_error(ours * bottom, theirs) < 1e-13

    images = noise(4, 3, seed=2), noise(4, 3, seed=3)
    last_level = len(sigmas) - 1
    end = State(
        images[0] / bottom,
        images[1] / bottom,
        last_level,
        tuple(sigmas),
        repr(solver),
        coupled=True,
    )
    code = solver.invert(denoiser, end, sigmas).state
    for ours, theirs in zip((code.current, code.partner), invert(alphas, *images, p), strict=True):
        assert ours is not None
        assert relative_error(ours * top, theirs) < 1e-12


def test_edict_begins_with_the_same_state_twice() -> None:
    """As algorithms 1 and 2 do, ``y = x``, at either end."""
    sigmas, denoiser = in_the_papers_variables(ALPHAS)
    top, bottom = math.sqrt(ALPHAS[-1]), math.sqrt(ALPHAS[0])
    z, image = noise(4, 3), noise(4, 3, seed=1)
    sample = EDICT(0.8).sample(denoiser, z / top, sigmas).x
    assert relative_error(sample * bottom, generate(ALPHAS, z, z, 0.8)[0]) < 1e-13
    code = EDICT(0.8).invert(denoiser, image / bottom, sigmas).x
    assert relative_error(code * top, invert(ALPHAS, image, image, 0.8)[0]) < 1e-12


# --- McCallum-Foster, Rex and reversible Heun --------------------------------------------------------


def test_edict_without_mixing_lets_its_states_drift_apart() -> None:
    grid = karras_sigmas(200, 0.1, 10.0, append_zero=False)
    x = noise(4, 5, sigma=10.0)
    exact = gaussian().flow(x, 10.0, 0.1)
    mixed, unmixed = (EDICT(p).sample(gaussian(), x, grid).x for p in (0.93, 1.0))
    assert relative_error(unmixed, exact) > 5 * relative_error(mixed, exact)
