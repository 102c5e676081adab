"""Invertibility as a property, with the rounding error derived rather than guessed.

The denoiser of a Gaussian is linear, so each step is a known linear map of two states, and how a
rounding error made at one step comes out at the end of the inversion is a product of such maps. That
product holds every 1/g_i that the inversion divides by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, event, given, strategies as st

from odesolvers import (
    BDIA,
    GammaRule,
    Grid,
    IntegrationApproximator,
    InversionWarning,
    SmoothedOutput,
    StepRatio,
    exponential_sigmas,
    karras_sigmas,
    vp_sigmas,
)
from odesolvers.extend import Shear
from odesolvers.models import Gaussian, InDtype

from .problems import noise
from .test_approximators import ALL

STD = 0.6
DENOISER = Gaussian(mean=0.0, std=STD)


def slope_of_rest(shear: Shear) -> tuple[float, float]:
    """How `rest` depends on the current state, and the size of the terms it is added up from."""
    values = [1.0]
    for point, sigma in shear.calls:
        x = sum(c * values[k] for k, c in point.terms.items())
        values.append(STD**2 / (STD**2 + sigma**2) * x)
    terms = [c * values[k] for k, c in shear.rest.terms.items()]
    return sum(terms), sum(abs(term) for term in terms)


def rounding_bound(solver: BDIA, grid: Grid, sizes: Sequence[float], unit: float) -> float:
    """Bound on the error of x_0 after inverting all of `grid`, whose states have norm `sizes`.

    In k-diffusion's indices the inversion reads x_{k-1} = (x_{k+1} - rest(x_k)) / g_k. With the
    state x_k off by e_k, and u the unit roundoff,

        e_{k-1} = (e_{k+1} - rest' e_k) / g_k + η_k,
        |η_k| <= u (16 |terms of rest| + 2 |x_{k+1}| + 3 g_k |x_{k-1}|) / g_k,

    where η_k collects the roundings there and back: of the product g a and of the sum on the way, of
    the difference and of the quotient on the way back, and of the rest where it is computed at a
    neighbouring point, with the calls and the points that it is made of.
    """
    steps = [step for (step,) in solver.steps(grid)]
    total = 0.0
    for made_at in range(1, grid.steps):
        ahead, here = 0.0, 0.0
        for k in range(grid.steps - 1, 0, -1):
            slope, terms = slope_of_rest(steps[k])
            behind = (ahead - slope * here) / steps[k].gain
            if k == made_at:
                g = steps[k].gain
                local = 16 * terms * sizes[k] + 2 * sizes[k + 1] + 3 * g * sizes[k - 1]
                behind = unit * local / g
            ahead, here = here, behind
        total += abs(here)
    return total


def largest_weight_product(solver: BDIA, grid: Grid) -> float:
    """The largest product of consecutive 1/g_i: what the inversion can amplify an error by."""
    worst = product = 1.0
    for (step,) in reversed(solver.steps(grid)[1:]):
        product = max(1.0, product / step.gain)
        worst = max(worst, product)
    return worst


def largest_growth(solver: BDIA, grid: Grid) -> float:
    """The most that an error of 1 in one state can become in a later one, on the way up or down."""
    steps = [(step.gain, slope_of_rest(step)[0]) for (step,) in solver.steps(grid)[1:]]
    worst = 1.0
    for start in range(len(steps)):
        up = down = (0.0, 1.0)
        for g, r in reversed(steps[: start + 1]):
            up = up[1], (up[0] - r * up[1]) / g
            worst = max(worst, abs(up[1]))
        for g, r in steps[start:]:
            down = down[1], g * down[0] + r * down[1]
            worst = max(worst, abs(down[1]))
    return worst


def round_trip(
    solver: BDIA, sigmas: torch.Tensor, x: torch.Tensor, denoiser: object = DENOISER
) -> tuple[torch.Tensor, float]:
    """The error of x after going there and back, and the bound on its norm."""
    sizes: list[float] = []

    def measure(info: dict[str, torch.Tensor]) -> None:
        sizes.append(float(info["x"].double().norm()))

    there = solver.sample(denoiser, x, sigmas, callback=measure)  # type: ignore[arg-type]
    sizes.append(float(there.x.double().norm()))
    back = solver.invert(denoiser, there.state, sigmas)  # type: ignore[arg-type]
    assert there.state.partner is not None
    unit = torch.finfo(x.dtype).eps / 2
    return back.x.double() - x.double(), rounding_bound(solver, Grid.of(sigmas), sizes, unit)


approximators = st.sampled_from(ALL)
rules: st.SearchStrategy[GammaRule | float] = st.one_of(
    st.floats(0.3, 1.0),
    st.sampled_from([1.0, 0.5]),
    st.floats(0.0, 3.0).map(StepRatio),
    st.floats(0.3, 1.0).map(SmoothedOutput),
    st.floats(0.0, 2.0).map(lambda power: SmoothedOutput(StepRatio(power))),
)
grids = st.one_of(
    st.builds(
        karras_sigmas,
        st.integers(2, 25),
        sigma_min=st.floats(0.002, 0.5),
        sigma_max=st.floats(1.0, 80.0),
        rho=st.floats(1.0, 9.0),
        append_zero=st.booleans(),
    ),
    st.builds(exponential_sigmas, st.integers(2, 25), append_zero=st.booleans()),
    st.builds(vp_sigmas, st.integers(2, 25), append_zero=st.booleans()),
    st.lists(st.floats(0.01, 50.0), min_size=2, max_size=12, unique=True)
    .map(lambda levels: torch.tensor(sorted(levels, reverse=True), dtype=torch.float64))
    .filter(lambda s: bool((s[1:] < 0.98 * s[:-1]).all())),
)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # any rule, good or bad
@given(approximators, rules, grids, st.sampled_from([torch.float32, torch.float64]), shapes)
def test_inversion_is_exact_up_to_the_derived_rounding(
    approximator: IntegrationApproximator,
    gamma: GammaRule | float,
    sigmas: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    solver = BDIA(approximator, gamma)
    grid = Grid.of(sigmas)
    # Beyond this amplification a bound says nothing; test_it_is_no_better_than... looks there.
    amplification = largest_weight_product(solver, grid)
    assume(amplification * torch.finfo(dtype).eps < 1e-3)
    x = noise(*shape, sigma=grid.levels[0], dtype=dtype)
    error, bound = round_trip(solver, sigmas, x)
    event(f"1e{math.ceil(math.log10(amplification))} amplification")
    assert float(error.norm()) <= bound


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # any rule, good or bad
@given(approximators, rules, grids, shapes, st.data())
def test_any_stretch_of_the_grid_is_undone(
    approximator: IntegrationApproximator,
    gamma: GammaRule | float,
    sigmas: torch.Tensor,
    shape: tuple[int, ...],
    data: st.DataObject,
) -> None:
    solver = BDIA(approximator, gamma)
    grid = Grid.of(sigmas)
    growth = largest_growth(solver, grid)
    assume(growth < 1e6)
    low = data.draw(st.integers(1, grid.steps), label="turn at")
    high = data.draw(st.integers(0, low - 1), label="and at")
    x = noise(*shape, sigma=grid.levels[0])
    there = solver.sample(DENOISER, x, sigmas, stop=low)
    up = solver.invert(DENOISER, there.state, sigmas, stop=high)
    assert up.state.index == high + 1
    direct = solver.sample(DENOISER, x, sigmas, stop=high) if high > 0 else None
    expected = x if direct is None else direct.x
    # Roundings of the whole run, each grown by no more than that; terms of a sum may exceed the state.
    tolerance = 400 * grid.steps * torch.finfo(torch.float64).eps * growth
    torch.testing.assert_close(up.x, expected, rtol=0, atol=tolerance * grid.levels[0])
    if low > high + 1:
        down = solver.sample(DENOISER, up.state, sigmas, stop=low)
        torch.testing.assert_close(down.x, there.x, rtol=0, atol=tolerance * grid.levels[0])


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # any rule, good or bad
@given(approximators, rules, grids, shapes)
def test_a_lone_image_is_reached_again(
    approximator: IntegrationApproximator,
    gamma: GammaRule | float,
    sigmas: torch.Tensor,
    shape: tuple[int, ...],
) -> None:
    """Encoding multiplies by 1/g, so decoding divides by it: the image comes back unharmed."""
    solver = BDIA(approximator, gamma)
    grid = Grid.of(sigmas)
    assume(grid.steps >= 2 and largest_weight_product(solver, grid) < 1e6)
    image = noise(*shape, seed=1)
    code = solver.invert(DENOISER, image, sigmas)
    again = solver.sample(DENOISER, code.state, sigmas)
    size = max(1.0, float(code.x.abs().max()) / grid.levels[0])
    torch.testing.assert_close(again.x, image, rtol=1e-7, atol=1e-9 * size)


@pytest.mark.parametrize("approximator", ALL, ids=repr)
@pytest.mark.parametrize("gamma", [1.0, StepRatio(1)], ids=repr)
def test_the_bound_is_tight_enough_to_fail(
    approximator: IntegrationApproximator, gamma: float | GammaRule
) -> None:
    """It is far below the size of the state, and one step without noise prediction breaks it.

    Published code has that slip at the first step back.
    """
    sigmas = karras_sigmas(18)
    x = noise(64, 3, sigma=80.0, dtype=torch.float32)
    solver = BDIA(approximator, gamma)
    error, bound = round_trip(solver, sigmas, x)
    assert bound < 1e-3 * float(x.norm())
    if any(step.gain != 1.0 for (step,) in solver.steps(Grid.of(sigmas))[1:]):
        assert (
            float(error.norm()) > 1e-4 * bound
        )  # sums alone come back to the bit more often than not

    def blind_once(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x if float(sigma[0]) == float(sigmas[9].float()) else DENOISER(x, sigma)

    state = solver.sample(DENOISER, x, sigmas).state
    broken = solver.invert(blind_once, state, sigmas).x
    assert float((broken - x).double().norm()) > bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_no_better_than_the_product_of_the_weights_allows(dtype: torch.dtype) -> None:
    """Exact in algebra, useless in floating point: 0.5 over 80 steps, as published."""
    solver, sigmas = BDIA(ALL[0], 0.5), karras_sigmas(80)
    x = noise(64, 3, sigma=80.0, dtype=dtype)
    with pytest.warns(InversionWarning, match="rounding of torch"):
        error, bound = round_trip(solver, sigmas, x)
    assert largest_weight_product(solver, Grid.of(sigmas)) == 2.0**79
    assert 10 * float(x.norm()) < float(error.norm()) <= bound


@pytest.mark.parametrize("network", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approximator", ALL, ids=repr)
def test_half_precision_networks_keep_most_elements_to_the_precision_of_the_state(
    approximator: IntegrationApproximator, network: torch.dtype
) -> None:
    """A last bit may tip an input over a rounding boundary of the network: rare, and seen here."""
    x = noise(256, 3, sigma=80.0, dtype=torch.float32)
    solver, sigmas = BDIA(approximator, StepRatio(1)), karras_sigmas(18)
    error, _ = round_trip(solver, sigmas, x, InDtype(DENOISER, network))
    per_element = error.abs() / x.double().norm() * math.sqrt(x.numel())
    assert float((per_element > 1e-4).double().mean()) < 0.03
    assert float(per_element.median()) < 1e-5
