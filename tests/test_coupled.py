"""EDICT, McCallum-Foster, Rex and reversible Heun: the contract, and each paper's own formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings, strategies as st

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    EES25,
    RK4,
    Dopri5,
    DPMSolverPP2S,
    Euler,
    Exponential,
    FixedPoint,
    FloatingPoint,
    Grid,
    HeunEDM,
    IntegrationApproximator,
    McCallumFoster,
    ReversibleHeun,
    Rex,
    State,
    karras_sigmas,
    side_information_bound,
)
from odesolvers.extend import Combination, CoupledSolver, Shear

from .contract import CoupledContract
from .problems import Recorder, gaussian, increment, mixture, noise, relative_error
from .test_inversion import grids, shapes, slope_of_rest

BASES: list[IntegrationApproximator] = [
    Euler(),
    DDIM(),
    HeunEDM(),
    RK4(),
    DPMSolverPP2S(),
    Dopri5(),
    EES25(),
]
SOLVERS: list[CoupledSolver] = [
    EDICT(),
    *(McCallumFoster(base) for base in BASES),
    *(Rex(base) for base in BASES),
    ReversibleHeun(),
]


# Rex multiplies by σ / τ on the way up what the two states differ by after the step from 0.
ABOVE_ZERO = karras_sigmas(400, sigma_min=0.01, sigma_max=10.0, append_zero=False)


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # so few steps do not encode
class TestEDICT(CoupledContract):
    solver = EDICT()
    encoding_grid = karras_sigmas(40, sigma_min=0.01, sigma_max=10.0)


class TestMcCallumFosterEuler(CoupledContract):
    solver = McCallumFoster(Euler())


class TestMcCallumFosterDDIM(CoupledContract):
    solver = McCallumFoster(DDIM(), zeta=0.99)


class TestMcCallumFosterHeunEDM(CoupledContract):
    solver = McCallumFoster(HeunEDM())


class TestMcCallumFosterRK4(CoupledContract):
    solver = McCallumFoster(RK4())


class TestMcCallumFosterDPMSolverPP2S(CoupledContract):
    solver = McCallumFoster(DPMSolverPP2S())


class TestMcCallumFosterDopri5(CoupledContract):
    solver = McCallumFoster(Dopri5())


class TestMcCallumFosterEES25(CoupledContract):
    solver = McCallumFoster(EES25())


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # so few steps do not encode
class TestRexEuler(CoupledContract):
    solver = Rex(Euler())
    encoding_grid = ABOVE_ZERO


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # so few steps do not encode
class TestRexHeunEDM(CoupledContract):
    solver = Rex(HeunEDM())
    encoding_grid = ABOVE_ZERO


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # so few steps do not encode
class TestRexRK4(CoupledContract):
    solver = Rex(RK4())
    encoding_grid = ABOVE_ZERO


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # so few steps do not encode
class TestRexDopri5(CoupledContract):
    solver = Rex(Dopri5())
    encoding_grid = ABOVE_ZERO


class TestReversibleHeun(CoupledContract):
    solver = ReversibleHeun()
    resuming_costs = 1


# --- the papers' formulas, in the papers' variables ------------------------------------------------


def epsilon(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The predicted noise, (x - D) / σ, which is the slope of the flow."""
    return (x - mixture()(x, torch.full(x.shape[:1], sigma, dtype=x.dtype))) / sigma


def denoised(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return mixture()(x, torch.full(x.shape[:1], sigma, dtype=x.dtype))


def run(
    solver: CoupledSolver, levels: list[float], x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair that differs, so that formulas that exchange the two are told apart."""
    start = State(x, y, 0, tuple(levels), repr(solver), coupled=True)
    state = solver.sample(mixture(), start, levels).state
    assert state.partner is not None
    return state.current, state.partner


X, Y = noise(4, 3, sigma=3.0), noise(4, 3, sigma=3.0, seed=1)


@pytest.mark.parametrize("zeta", [0.999, 0.7])
@pytest.mark.parametrize("base", [*BASES, Exponential(HeunEDM())], ids=repr)
def test_mccallum_foster_in_the_state_of_the_method(
    base: IntegrationApproximator, zeta: float
) -> None:
    """Y' = ζ y + (1 - ζ) v + Ψ_h(v), v' = v - Ψ_{-h}(y'), with Ψ the increment of z = s x."""
    sigma, target = 3.0, 2.0

    def psi(z: torch.Tensor, here: float, there: float) -> torch.Tensor:
        x = z / base.scale(here)
        return base.scale(there) * (x + increment(base, mixture(), x, here, there)) - z

    y, v = X * base.scale(sigma), Y * base.scale(sigma)
    y_next = zeta * y + (1 - zeta) * v + psi(v, sigma, target)
    v_next = v - psi(y_next, target, sigma)
    ours = run(McCallumFoster(base, zeta), [sigma, target], X, Y)
    assert relative_error(ours[0], y_next / base.scale(target)) < 1e-14
    assert relative_error(ours[1], v_next / base.scale(target)) < 1e-14


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_the_step_to_zero_is_in_the_plain_state(base: IntegrationApproximator) -> None:
    """Y' = ζ y + (1 - ζ) v + Δ(v), and v' = v - Δ(y') with Heun's Δ, which needs the slope at σ."""
    zeta, sigma = 0.9, 0.5
    for solver in (McCallumFoster(base, zeta), Rex(base, zeta)):
        y_next = zeta * X + (1 - zeta) * Y - sigma * epsilon(Y, sigma)
        v_next = Y - sigma / 2 * epsilon(y_next, sigma)
        ours = run(solver, [sigma, 0.0], X, Y)
        assert relative_error(ours[0], y_next) < 1e-14
        assert relative_error(ours[1], v_next) < 1e-14


def test_reversible_heun_equals_algorithm_1() -> None:
    levels = [3.0, 2.2, 1.5, 0.9]
    y, y_hat = X, Y
    for s, t in pairwise(levels):
        h = t - s
        y_hat_next = 2 * y - y_hat + h * epsilon(y_hat, s)
        y = y + h / 2 * (epsilon(y_hat, s) + epsilon(y_hat_next, t))
        y_hat = y_hat_next
    ours = run(ReversibleHeun(), levels, X, Y)
    assert relative_error(ours[0], y) < 1e-14
    assert relative_error(ours[1], y_hat) < 1e-14


def test_reversible_heun_steps_to_zero_as_euler_does() -> None:
    ours = run(ReversibleHeun(), [0.5, 0.0], X, Y)
    assert relative_error(ours[0], X - 0.5 * epsilon(Y, 0.5)) < 1e-14
    assert torch.equal(ours[1], Y)


def test_reversible_heun_is_the_leapfrog_rule_and_its_output_smoothed() -> None:
    """ŷ is BDIA(Euler(), 1.0); y is Gragg's mean of it, (ŷ_k + ŷ_{k+1} - h_k d(ŷ_k)) / 2."""
    grid = karras_sigmas(12, 0.1, 10.0, append_zero=False)
    x = noise(4, 3, sigma=10.0)
    for k in range(1, 11):
        state = ReversibleHeun().sample(mixture(), x, grid, stop=k).state
        leapfrog = BDIA(Euler(), 1.0).sample(mixture(), x, grid, stop=k + 1).state
        assert state.partner is not None
        assert leapfrog.partner is not None
        assert relative_error(state.partner, leapfrog.partner) < 1e-12
        here, ahead = leapfrog.partner, leapfrog.current
        h = float(grid[k + 1] - grid[k])
        smoothed = (here + ahead - h * epsilon(here, float(grid[k]))) / 2
        assert relative_error(state.current, smoothed) < 1e-12
        assert relative_error(state.current, here) > 1e-6


def test_reversible_heun_evaluates_each_point_once() -> None:
    x, above = noise(2, 5, sigma=10.0), karras_sigmas(9, 0.1, 10.0, append_zero=False)
    for grid, calls in ((above, 9), (karras_sigmas(9, 0.1, 10.0), 9)):
        there, back = Recorder(gaussian()), Recorder(gaussian())
        state = ReversibleHeun().sample(there, x, grid).state
        ReversibleHeun().invert(back, state, grid)
        assert there.sigmas == grid[:9].tolist()
        assert back.sigmas == there.sigmas[::-1]
        assert len(there.points) == calls
    plain = ReversibleHeun(FixedPoint()).sample(gaussian(), x, above)
    assert plain.nfe == 9
    twice = ReversibleHeun(FixedPoint(check_determinism=True))
    assert twice.sample(gaussian(), x, above).nfe == 10
    state = twice.sample(gaussian(), x, above).state
    assert twice.invert(gaussian(), state, above).nfe == 10


def test_an_output_is_used_again_at_its_own_point_alone() -> None:
    """Two calls of one state at one level, of which the first is at half the state."""

    class Halving(CoupledSolver):
        def step(self, sigma: float, target: float) -> tuple[Shear, ...]:
            half = Shear.of(lambda y, D: 0.1 * D(0.5 * y, sigma), gain=1.0)
            whole = Shear.of(lambda y, D: 0.1 * D(y, sigma), gain=1.0)
            swap = Shear((), Combination({}), gain=1.0)
            return half, swap, whole, swap

    x, recorder = noise(2, 5, sigma=2.0), Recorder(gaussian())
    Halving().sample(recorder, x, [2.0, 1.0])
    assert len(recorder.points) == 2
    assert torch.equal(recorder.points[0], 0.5 * x)
    assert torch.equal(recorder.points[1], x)


def test_a_denoiser_that_returns_one_buffer_is_remembered_rightly() -> None:
    """Reversible Heun keeps an output from one step to the next; nothing may write to it between."""
    buffer = torch.empty(2, 5, dtype=torch.float64)
    x, grid = noise(2, 5, sigma=10.0), karras_sigmas(9, 0.1, 10.0)
    plain = ReversibleHeun().sample(gaussian(), x, grid)
    shared = ReversibleHeun().sample(lambda x, s: buffer.copy_(gaussian()(x, s)), x, grid)
    assert torch.equal(plain.x, shared.x)


# --- invertibility as a property -------------------------------------------------------------------


couplings = st.one_of(
    st.sampled_from(SOLVERS),
    st.floats(0.8, 1.0).map(EDICT),
    st.builds(McCallumFoster, st.sampled_from(BASES), st.floats(0.9, 1.0)),
    st.builds(Rex, st.sampled_from(BASES), st.floats(0.9, 1.0)),
)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)


def rounding_bound(solver: CoupledSolver, grid: Grid, steps: int) -> float:
    """Bound on the error of a state of size 1 that went down `steps` and back, for `gaussian_of`.

    That denoiser is linear and the same for every element, so a shear is ``c = g a + r b`` with numbers
    g and r. Undoing it errs by some roundings of its terms, over g, and carries on the errors of the
    shears that were undone before it.
    """
    unit, shears = torch.finfo(torch.float64).eps, []
    a = b = 1.0
    for step in solver.steps(grid)[:steps]:
        for shear in step:
            r, terms = slope_of_rest(shear)
            c = shear.gain * a + r * b
            local = unit * (100 * terms * abs(b) + 3 * abs(c) + 3 * abs(shear.gain * a))
            shears.append((shear.gain, r, local / abs(shear.gain)))
            a, b = b, c
    total = 0.0
    for made_at in range(len(shears)):
        error_b, error_c = 0.0, 0.0
        for k, (g, r, local) in enumerate(reversed(shears)):
            error_b, error_c = (error_c - r * error_b) / g + local * (k == made_at), error_b
        total += max(abs(error_b), abs(error_c))
    return total


@QUICK
@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # any solver, on any grid
@given(couplings, grids, shapes, st.data())
def test_any_stretch_is_undone(
    solver: CoupledSolver, sigmas: torch.Tensor, shape: tuple[int, ...], data: st.DataObject
) -> None:
    """To a rounding error that grows as gains and slopes say, and is never more than that."""
    grid = Grid.of(sigmas)
    low = data.draw(st.integers(1, grid.steps), label="turn at")
    x = noise(*shape, sigma=grid.levels[0])
    there = solver.sample(gaussian_of(shape), x, sigmas, stop=low)
    back = solver.invert(gaussian_of(shape), there.state, sigmas)
    assert back.state.index == 0
    bound = rounding_bound(solver, grid, low)
    event(f"1e{math.ceil(math.log10(bound))} bound")
    assert float((back.x - x).abs().max()) <= bound * float(x.abs().max())


@QUICK
@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # any solver, on any grid
@given(couplings, grids, shapes, st.data())
def test_fixed_point_is_exact_to_the_bit_from_either_end(
    solver: CoupledSolver, sigmas: torch.Tensor, shape: tuple[int, ...], data: st.DataObject
) -> None:
    exact = replace(solver, arithmetic=FixedPoint())
    grid = Grid.of(sigmas)
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    stop = data.draw(st.integers(1, grid.steps), label="turn at")
    denoiser: Any = lambda x, s: smooth(x, s)  # noqa: E731
    try:
        x = exact.arithmetic.snap(noise(*shape, sigma=grid.levels[0], dtype=dtype))
        there = exact.sample(denoiser, x, sigmas, stop=stop)
        assert torch.equal(exact.invert(denoiser, there.state, sigmas).x, x)
        image = exact.arithmetic.snap(noise(*shape, dtype=dtype))
        code = exact.invert(denoiser, image, sigmas, stop=stop - 1)
        assert torch.equal(exact.sample(denoiser, code.state, sigmas).x, image)
    except OverflowError:
        return  # refused aloud: an unstable run that left the range


def smooth(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A denoiser that is not linear, of any shape."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(x / (1 + s * s)) * 0.8


def gaussian_of(shape: tuple[int, ...]) -> Any:
    """A linear denoiser of any shape: data of standard deviation 0.6."""

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = sigma.reshape(-1, *[1] * (len(shape) - 1))
        return x * 0.36 / (0.36 + s * s)

    return denoiser


@dataclass(frozen=True, repr=False, eq=False)
class FixedWeights(FloatingPoint):
    """Floating point with the weights that `FixedPoint` puts in place of others."""

    def weight(self, g: float) -> float:
        return FixedPoint().weight(g)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fixed_point_at_length(solver: CoupledSolver, dtype: torch.dtype) -> None:
    """40 steps, in one piece and in pieces, with side information near what is destroyed."""
    exact = replace(solver, arithmetic=FixedPoint())
    grid = karras_sigmas(40)
    x = exact.arithmetic.snap(noise(2, 16, sigma=80.0, dtype=dtype))
    there = exact.sample(smooth, x, grid)
    assert torch.equal(exact.invert(smooth, there.state, grid).x, x)
    assert there.state.side is not None
    bits = there.state.side.bits_per_element
    assert bits <= side_information_bound(exact, grid) + 4
    state = exact.sample(smooth, x, grid, stop=17).state
    state = exact.sample(smooth, state, grid).state
    assert torch.equal(state.current, there.state.current)
    for stop in (30, 9, 0):
        solution = exact.invert(smooth, state, grid, stop=stop)
        state = solution.state
    assert torch.equal(solution.x, x)
    if dtype == torch.float64:  # a single has rounding of its own, which some of these amplify
        plain = replace(solver, arithmetic=FixedWeights()).sample(smooth, x, grid)
        torch.testing.assert_close(there.x, plain.x, rtol=1e-6, atol=1e-6)


def test_a_wrong_output_on_the_way_back_is_noticed() -> None:
    exact, grid = EDICT(arithmetic=FixedPoint()), karras_sigmas(6)
    state = exact.sample(smooth, noise(2, 4, sigma=80.0), grid).state
    with pytest.raises(RuntimeError, match=r"not what it was|does not fit the run"):
        exact.invert(lambda x, s: smooth(x, s) + 1e-6, state, grid)


# --- files and errors ------------------------------------------------------------------------------


def test_a_coupled_state_survives_a_file(tmp_path: Any) -> None:
    grid, x = karras_sigmas(6), noise(2, 3, sigma=80.0)
    for solver in (EDICT(), EDICT(arithmetic=FixedPoint())):
        there = solver.sample(mixture(), x, grid)
        back = solver.invert(mixture(), there.state, grid)  # index 0, which no two-step pair has
        for solution in (there, back):
            solution.state.save(tmp_path / "state.safetensors")
            loaded = State.load(tmp_path / "state.safetensors")
            assert loaded.coupled
            assert torch.equal(loaded.current, solution.state.current)
            assert torch.equal(loaded.partner, solution.state.partner)
        again = solver.sample(mixture(), loaded, grid)
        assert relative_error(again.x, there.x) < 1e-12


def test_a_pair_of_the_other_kind_is_refused() -> None:
    grid = tuple(karras_sigmas(6).tolist())
    with pytest.raises(
        ValueError, match="stands at the same level, got a State with coupled=False"
    ):
        EDICT().sample(mixture(), State(X, Y, 1, grid, repr(EDICT())), grid)
    bdia = BDIA(Euler())
    with pytest.raises(ValueError, match="stands one level up, got a State with coupled=True"):
        bdia.sample(mixture(), State(X, Y, 1, grid, repr(bdia), coupled=True), grid)


@pytest.mark.parametrize(
    "make", [EDICT, lambda z: McCallumFoster(Euler(), z), lambda z: Rex(RK4(), z)]
)
def test_weights_that_cannot_be_used(make: Callable[[Any], CoupledSolver]) -> None:
    for value in (0.0, -0.1, 1.01, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\], got"):
            make(value)
    for wrong in ("0.9", True, None, 1j):
        with pytest.raises(TypeError, match=r"must be a number, got"):
            make(wrong)
    assert make(1).steps(Grid.of([2.0, 1.0, 0.0]))


def test_other_settings_that_cannot_be_used() -> None:
    for make in (McCallumFoster, Rex):
        with pytest.raises(
            TypeError, match=r"McCallumFoster wraps .*HeunEDM|Exponential wraps .*HeunEDM"
        ):
            make(Euler)  # type: ignore[arg-type]
    for cls in (EDICT, ReversibleHeun):
        with pytest.raises(TypeError, match=r"arithmetic must be .*such as"):
            cls(arithmetic=FixedPoint)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="two copies of a lone state"):
        EDICT().start(2.0, 1.0)


def test_a_scale_that_vanishes_has_no_inverse() -> None:
    class Vanishing(IntegrationApproximator):
        order = 1
        evaluations = 1

        def increment(self, x: Any, sigma: float, target: float, denoise: Any) -> Any:
            return Euler().increment(x, sigma, target, denoise)

        def scale(self, sigma: float) -> float:
            return 0.0 if sigma > 2.0 else 1.0

    solver, grid = McCallumFoster(Vanishing()), [3.0, 2.0, 1.0]
    state = solver.sample(mixture(), X, grid).state
    with pytest.raises(ValueError, match=r"cannot be inverted: its step from sigmas\[0\] = 3"):
        solver.invert(mixture(), state, grid)
