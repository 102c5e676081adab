"""The combinator against the paper's own form, and its algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from odesolvers import (
    BDIA,
    DDIM,
    Euler,
    HeunEDM,
    IntegrationApproximator,
    SmoothedOutput,
    State,
    StepRatio,
    karras_sigmas,
    vp_sigmas,
)

from .problems import (
    Recorder,
    both_increments,
    gaussian,
    increment,
    mixture,
    noise,
    relative_error,
)
from .test_approximators import ALL


def paper_bdia_ddim(
    denoiser: Callable[..., torch.Tensor], z: torch.Tensor, alphas: list[float], gamma: float
) -> torch.Tensor:
    """The update of the paper in its own variables: z, α with α² + σ² = 1, and predicted noise.

    DDIM, from one level to another, is ``z' = α' (z - σ ε) / α + σ' ε``.
    """
    sigmas = [math.sqrt(1 - a * a) for a in alphas]

    def delta(z: torch.Tensor, i: int, j: int) -> torch.Tensor:
        level = torch.full(z.shape[:1], sigmas[i] / alphas[i], dtype=z.dtype)
        x0 = denoiser(z / alphas[i], level)
        epsilon = (z - alphas[i] * x0) / sigmas[i]
        return alphas[j] * x0 + sigmas[j] * epsilon - z

    behind, z = z, z + delta(z, 0, 1)
    for i in range(1, len(alphas) - 1):
        ahead = (
            behind - (1 - gamma) * (behind - z) - gamma * delta(z, i, i - 1) + delta(z, i, i + 1)
        )
        behind, z = z, ahead
    return z


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("grid", [karras_sigmas(15), vp_sigmas(15)], ids=["karras", "vp"])
def test_equals_the_variance_preserving_form_of_the_paper(gamma: float, grid: torch.Tensor) -> None:
    alphas = [1 / math.sqrt(1 + s * s) for s in grid.tolist()]
    x = noise(4, 3, sigma=float(grid[0]))
    expected = paper_bdia_ddim(mixture(), x * alphas[0], alphas, gamma) / alphas[-1]
    assert relative_error(BDIA(DDIM(), gamma).sample(mixture(), x, grid).x, expected) < 1e-12
    assert relative_error(BDIA(Euler(), gamma).sample(mixture(), x, grid).x, expected) > 1e-3


def test_gamma_one_over_euler_is_the_leapfrog_rule() -> None:
    grid = torch.linspace(4.0, 0.5, 9, dtype=torch.float64)
    x = [noise(2, 3, sigma=4.0)]
    d = lambda x, s: (x - mixture()(x, s.expand(2))) / s  # noqa: E731
    x.append(x[0] + (grid[1] - grid[0]) * d(x[0], grid[0]))
    for k in range(1, 8):
        x.append(x[k - 1] + (grid[k + 1] - grid[k - 1]) * d(x[k], grid[k]))
    assert relative_error(BDIA(Euler()).sample(mixture(), x[0], grid).x, x[-1]) < 1e-13


def test_step_ratio_two_over_euler_is_o_belm() -> None:
    """Wang et al. 2024: their optimal coefficients, in σ̄ = σ and x = z / α."""
    grid = karras_sigmas(12, 0.02, 10.0, rho=3.0)
    x = [noise(2, 3, sigma=10.0)]
    h = -torch.diff(grid)  # h[k] leads from level k to level k + 1
    eps = lambda x, s: (x - mixture()(x, s.expand(2))) / s  # noqa: E731
    x.append(x[0] - h[0] * eps(x[0], grid[0]))
    for k in range(1, 12):
        r = h[k] / h[k - 1]
        x.append(r**2 * x[k - 1] + (1 - r**2) * x[k] - h[k] * (1 + r) * eps(x[k], grid[k]))
    solution = BDIA(Euler(), StepRatio(2)).sample(mixture(), x[0], grid)
    assert relative_error(solution.x, x[-1]) < 1e-13


@pytest.mark.parametrize("approximator", ALL, ids=repr)
def test_step_and_inverse_in_the_words_of_the_docstring(
    approximator: IntegrationApproximator,
) -> None:
    """x_{i-1} = F + g (x_{i+1} - B), with F and B evaluated by the approximator on tensors."""
    grid = torch.tensor([3.0, 2.0, 1.4], dtype=torch.float64)
    x = noise(2, 3, sigma=3.0)
    solver = BDIA(approximator, StepRatio(1))
    first = solver.sample(mixture(), x, grid, stop=1).x
    ahead, behind = both_increments(approximator, mixture(), first, 2.0, 1.4, 3.0)
    expected = (first + ahead) + 0.6 * (x - (first + behind))
    assert relative_error(solver.sample(mixture(), x, grid).x, expected) < 1e-14


@pytest.mark.parametrize(
    ("second", "levels"), [("ahead", [1, 2]), ("behind", [1, 0]), ("both", [1, 2, 0])]
)
def test_heun_evaluates_on_the_side_it_says(second: str, levels: list[int]) -> None:
    recorder = Recorder(gaussian())
    grid = karras_sigmas(6, append_zero=False)
    solution = BDIA(HeunEDM(second)).sample(recorder, noise(1, 5, sigma=80.0), grid)
    assert solution.nfe == 2 + 4 * len(levels)
    assert recorder.sigmas[2 : 2 + len(levels)] == grid[levels].tolist()


def test_smoothing_cancels_the_alternating_part_of_the_sample() -> None:
    """A kick that only the parasitic mode carries is gone from a smoothed sample."""
    grid = torch.linspace(4.0, 1.0, 31, dtype=torch.float64)

    def still(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x  # slope 0: every method stands still, and only the recurrence is left

    for gamma in (1.0, 0.9):
        kicked = {}
        for solver in (BDIA(Euler(), gamma), BDIA(Euler(), SmoothedOutput(gamma))):
            state = solver.sample(still, torch.zeros(1, 2, dtype=torch.float64), grid, stop=1).state
            kick = type(state)(
                state.current + 1, state.partner, state.index, state.sigmas, state.solver
            )
            kicked[solver] = solver.sample(still, kick, grid).x[0, 0].item()
        plain, smoothed = kicked.values()
        smooth_part = 1 / (1 + gamma)  # of e_k = a + b (-γ)^k through e_0 = 0 and e_1 = 1
        assert smoothed == pytest.approx(smooth_part, abs=1e-12)
        assert abs(plain - smooth_part) > 0.01


def test_one_solver_serves_many_threads() -> None:
    solver = BDIA(HeunEDM())
    grids = [karras_sigmas(n) for n in (5, 9, 13, 7)] * 4
    x = noise(2, 3, sigma=80.0)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda grid: solver.sample(mixture(), x, grid).x, grids))
    for grid, result in zip(grids, together, strict=True):
        assert torch.equal(result, solver.sample(mixture(), x, grid).x)


@pytest.mark.parametrize("approximator", ALL, ids=repr)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
def test_fifty_karras_steps_at_gamma_one(
    approximator: IntegrationApproximator, dtype: torch.dtype, bound: float
) -> None:
    grid = karras_sigmas(50, sigma_min=0.002, sigma_max=80.0)
    solver = BDIA(approximator, gamma=1.0)
    x = noise(32, 3, sigma=80.0, dtype=dtype)
    there = solver.sample(mixture(), x, grid)
    back = solver.invert(mixture(), there.state, grid)
    assert relative_error(back.x, x) < bound
    assert np.isclose(float(back.x.std()), 80.0, rtol=0.2)


def test_no_gradients_are_recorded() -> None:
    weight = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    x = noise(1, 3, sigma=80.0).requires_grad_()
    for walk in (BDIA(DDIM()).sample, BDIA(DDIM()).invert):
        assert not walk(lambda x, sigma: weight * x, x, karras_sigmas(4)).x.requires_grad


@pytest.mark.parametrize("approximator", ALL, ids=repr)
def test_a_lone_image_at_level_zero_gets_its_neighbour_from_the_trapezoid_rule(
    approximator: IntegrationApproximator,
) -> None:
    """Half the slope at the other end, for one evaluation there: third order in the level."""
    solver, image = BDIA(approximator), noise(4, 5, seed=1)
    errors = []
    for sigma in (0.02, 0.01):
        recorder = Recorder(gaussian())
        code = solver.invert(recorder, image, [sigma, 0.0])
        d = (image - gaussian()(image, torch.full((4,), sigma, dtype=torch.float64))) / sigma
        torch.testing.assert_close(code.x, image + sigma / 2 * d, rtol=1e-14, atol=1e-14)
        assert (recorder.sigmas, code.nfe) == ([sigma], 1)
        assert torch.equal(recorder.points[0], image)
        errors.append(float((code.x - gaussian().flow(image, 0.0, sigma)).norm()))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.05)  # odd powers of σ vanish here


@pytest.mark.parametrize("approximator", ALL, ids=repr)
def test_a_lone_image_above_level_zero_gets_its_neighbour_from_the_approximator(
    approximator: IntegrationApproximator,
) -> None:
    image = noise(4, 3, seed=1)
    code = BDIA(approximator).invert(mixture(), image, [3.0, 2.0])
    behind = increment(approximator, mixture(), image, 2.0, 3.0)
    assert relative_error(code.x, image + behind) < 1e-14


def test_a_run_that_starts_in_the_middle_takes_the_approximators_step_first() -> None:
    """From one state at level 2 it is the run on the grid from there on."""
    solver, grid, x = BDIA(HeunEDM()), karras_sigmas(6), noise(2, 3, sigma=5.0)
    lone = State(x, None, 2, tuple(grid.tolist()), repr(solver))
    middle = solver.sample(mixture(), lone, grid)
    assert torch.equal(middle.x, solver.sample(mixture(), x, grid[2:]).x)
    assert middle.state.index == 6
    up = solver.invert(mixture(), lone, grid)
    behind = increment(HeunEDM(), mixture(), x, float(grid[2]), float(grid[1]))
    assert up.state.index == 1
    pair = State(x, x + behind, 2, tuple(grid.tolist()), repr(solver))
    assert relative_error(up.x, solver.invert(mixture(), pair, grid).x) < 1e-13


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    x = noise(1, 3, sigma=80.0)
    state = BDIA(DDIM()).sample(mixture(), x, karras_sigmas(4), progress=True).state
    assert "4/4" in capsys.readouterr().err
    BDIA(DDIM()).invert(mixture(), state, karras_sigmas(4), progress=True)
    assert "3/3" in capsys.readouterr().err
