"""Inversion that is not exact: diffusers' DDIM inversion, and fixed-point iteration."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from odesolvers import (
    DDIM,
    EES25,
    RK4,
    DDIMInversion,
    DPMSolverPP2S,
    Euler,
    Exponential,
    FixedPointInversion,
    HeunEDM,
    IntegrationApproximator,
    InversionWarning,
    ReverseStepInversion,
    State,
    karras_sigmas,
)

from .contract import GRID, IterativeContract
from .problems import Recorder, gaussian, increment, mixture, noise, relative_error

BASES: list[IntegrationApproximator] = [
    Euler(),
    DDIM(),
    HeunEDM(),
    RK4(),
    DPMSolverPP2S(),
    Exponential(HeunEDM()),
]


class TestFixedPointInversionEuler(IterativeContract):
    solver = FixedPointInversion(Euler())
    bound = 1e-4


class TestFixedPointInversionDDIM(IterativeContract):
    solver = FixedPointInversion(DDIM(), tolerance=1e-10)
    bound = 1e-8


class TestFixedPointInversionHeunEDM(IterativeContract):
    solver = FixedPointInversion(HeunEDM())
    bound = 1e-4


class TestFixedPointInversionRK4(IterativeContract):
    solver = FixedPointInversion(RK4())
    bound = 1e-4


class TestFixedPointInversionPlain(IterativeContract):
    solver = FixedPointInversion(DPMSolverPP2S(), memory=0)
    bound = 1e-4


class TestDDIMInversion(IterativeContract):
    solver = DDIMInversion()
    bound = 0.5


class TestDDIMInversionHeunEDM(IterativeContract):
    solver = DDIMInversion(HeunEDM())
    bound = 2.0


class TestReverseStepInversion(IterativeContract):
    solver = ReverseStepInversion()
    bound = 0.5
    undoes_at = 1  # a step back begins where the step ended


class TestReverseStepInversionDDIM(IterativeContract):
    solver = ReverseStepInversion(DDIM())
    bound = 0.5
    undoes_at = 1


# --- DDIM inversion --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("to_zero", [False, True])
def test_ddim_inversion_is_that_of_diffusers(
    diffusers: ModuleType, steps: int, to_zero: bool
) -> None:
    """A network of z and the timestep, which knows nothing of levels, wrapped for each of the two.

    It predicts the noise. For other predictions their scheduler takes the coefficients of the level
    it comes from with an output for the level it goes to, which is another method.
    """
    scheduler = diffusers.DDIMInverseScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=to_zero,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if not to_zero:
        scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]

    def network(z: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(z * (0.5 + t / 2000)) + 0.1 * z.roll(1, -1)

    z = noise(3, 4, seed=1)
    start = z.clone()
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, float(t)), int(t), z).prev_sample

    # Their run begins at the level before the first timestep, which is not in the table.
    times = scheduler.timesteps.flip(0).tolist()
    alphas = [scheduler.alphas_cumprod[t] for t in times]
    if to_zero:
        alphas.append(torch.tensor(1.0, dtype=torch.float64))
    sigmas = [float(((1 - a) / a) ** 0.5) for a in alphas]

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        k = sigmas.index(float(sigma[0]))
        return x - sigmas[k] * network(x * alphas[k] ** 0.5, float(times[k]))

    image = start / alphas[-1] ** 0.5
    code = DDIMInversion().invert(denoiser, image, sigmas)
    assert relative_error(code.x * alphas[0] ** 0.5, z) < 1e-12
    assert code.nfe == len(sigmas) - 1
    # Euler's has another first guess, in x, and is another method.
    other = DDIMInversion(Euler()).invert(denoiser, image, sigmas)
    assert relative_error(other.x * alphas[0] ** 0.5, z) > 1e-3


def test_ddim_inversion_errs_and_does_not_say_so() -> None:
    x, solver = noise(4, 3, sigma=10.0), DDIMInversion()
    errors = []
    for n in (20, 40, 80):
        grid = karras_sigmas(n, 0.1, 10.0, append_zero=False)
        there = solver.sample(mixture(), x, grid)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            back = solver.invert(mixture(), there.state, grid)
        assert back.nfe == there.nfe
        assert back.convergence == ()
        errors.append(relative_error(back.x, x))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.3)


# --- the method's own step back --------------------------------------------------------------------


def test_a_reverse_step_is_the_methods_own() -> None:
    """Textbook DDIM inversion of z: the noise at the state and the level where the step begins."""
    levels = karras_sigmas(5, 0.1, 10.0, append_zero=False).tolist()
    image = noise(4, 3, seed=1)
    alphas = [(1 + sigma**2) ** -0.5 for sigma in levels]
    z = image * alphas[-1]
    for k in reversed(range(4)):
        a, b = alphas[k + 1], alphas[k]
        denoised = mixture()(z / a, torch.full((4,), levels[k + 1], dtype=torch.float64))
        epsilon = (z - a * denoised) / (a * levels[k + 1])
        z = b / a * z + (b * levels[k] - b * levels[k + 1]) * epsilon
    code = ReverseStepInversion(DDIM()).invert(mixture(), image, levels)
    assert relative_error(code.x * alphas[0], z) < 1e-14
    assert code.nfe == 4


@pytest.mark.parametrize("base", [*BASES, EES25()], ids=repr)
def test_from_the_level_0_up_it_is_heun(base: IntegrationApproximator) -> None:
    image = noise(4, 3, seed=1)
    code = ReverseStepInversion(base).invert(mixture(), image, [2.0, 0.5, 0.0], stop=1)
    heun = increment(HeunEDM(), mixture(), image, 0.0, 0.5)
    assert relative_error(code.x, image + heun) < 1e-14


def test_ees25_leads_back_to_the_fifth_order() -> None:
    """And the others of order 2 to the third, one order less than they err by in a step."""
    x = noise(4, 3, sigma=5.0)
    for base, order in ((EES25(), 5), (HeunEDM(), 3)):
        solver, errors, steps = ReverseStepInversion(base), [], (40, 80, 160)
        for n in steps:
            grid = karras_sigmas(n + 1, 0.3, 5.0, rho=5.0, append_zero=False)
            there = solver.sample(mixture(), x, grid)
            errors.append(relative_error(solver.invert(mixture(), there.x, grid).x, x))
        assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.3)


# --- fixed-point iteration -------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 1, 2, 5])
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_each_step_solves_its_equation(base: IntegrationApproximator, memory: int) -> None:
    """From one level to the next: the base's own step leads from the answer to where it started."""
    solver = FixedPointInversion(base, tolerance=1e-9, memory=memory)
    image = noise(4, 3, seed=1)
    solution = solver.invert(mixture(), image, [1.0, 0.8])
    moved = increment(base, mixture(), solution.x, 1.0, 0.8)
    residual = (image - solution.x - moved).norm(dim=1) / image.norm(dim=1)
    assert float(residual.max()) <= 1.1e-9
    (outcome,) = solution.convergence
    torch.testing.assert_close(outcome.residual, residual, rtol=1e-4, atol=1e-14)
    assert bool(outcome.converged.all())
    assert solution.nfe == outcome.iterations * base.evaluations


def test_anderson_acceleration_saves_evaluations() -> None:
    x = noise(8, 3, sigma=10.0)
    nfe = {}
    for memory in (0, 2):
        solver = FixedPointInversion(HeunEDM(), tolerance=1e-10, memory=memory)
        there = solver.sample(mixture(), x, GRID)
        nfe[memory] = solver.invert(mixture(), there.state, GRID).nfe
    assert nfe[2] < 0.8 * nfe[0]


def test_elements_of_a_batch_do_not_touch_each_other() -> None:
    solver = FixedPointInversion(DDIM())
    x = noise(3, 3, sigma=10.0)
    there = solver.sample(mixture(), x, GRID)
    whole = solver.invert(mixture(), there.state, GRID)
    for b in range(3):
        alone = solver.invert(mixture(), there.x[b : b + 1], GRID)
        # Who waits for the slowest of the batch stands still, up to the tolerance.
        assert relative_error(alone.x, whole.x[b : b + 1]) < 1e-4


def test_more_iterations_than_allowed_are_reported_and_warned_of() -> None:
    solver = FixedPointInversion(HeunEDM(), tolerance=1e-12, max_iterations=3)
    there = solver.sample(mixture(), noise(4, 3, sigma=10.0), GRID)
    with pytest.warns(InversionWarning, match=r"7 of 7 steps were not undone .* sigma = ") as seen:
        back = solver.invert(mixture(), there.state, GRID)
    assert seen[0].filename == __file__
    assert len(back.convergence) == 7
    assert {outcome.iterations for outcome in back.convergence} == {3}
    assert back.nfe == 3 * there.nfe
    worst = max(float(outcome.residual.max()) for outcome in back.convergence)
    assert f"relative residual of {worst:.3g}" in str(seen[0].message)


def test_what_cannot_be_undone_is_reported_for_each_element() -> None:
    """A denoiser that returns one image for every input: the step to 0 forgets where it came from."""

    def forgets(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)

    solver = FixedPointInversion(Euler())
    image = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]], dtype=torch.float64)
    with pytest.warns(InversionWarning, match="1 of 1 steps"):
        solution = solver.invert(forgets, image, [0.5, 0.0])
    (outcome,) = solution.convergence
    assert outcome.converged.tolist() == [True, False]
    assert outcome.residual.tolist() == pytest.approx([0.0, 6**-0.5])
    assert bool(solution.x.isfinite().all())


def test_an_iteration_that_runs_away_is_stopped_at_its_best() -> None:
    """A slope of -5 over a step of 1 makes plain iteration grow fivefold each time."""

    def steep(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x + 5 * sigma.unsqueeze(1) * (x - 1)

    solver = FixedPointInversion(Euler(), memory=0)
    image = noise(3, 4)
    with pytest.warns(InversionWarning):
        solution = solver.invert(steep, image, [3.0, 2.0])
    assert solution.convergence[0].iterations < 10
    assert bool(solution.x.isfinite().all())
    # Anderson's combination solves a linear equation whatever its slope.
    solved = FixedPointInversion(Euler(), memory=5).invert(steep, image, [3.0, 2.0])
    assert bool(solved.convergence[0].converged.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2,), (1, 1), (3, 2, 3)])
def test_shapes_and_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.01, torch.float32: 1e-5}.get(dtype, 1e-10)
    solver = FixedPointInversion(DDIM(), tolerance=tolerance)
    x = noise(*shape, dtype=dtype)
    solution = solver.invert(lambda x, s: 0.8 * torch.tanh(x), x, [2.0, 1.0, 0.5])
    assert solution.x.dtype == dtype
    assert solution.x.shape == shape
    assert all(outcome.residual.shape == shape[:1] for outcome in solution.convergence)
    assert torch.equal(solution.state.current, solution.x)


def test_a_zero_image_has_no_relative_size() -> None:
    solution = FixedPointInversion(DDIM()).invert(
        lambda x, s: 0.5 * x, torch.zeros(2, 3), [1.0, 0.5]
    )
    assert bool(solution.convergence[0].converged.all())
    assert not bool(solution.x.any())


def test_exact_solvers_report_no_iteration() -> None:
    assert Euler().sample(gaussian(), noise(1, 5), GRID).convergence == ()


def test_a_partner_in_the_state_is_no_use() -> None:
    """The neighbour would be the answer: it is dropped, not looked at."""
    x, solver = noise(2, 3, sigma=10.0), FixedPointInversion(DDIM())
    there = solver.sample(mixture(), x, GRID)
    pair = State(there.x, x, 7, there.state.sigmas, there.state.solver)
    alone = solver.invert(mixture(), there.state, GRID)
    assert torch.equal(solver.invert(mixture(), pair, GRID).x, alone.x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FixedPointInversion(DDIM), TypeError, r"FixedPointInversion wraps .* got <class"),
        (lambda: DDIMInversion(0.5), TypeError, r"DDIMInversion wraps .*HeunEDM\(\), got 0\.5"),
        (lambda: FixedPointInversion(DDIM(), 0.0), ValueError, "tolerance must be between 0 and 1"),
        (lambda: FixedPointInversion(DDIM(), float("nan")), ValueError, "got nan"),
        (lambda: FixedPointInversion(DDIM(), 1e-6, 0), ValueError, "max_iterations .*1 or more"),
        (
            lambda: FixedPointInversion(DDIM(), 1e-6, 5.0),
            TypeError,
            r"must be an integer, got 5\.0",
        ),
        (lambda: FixedPointInversion(DDIM(), 1e-6, 5, -1), ValueError, "memory .*0 or more"),
    ],
)
def test_settings_that_cannot_be_used(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_evaluations_are_at_the_levels_of_the_grid() -> None:
    recorder = Recorder(mixture())
    FixedPointInversion(DDIM()).invert(recorder, noise(2, 3), GRID)
    assert set(recorder.sigmas) == set(GRID[:-1].tolist())


def test_the_iteration_is_solved_in_the_precision_of_the_state_under_autocast() -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)
        )

        def denoiser(
            x: torch.Tensor, sigma: torch.Tensor, network: torch.nn.Module = network
        ) -> torch.Tensor:
            out: torch.Tensor = network(x / (1 + sigma[:, None] ** 2).sqrt())
            return out.to(x.dtype)

        x, solver = noise(3, 4, seed=seed, dtype=torch.float32), FixedPointInversion(Euler(), 1e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the network's own rounding is near the tolerance
            back = solver.invert(denoiser, x, karras_sigmas(8, 0.02, 14.0))
        assert bool(back.x.isfinite().all())
        converged = torch.stack([step.converged for step in back.convergence])
        assert float(converged.double().mean()) > 0.7


@pytest.mark.parametrize("memory", [0, 1, 3])
def test_gradients_pass_through_the_iteration(memory: int) -> None:
    weight = noise(3, 3, seed=1) * 0.3
    solver = FixedPointInversion(Euler(), 1e-10, memory=memory)

    def code(x: torch.Tensor) -> torch.Tensor:
        denoiser = lambda x, sigma: torch.tanh(x @ weight)  # noqa: E731
        return solver.invert(denoiser, x, [2.0, 1.0, 0.5], differentiable=True).x

    x = noise(4, 3).requires_grad_()
    direction = noise(4, 3, seed=2)
    (gradient,) = torch.autograd.grad(code(x).sum(), x)
    h = 1e-5
    with torch.no_grad():
        difference = (code(x + h * direction) - code(x - h * direction)).sum() / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-5)
