"""Rules for g_i: their values, and what they refuse."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.amplification import amplification, stable_diffusion
from odesolvers import (
    BDIA,
    DDIM,
    RK3,
    ConstantGamma,
    DampedStepRatio,
    Euler,
    FixedPoint,
    GammaRule,
    Grid,
    HeunEDM,
    HeunStepRatio,
    PerStep,
    SmoothedOutput,
    StepRatio,
    karras_sigmas,
    order_gaining,
)

from .problems import gaussian, mixture, noise, reference, relative_error

GRID = Grid.of([8.0, 4.0, 3.0, 1.0, 0.0])


def weights(rule: GammaRule, scale: object = None) -> list[float]:
    return rule.weights(GRID, scale or Euler().scale)  # type: ignore[arg-type]


def test_constant_in_the_unscaled_state() -> None:
    assert weights(ConstantGamma(0.7)) == [0.7] * 3
    s = [1 / math.sqrt(1 + sigma**2) for sigma in GRID.levels]
    expected = [0.7 * s[k - 1] / s[k + 1] for k in (1, 2, 3)]
    assert weights(ConstantGamma(0.7), DDIM().scale) == pytest.approx(expected, rel=1e-14)


def test_step_ratio_is_the_step_ahead_over_the_step_behind() -> None:
    assert weights(StepRatio(1)) == [1 / 4, 2 / 1, 1 / 2]
    assert weights(StepRatio(2)) == [1 / 16, 4.0, 1 / 4]
    assert weights(StepRatio(2), DDIM().scale) == weights(StepRatio(2))


def test_damping_is_the_ratio_of_psi_at_the_middles_of_the_steps() -> None:
    """In closed form; and nothing far above the cutoff, σ^power far below it."""
    middles = [6.0, 3.5, 2.0, 0.5]
    psi = [(1 + (2.0 / m) ** 2) ** -1.5 for m in middles]
    expected = [r * b / a for r, a, b in zip(weights(StepRatio(1)), psi, psi[1:], strict=False)]
    assert weights(DampedStepRatio(2.0, 3.0)) == pytest.approx(expected, rel=1e-14)
    assert weights(DampedStepRatio(2.0, 0.0)) == weights(StepRatio(1))
    above = weights(DampedStepRatio(1e-6, 3.0))
    assert above == pytest.approx(weights(StepRatio(1)), rel=1e-9)
    below = [
        g / r
        for g, r in zip(weights(DampedStepRatio(1e6, 3.0)), weights(StepRatio(1)), strict=False)
    ]
    ratios = [(b / a) ** 3 for a, b in pairwise(middles)]
    assert below == pytest.approx(ratios, rel=1e-9)
    assert weights(DampedStepRatio(2.0), DDIM().scale) == weights(DampedStepRatio(2.0))


@pytest.mark.parametrize(
    ("cutoff", "power"), [(0, 1), (-1, 1), (math.inf, 1), (1, -1), (1, math.nan)]
)
def test_damping_out_of_range_is_refused(cutoff: float, power: float) -> None:
    with pytest.raises(ValueError, match="cutoff > 0 and power >= 0"):
        DampedStepRatio(cutoff, power)


def test_smoothing_changes_the_last_weight_alone() -> None:
    assert weights(SmoothedOutput(1.0)) == [1.0, 1.0, 0.5]
    assert weights(SmoothedOutput(StepRatio(1))) == [0.25, 2.0, pytest.approx(1 / 3)]
    assert SmoothedOutput(1.0).weights(Grid.of([1.0, 0.0]), Euler().scale) == []


def test_a_number_is_the_constant_rule() -> None:
    x = noise(1, 5, sigma=8.0)
    by_number = BDIA(DDIM(), 0.7).sample(gaussian(), x, GRID).x
    by_rule = BDIA(DDIM(), ConstantGamma(0.7)).sample(gaussian(), x, GRID).x
    assert by_number.equal(by_rule)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan, math.inf])
def test_a_constant_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\]"):
        BDIA(HeunEDM(), gamma)


@pytest.mark.parametrize("gamma", ["1.0", None, True, [0.5]])
def test_what_is_no_rule_is_refused(gamma: object) -> None:
    with pytest.raises(TypeError, match="gamma must be a number in"):
        BDIA(HeunEDM(), gamma)  # type: ignore[arg-type]


def test_inversion_with_gamma_zero_is_refused() -> None:
    solver = BDIA(HeunEDM(), 0.0)
    state = solver.sample(gaussian(), noise(1, 5, sigma=8.0), GRID).state
    with pytest.raises(ValueError, match=r"cannot be inverted.*weight g = 0"):
        solver.invert(gaussian(), state, GRID)


def test_the_wrong_number_of_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gives 2 weights; a grid of 4 steps needs 3"):
        BDIA(Euler(), PerStep([0.5, 0.5])).sample(gaussian(), noise(1, 5, sigma=8.0), GRID)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_weights_that_are_not_usable_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"not negative, got .* as values\[1\]"):
        PerStep([0.5, bad, 0.5])

    class Bad(GammaRule):
        def weights(self, grid: Grid, scale: object) -> list[float]:
            return [0.5, bad, 0.5]

    with pytest.raises(ValueError, match=r"at the step from sigmas\[2\] = 3"):
        BDIA(Euler(), Bad()).sample(gaussian(), noise(1, 5, sigma=8.0), GRID)


def test_a_power_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond all numbers"):
        BDIA(Euler(), StepRatio(-1000)).sample(gaussian(), noise(1, 5, sigma=8.0), GRID)


def test_equal_solvers_have_one_description() -> None:
    assert repr(BDIA(DDIM(), StepRatio(1))) == repr(BDIA(DDIM(), StepRatio(1.0)))
    assert repr(BDIA(DDIM(), 1)) == repr(BDIA(DDIM(), ConstantGamma(1.0)))
    assert BDIA(DDIM(), np.float32(0.5)) == BDIA(DDIM(), 0.5)


def test_step_ratio_refuses_a_power_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="power must be a finite number"):
        StepRatio(math.inf)


@pytest.mark.parametrize("n", [10, 20, 50, 100])
def test_neutral_rule_hardly_amplifies_on_the_schedule_of_stable_diffusion(n: int) -> None:
    """With trailing timesteps. Leading ones end with a short step, which costs a factor of its own."""
    grid = stable_diffusion(n, "trailing", 0)
    assert amplification(StepRatio(1), grid) < 3
    assert amplification(ConstantGamma(1.0), grid) > 8
    assert amplification(StepRatio(2), grid) > 50
    leading = stable_diffusion(n, "leading", 1)
    assert amplification(StepRatio(1), leading) < 10


def test_the_order_gaining_rule() -> None:
    assert order_gaining(Euler()) == StepRatio(2)
    assert order_gaining(RK3()) == StepRatio(4)
    with pytest.raises(ValueError, match=r"HeunEDM\(\) has the even order 2.*StepRatio\(1\)"):
        order_gaining(HeunEDM())
    with pytest.raises(TypeError, match=r"instance such as Euler\(\), got 'euler'"):
        order_gaining("euler")  # type: ignore[arg-type]


def test_heuns_step_ratio_in_closed_form() -> None:
    """r² / (1 + 2 r): 1/3 on equal steps."""
    assert weights(HeunStepRatio()) == pytest.approx([1 / 24, 4 / 5, 1 / 8], rel=1e-14)
    equal = HeunStepRatio().weights(Grid.of([4.0, 3.0, 2.0, 1.0]), Euler().scale)
    assert equal == pytest.approx([1 / 3, 1 / 3], rel=1e-14)


def test_heuns_step_ratio_samples_better_than_heun_and_goes_back_in_fixed_point() -> None:
    """At the same evaluations, and exactly."""
    grid = karras_sigmas(13, 0.1, 8.0, append_zero=False)
    x = FixedPoint().snap(noise(16, 3, sigma=8.0))
    exact = reference(mixture(), x, 8.0, 0.1)
    solver = BDIA(HeunEDM(), HeunStepRatio(), FixedPoint())
    alone, refined = HeunEDM().sample(mixture(), x, grid), solver.sample(mixture(), x, grid)
    assert refined.nfe == alone.nfe
    assert relative_error(refined.x, exact) < 0.5 * relative_error(alone.x, exact)
    assert solver.invert(mixture(), refined.state, grid).x.equal(x)
