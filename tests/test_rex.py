"""Rex in the variables of its paper."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.integrate import RK45

from odesolvers import (
    EES25,
    RK4,
    Dopri5,
    Euler,
    Exponential,
    Grid,
    HeunEDM,
    IntegrationApproximator,
    McCallumFoster,
    Rex,
    karras_sigmas,
)

from .problems import relative_error
from .test_coupled import X, Y, denoised, run


def test_rex_with_heun_written_out_in_y_over_sigma() -> None:
    """McCallum-Foster on dy/dt = D(y / t, 1 / t), t = 1/σ, with Heun's step of that."""
    zeta, sigma, target = 0.95, 3.0, 2.0
    slope: Callable[[torch.Tensor, float], torch.Tensor] = lambda y, t: denoised(y / t, 1 / t)  # noqa: E731

    def psi(y: torch.Tensor, t: float, end: float) -> torch.Tensor:
        h = end - t
        first = slope(y, t)
        return h / 2 * (first + slope(y + h * first, end))

    y, v, t, end = X / sigma, Y / sigma, 1 / sigma, 1 / target
    y_next = zeta * y + (1 - zeta) * v + psi(v, t, end)
    v_next = v - psi(y_next, end, t)
    ours = run(Rex(HeunEDM(), zeta), [sigma, target], X, Y)
    assert relative_error(ours[0], y_next * target) < 1e-13
    assert relative_error(ours[1], v_next * target) < 1e-13


RK4_TABLEAU = (((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
TABLEAUS: list[tuple[IntegrationApproximator, Any]] = [
    (Euler(), ((), (), (1.0,))),
    (RK4(), RK4_TABLEAU),
    (Dopri5(), (RK45.A[1:], RK45.C[1:], RK45.B)),
    (EES25(), (((1 / 3,), (-5 / 48, 15 / 16)), (1 / 3, 5 / 6), (0.1, 0.5, 0.4))),
]


@pytest.mark.parametrize(("base", "tableau"), TABLEAUS, ids=repr)
def test_rex_in_the_variance_preserving_variables_of_its_paper(
    base: IntegrationApproximator, tableau: Any
) -> None:
    """Down and back up, with x_t = α x, w = σ_t and ς = α / σ_t, for the data prediction:

    x' = w'/w (ζ x + (1 - ζ) x̂) + w' Ψ_h(ς, x̂)          x̂' = w'/w x̂ - w' Ψ_{-h}(ς', x')

    where Ψ is a Runge-Kutta method for the slope D(w x / w, ς) in the variable x / w.
    """
    zeta, levels = 0.9, [3.0, 2.0, 1.2]
    coefficients, times, weights = tableau

    def weight(s: float) -> float:  # σ_t, at the signal-to-noise ratio ς = α / σ_t = 1/σ
        return (1 + s * s) ** -0.5

    def data(s: float, x: torch.Tensor) -> torch.Tensor:
        alpha = s * weight(s)
        return denoised(x / alpha, 1 / s)

    def psi(s: float, x: torch.Tensor, end: float) -> torch.Tensor:
        h, k = end - s, [data(s, x)]
        for row, c in zip(coefficients, times, strict=True):
            y = x / weight(s) + h * sum(a * f for a, f in zip(row, k, strict=False))
            k.append(data(s + c * h, weight(s + c * h) * y))
        return h * sum(b * f for b, f in zip(weights, k, strict=True))

    snr = [1 / sigma for sigma in levels]
    scale = [s * weight(s) for s in snr]  # α
    x, x_hat = X * scale[0], Y * scale[0]
    for s, end in pairwise(snr):
        w, w_end = weight(s), weight(end)
        x = w_end / w * (zeta * x + (1 - zeta) * x_hat) + w_end * psi(s, x_hat, end)
        x_hat = w_end / w * x_hat - w_end * psi(end, x, s)
    ours = run(Rex(base, zeta), levels, X, Y)
    assert relative_error(ours[0], x / scale[-1]) < 1e-13
    assert relative_error(ours[1], x_hat / scale[-1]) < 1e-13


def test_rex_is_mccallum_foster_over_the_exponential_method() -> None:
    grid = Grid.of(karras_sigmas(6))
    coupling = McCallumFoster(Exponential(RK4()), 0.9)
    assert Rex(RK4(), 0.9).steps(grid) == coupling.steps(grid)
