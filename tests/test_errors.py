"""Bad input, each with its own error that says what came and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import pytest
import torch

from odesolvers import (
    BDIA,
    DDIM,
    Euler,
    FloatingPoint,
    HeunEDM,
    IntegrationApproximator,
    InversionWarning,
    State,
    StepRatio,
    karras_sigmas,
)
from odesolvers.extend import Combination, Denoise, euler

from .problems import gaussian, noise

GRID = karras_sigmas(6, 0.1, 10.0)
X = noise(2, 5, sigma=10.0, dtype=torch.float32)
SOLVER = BDIA(HeunEDM())


@pytest.fixture
def state() -> State:
    return SOLVER.sample(gaussian(), X, GRID).state


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 5, dtype=torch.int64), TypeError, r"int64: convert with x.float\(\)"),
        (torch.ones(2, 5, dtype=torch.complex64), TypeError, "floating point tensor, got"),
        ([1.0, 2.0], TypeError, "x must be a tensor or a State, got list"),
        (torch.tensor(1.0), ValueError, r"shape \(B, ...\) with B >= 1, got \(\)"),
        (torch.ones(0, 5), ValueError, r"got \(0, 5\)"),
        (torch.full((2, 5), math.nan), FloatingPointError, "start from is not finite"),
        (torch.full((2, 5), math.inf), FloatingPointError, "start from is not finite"),
    ],
)
@pytest.mark.parametrize("walk", [SOLVER.sample, SOLVER.invert])
def test_states(walk: Callable[..., Any], x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        walk(gaussian(), x, GRID)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x, s: x[:1], ValueError, r"\(2, 5\) on cpu, got torch.float32 \(1, 5\) on cpu"),
        (lambda x, s: x.sum(1, keepdim=True), ValueError, r"got torch.float32 \(2, 1\)"),
        (lambda x, s: x.double(), TypeError, r"float64 for a state in torch.float32.*InDtype"),
        (lambda x, s: x.bfloat16(), TypeError, r"InDtype\(denoiser, torch.bfloat16\)"),
        (lambda x, s: (x,), TypeError, "must return a tensor, got tuple"),
        (lambda x, s: x.to("meta"), ValueError, "on meta"),
    ],
)
def test_outputs(output: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        SOLVER.sample(output, X, GRID)
    assert "at level 0 of the grid, sigma = 10" in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("level", [0, 3, 5])
def test_outputs_that_are_not_finite_name_the_step_and_sigma(
    bad: float, level: int, device: torch.device
) -> None:
    sigma_bad = float(GRID[level])

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        reached = (sigma <= sigma_bad * (1 + 1e-6)).unsqueeze(1)
        return torch.where(reached, torch.full_like(x, bad), 0.5 * x)

    message = rf"output is not finite at level {level} of the grid, sigma = {sigma_bad:.6g}"
    with pytest.raises(FloatingPointError, match=message):
        BDIA(Euler()).sample(denoiser, X.to(device), GRID)


def test_a_sum_that_overflows_is_not_taken_for_a_value_that_does() -> None:
    x = torch.full((1, 1000), 6e4, dtype=torch.float16)
    assert x.sum().isinf()
    Euler().sample(lambda x, sigma: x, x, GRID)
    huge = torch.full((1, 1000), 1e36)
    Euler().sample(lambda x, sigma: x, huge, GRID)


def test_a_state_that_overflows_is_reported() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        BDIA(Euler()).sample(lambda x, sigma: -1e30 * x, X, GRID)


def test_a_state_that_overflows_in_the_last_step_is_reported() -> None:
    def huge_at_last(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x if float(sigma[0]) > 2 else torch.full_like(x, -3e38)

    with pytest.raises(FloatingPointError, match="final state is not finite"):
        BDIA(Euler()).sample(huge_at_last, X, [4.0, 2.0, 1.0])


def test_what_is_no_denoiser() -> None:
    with pytest.raises(TypeError, match=r"callable as denoiser\(x, sigma\), got Tensor"):
        SOLVER.sample(X, X, GRID)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"extra_args must be a mapping.*got list"):
        SOLVER.sample(gaussian(), X, GRID, extra_args=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="HeunEDM"):
        BDIA(HeunEDM)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"arithmetic must be .*such as"):
        BDIA(HeunEDM(), arithmetic=FloatingPoint)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda x, d: x * d, "finite numbers as coefficients"),
        (lambda x, d: x * float("nan"), "finite numbers as coefficients"),
        (lambda x, d: x + 1.0, "added to a combination of x and outputs, got 1.0"),
        (lambda x, d: 0.0, "added to a combination of x and outputs, got 0.0"),
        (lambda x, d: None, "added to a combination of x and outputs, got None: .* return nothing"),
    ],
)
def test_formulas_that_are_no_combination(formula: Callable[..., Any], message: str) -> None:
    class Wrong(IntegrationApproximator):
        order = 1
        evaluations = 1

        def increment(
            self, x: Combination, sigma: float, target: float, denoise: Denoise
        ) -> Combination:
            return formula(x, denoise(x, sigma))

    with pytest.raises(TypeError, match=message):
        Wrong().sample(gaussian(), X, GRID)


def test_denoisers_that_write_where_they_must_not() -> None:
    def in_place(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x.mul_(0.5)

    with pytest.raises(ValueError, match="wrote to its input at level 0"):
        SOLVER.sample(in_place, X, GRID)

    buffer = torch.empty_like(X)

    def one_buffer(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return buffer.copy_(0.5 * x)

    with pytest.raises(ValueError, match="storage of an earlier output again, at level 0"):
        SOLVER.sample(one_buffer, X, GRID)
    fresh = BDIA(Euler()).sample(lambda x, sigma: 0.5 * x, X, GRID).x
    assert torch.equal(BDIA(Euler()).sample(one_buffer, X, GRID).x, fresh)  # one output a step


def test_an_inversion_that_overflows_names_the_weights_not_the_denoiser() -> None:
    grid = karras_sigmas(300, 0.1, 10.0)
    overflow = pytest.raises(
        FloatingPointError, match=r"state handed to the denoiser.*divides by g"
    )
    with pytest.warns(InversionWarning, match="amplifies"), overflow:
        BDIA(Euler(), 0.5).invert(gaussian(), X, grid)


def test_a_state_from_another_grid(state: State) -> None:
    with pytest.raises(ValueError, match=r"another grid: it has 7 levels, sigmas has 6"):
        SOLVER.invert(gaussian(), state, GRID[:-1])
    moved = GRID.clone()
    moved[3] *= 1.01
    with pytest.raises(ValueError, match=r"another grid: level 3 is 0\.916"):
        SOLVER.invert(gaussian(), state, moved)


def test_a_state_from_another_solver(state: State) -> None:
    for other in (BDIA(DDIM()), BDIA(HeunEDM(), 0.9), BDIA(HeunEDM(), StepRatio(1))):
        with pytest.raises(ValueError, match=r"another solver: it was made by BDIA\(.*HeunEDM"):
            other.invert(gaussian(), state, GRID)
    alone = HeunEDM().sample(gaussian(), X, GRID, stop=2).state
    with pytest.raises(ValueError, match=r"made by HeunEDM\(\)"):
        SOLVER.invert(gaussian(), alone, GRID)


@pytest.mark.parametrize(
    "foreign", ["\x1b[2J\n" * 9, "\u202e\ud800", "A" * 10**6, "BDIA(" + "A" * 10**6]
)
def test_solvers_of_strangers_are_shown_in_short(state: State, foreign: str) -> None:
    """Whatever a state says of its solver, messages are short and do not reach the terminal."""
    strange = replace(state, solver=foreign)
    with pytest.raises(ValueError, match="another solver: it was made by") as caught:
        SOLVER.invert(gaussian(), strange, GRID)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert repr(strange).isprintable()
    assert len(repr(strange)) < 300
    late = replace(state, solver=repr(SOLVER) + "x" * 10**5)
    with pytest.raises(ValueError, match=r"made by BDIA\(.*xxx\.\.\., this is BDIA\("):
        SOLVER.invert(gaussian(), late, GRID)


def test_a_pair_that_does_not_fit(state: State) -> None:
    assert state.partner is not None
    for partner in (state.partner[:1], state.partner.double()):
        with pytest.raises(ValueError, match="two states of a pair must agree"):
            SOLVER.invert(gaussian(), replace(state, partner=partner), GRID)
    for index in (0, 7):
        with pytest.raises(ValueError, match=f"between 1 and 6, got {index}"):
            SOLVER.invert(gaussian(), replace(state, index=index), GRID)
    nan = torch.full_like(state.partner, math.nan)
    with pytest.raises(FloatingPointError, match="state to start from is not finite"):
        SOLVER.invert(gaussian(), replace(state, partner=nan), GRID)


def test_stops_outside_the_grid(state: State) -> None:
    for stop in (0, 7, -1):
        with pytest.raises(ValueError, match=f"can stop at 1 to 6, got stop = {stop}"):
            SOLVER.sample(gaussian(), X, GRID, stop=stop)
    for stop in (6, 7, -1):
        with pytest.raises(ValueError, match=f"can stop at 5 to 0, got stop = {stop}"):
            SOLVER.invert(gaussian(), X, GRID, stop=stop)
    for stop in (7, -1):
        with pytest.raises(ValueError, match=f"can stop at 6 to 0, got stop = {stop}"):
            SOLVER.invert(gaussian(), state, GRID, stop=stop)
    for stop in (2.0, True, "2"):
        with pytest.raises(TypeError, match="stop must be an integer"):
            SOLVER.sample(gaussian(), X, GRID, stop=stop)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="can stop at 6 to 6, got stop = 5"):
        SOLVER.sample(gaussian(), state, GRID, stop=5)


@final
@dataclass(frozen=True, repr=False, eq=False)
class NoiseScaled(IntegrationApproximator):
    """Euler whose state is x / σ: a scale with no value at the level 0."""

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        return euler(x, sigma, target, denoise)

    def scale(self, sigma: float) -> float:
        return 1 / sigma if sigma > 0 else math.inf


def test_inverting_through_level_zero_where_it_keeps_nothing() -> None:
    """The last step then weighs the state before with 0, so neither a pair nor an image leads back."""
    solver = BDIA(NoiseScaled())
    there = solver.sample(gaussian(), X, GRID)
    for start in (there.state, there.x):
        with pytest.raises(ValueError, match=r"step from sigmas\[5\] = 0.1 to sigmas\[6\] = 0"):
            solver.invert(gaussian(), start, GRID)
    above = GRID[:-1]
    there = solver.sample(gaussian(), X, above)
    back = solver.invert(gaussian(), there.state, above)
    assert torch.allclose(back.x, X, rtol=1e-3)
