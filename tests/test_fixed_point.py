"""Inversion that is exact to the bit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, assume, given, reject, settings, strategies as st
from torch import Tensor

from benchmarks.common import EXACT_PROBLEMS as PROBLEMS, Problem
from odesolvers import (
    BDIA,
    DDIM,
    RK3,
    RK4,
    DPMSolverPP2S,
    Euler,
    FixedPoint,
    HeunEDM,
    InversionWarning,
    Midpoint,
    PerStep,
    SmoothedOutput,
    State,
    StepRatio,
    exponential_sigmas,
    karras_sigmas,
    side_information_bound,
    vp_sigmas,
)
from odesolvers.models import Gaussian, IdealDenoiser, InDtype, load_digits

from .problems import smooth

APPROXIMATORS = (Euler(), DDIM(), Midpoint(), HeunEDM(), RK3(), RK4(), DPMSolverPP2S())
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)
FULL = settings(QUICK, max_examples=2500)


# --- the property: any walk on the grid comes back to the bit --------------------------------------


@st.composite
def grids(draw: st.DrawFn, n: int) -> list[float]:
    kind = draw(st.sampled_from(["karras", "exponential", "vp", "any"]))
    if kind == "any" or n < 2:
        steps = draw(st.lists(st.floats(0.01, 3.0), min_size=n, max_size=n))
        levels = [draw(st.sampled_from([0.0, 0.002, 0.1]))]
        for step in steps:
            levels.append(levels[-1] + step)
        return levels[::-1]
    if kind == "karras":
        rho = draw(st.sampled_from([1.0, 3.0, 7.0]))
        sigmas = karras_sigmas(n, rho=rho, append_zero=draw(st.booleans()))
    elif kind == "exponential":
        sigmas = exponential_sigmas(n, 0.03, 14.6, append_zero=draw(st.booleans()))
    else:
        sigmas = vp_sigmas(n)
    return sigmas.tolist()


@st.composite
def gammas(draw: st.DrawFn, steps: int):
    rule = draw(
        st.one_of(
            st.just(1.0),
            st.floats(0.3, 1.0),
            st.sampled_from([0.5, 2.0]).map(StepRatio),
            st.just(StepRatio(1)),
            st.lists(st.floats(0.2, 4.0), min_size=steps - 1, max_size=steps - 1).map(PerStep),
        )
    )
    return SmoothedOutput(rule) if draw(st.booleans()) else rule


@st.composite
def walks(draw: st.DrawFn, max_steps: int):
    """A solver, a grid, a start at either end, and the levels to turn at."""
    n = draw(st.integers(1, max_steps))
    sigmas = draw(grids(n))
    steps = len(sigmas) - 1
    assume(steps >= 1)
    solver = BDIA(
        draw(st.sampled_from(APPROXIMATORS)),
        draw(gammas(steps)),
        FixedPoint(draw(st.sampled_from([40, 40, 32]))),
    )
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    network = draw(st.sampled_from([None, *DTYPES]))
    denoiser = draw(st.sampled_from([smooth, Gaussian(0.3, 0.7)]))
    if network is not None:
        denoiser = InDtype(denoiser, network)
    from_noise = draw(st.booleans())
    turns = draw(st.lists(st.integers(0, steps), max_size=3))
    return solver, sigmas, denoiser, dtype, shape, from_noise, turns, draw(st.integers(0, 2**31))


def check_walk(walk) -> None:
    solver, sigmas, denoiser, dtype, shape, from_noise, turns, seed = walk
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = 0 if from_noise else len(sigmas) - 1
    x = (noise * sigmas[0] if from_noise else noise / 2).to(dtype)
    snapped = solver.arithmetic.snap(x)

    seen: dict[int, State] = {}
    last = len(sigmas) - 1
    end = 0 if from_noise else last
    here = x
    try:
        for stop in [*turns, last - end, end]:
            index = here.index if isinstance(here, State) else start
            if stop == index or (stop > index and index == last):
                continue
            go = solver.sample if stop > index else solver.invert
            solution = go(denoiser, here, sigmas, stop=stop)
            here = solution.state
            before = seen.setdefault(here.index, here)
            assert torch.equal(here.current, before.current)
            assert torch.equal(here.partner, before.partner)
            if stop == start:
                assert torch.equal(solution.x, snapped)
                assert solution.x.dtype == dtype
    except (OverflowError, FloatingPointError):
        reject()  # refused aloud: an unstable run that left the range
    assert here.index == max(1, start)
    origin = here.current if start == last else here.partner
    assert torch.equal(solver.arithmetic.load(origin, dtype), snapped)


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # any rule, good or bad
@QUICK
@given(walks(max_steps=8))
def test_any_walk_on_the_grid_comes_back_to_the_bit(walk) -> None:
    check_walk(walk)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # any rule, good or bad
@FULL
@given(walks(max_steps=40))
def test_any_walk_on_the_grid_comes_back_to_the_bit_at_length(walk) -> None:
    check_walk(walk)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("gamma", [1.0, StepRatio(1)], ids=str)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::odesolvers.InversionWarning"
)
def test_every_problem_is_exact_both_ways(problem: Problem, gamma, device: str) -> None:
    if "Stable Diffusion" in problem.name:
        pytest.importorskip("diffusers")
    denoiser = problem.build(torch.device(device))
    args = problem.arguments(device)
    sigmas = karras_sigmas(8, problem.bottom, problem.top)
    solver = BDIA(HeunEDM("behind"), gamma, FixedPoint())
    x = solver.arithmetic.snap(problem.noise().to(device))

    solution = solver.sample(denoiser, x, sigmas, extra_args=args)
    back = solver.invert(denoiser, solution.state, sigmas, extra_args=args)
    assert torch.equal(back.x, x)

    image = solver.arithmetic.snap(x / problem.top)
    code = solver.invert(denoiser, image, sigmas, extra_args=args)
    again = solver.sample(denoiser, code.state, sigmas, extra_args=args)
    assert torch.equal(again.x, image)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network_in_any_precision(dtype: torch.dtype) -> None:
    problem = next(problem for problem in PROBLEMS if problem.name == "random convolutions")
    denoiser = problem.build(torch.device("cpu")).to(dtype)
    solver = BDIA(DDIM(), 0.9, FixedPoint())
    x, sigmas = solver.arithmetic.snap(problem.noise()), karras_sigmas(6)
    solution = solver.sample(denoiser, x, sigmas)
    assert torch.equal(solver.invert(denoiser, solution.state, sigmas).x, x)


# --- it is the same solver -------------------------------------------------------------------------


@pytest.mark.parametrize("approximator", APPROXIMATORS, ids=str)
@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.5, StepRatio(1), StepRatio(2)], ids=str)
def test_fixed_point_computes_what_floating_point_computes(approximator, gamma) -> None:
    denoiser, sigmas = Gaussian(0.3, 0.7), karras_sigmas(20)
    x = torch.randn(3, 5, dtype=torch.float64) * 80
    exact = BDIA(approximator, gamma, FixedPoint()).sample(denoiser, x, sigmas)
    plain = BDIA(approximator, gamma).sample(denoiser, x, sigmas)
    assert exact.nfe == plain.nfe
    # Weights differ by up to 2^-12, on terms that are small beside the state.
    torch.testing.assert_close(exact.x, plain.x, rtol=1e-5, atol=1e-5)


def test_the_denoiser_sees_the_dtype_of_x_and_the_callback_the_same_states_both_ways() -> None:
    solver, sigmas = BDIA(HeunEDM(), 0.7, FixedPoint()), karras_sigmas(6)
    down: dict[int, Tensor] = {}
    up: dict[int, Tensor] = {}

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        return smooth(x, sigma)

    x = torch.randn(2, 3, dtype=torch.bfloat16) * 80
    kept = x.clone()
    solution = solver.sample(denoiser, x, sigmas, callback=lambda d: down.update({d["i"]: d["x"]}))
    back = solver.invert(
        denoiser, solution.state, sigmas, callback=lambda d: up.update({d["i"]: d["x"]})
    )
    assert set(up) == set(range(1, 6))
    assert all(torch.equal(up[i], down[i]) for i in up)
    assert torch.equal(x, kept)
    assert torch.equal(back.x, x)


def test_a_thousand_steps() -> None:
    sigmas = karras_sigmas(1000)
    for gamma in (0.5, StepRatio(2)):
        solver = BDIA(Euler(), gamma, FixedPoint())
        x = torch.randn(2, 16) * 80
        solution = solver.sample(smooth, x, sigmas)
        side = solution.state.side
        assert side.bits_per_element <= side_information_bound(solver, sigmas) + 4
        assert torch.equal(
            solver.invert(smooth, solution.state, sigmas).x, solver.arithmetic.snap(x)
        )


# --- snapping and range ----------------------------------------------------------------------------


@given(
    st.floats(-80, 80, width=32),
    st.integers(8, 53),
    st.sampled_from(DTYPES),
    st.integers(-40, 0),
)
@settings(max_examples=150, deadline=None)
def test_snap_rounds_to_the_grid_within_the_dtype(value, F, dtype, exponent) -> None:
    x = torch.tensor([value * 2.0**exponent], dtype=torch.float64).to(dtype)
    arithmetic = FixedPoint(F)
    snapped = arithmetic.snap(x)
    assert snapped.dtype == dtype
    assert torch.equal(arithmetic.snap(snapped), snapped)
    assert Fraction(snapped.item()) == Fraction(round(Fraction(x.item()) * 2**F), 2**F)
    precision = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    if abs(x.item()) >= 2.0 ** (precision - 1 - F):
        assert torch.equal(snapped, x)


def test_snap_of_noise_changes_nothing_that_matters() -> None:
    x = torch.randn(10_000) * 80
    snapped = FixedPoint().snap(x)
    assert torch.equal(snapped[x.abs() > 2**-17], x[x.abs() > 2**-17])
    assert float((snapped - x).abs().max()) <= 2**-41


def test_a_state_that_leaves_the_range_is_an_error() -> None:
    images, _ = load_digits()
    denoiser, sigmas = IdealDenoiser(images), karras_sigmas(50)
    foreseen = pytest.warns(InversionWarning, match="code of a lone image")
    overflow = r"step from sigma = .* holds \|x\| below 2\.09715e\+06"
    with foreseen, pytest.raises(OverflowError, match=overflow):
        BDIA(DDIM(), 0.5, FixedPoint()).invert(denoiser, images[:2], sigmas)
    with foreseen, pytest.raises(OverflowError, match="float16 holds"):
        BDIA(DDIM(), 0.5, FixedPoint()).invert(denoiser, images[:2].half(), sigmas)
    with pytest.raises(OverflowError, match="an element of size 1e"):
        FixedPoint().snap(torch.tensor([1e9]))
    with pytest.raises(OverflowError, match="an element of size nan"):
        FixedPoint().snap(torch.tensor([math.nan]))


def test_the_range_is_checked_at_the_end_where_it_was_not_on_the_way() -> None:
    """As on a GPU, where a check on the way would wait for it."""
    arithmetic, z = FixedPoint(), torch.zeros(4, dtype=torch.int64)
    stack = arithmetic.open(State(z, z, 1, (2.0, 1.0), ""), 1, torch.float64)
    small, large = torch.tensor(-3.0), torch.tensor(3e6)
    stack.extents += [
        (80.0, small, -small, 1.0),
        (40.0, small, large, 1.0),
        (1.0, small, small, 9e9),
    ]
    with pytest.raises(OverflowError, match="reaches 3e\\+06 in the step from sigma = 40"):
        arithmetic.close(stack, z, z, 3)


@pytest.mark.parametrize("bits", [7, 54, 40.0, True, "40"])
def test_unusable_fractional_bits(bits) -> None:
    with pytest.raises((TypeError, ValueError), match="must be an integer"):
        FixedPoint(bits)


def test_fractional_bits_must_fit_the_grid() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"at most 46 fractional bits.*fractional_bits=46"):
        BDIA(Euler(), 1.0, FixedPoint(50)).sample(smooth, x, karras_sigmas(5))
    with pytest.raises(ValueError, match="at least 24"):
        BDIA(Euler(), 1.0, FixedPoint(20)).sample(smooth, x, karras_sigmas(5))
    with pytest.raises(ValueError, match="no number of bits"):
        BDIA(Euler(), 1.0, FixedPoint(40)).sample(smooth, x, [1e12, 1e-6, 0])
    BDIA(Euler(), 1.0, FixedPoint(46)).sample(smooth, x, karras_sigmas(5))
    BDIA(Euler(), 1.0, FixedPoint(24)).sample(smooth, x, karras_sigmas(5))


# --- determinism -----------------------------------------------------------------------------------


class Noisy:
    """A denoiser that returns one element different in its last bit, in one call."""

    def __init__(self, call: int) -> None:
        self.calls, self.call = 0, call

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = smooth(x, sigma)
        self.calls += 1
        if self.calls == self.call:
            denoised.view(-1)[3] = torch.nextafter(denoised.view(-1)[3], denoised.new_tensor(9.0))
        return denoised


@pytest.mark.parametrize("gamma", [1.0, 0.5], ids=str)
def test_a_single_bit_of_a_single_call_is_noticed(gamma: float) -> None:
    sigmas = karras_sigmas(10)
    solver = BDIA(Euler(), gamma, FixedPoint())
    denoiser = Noisy(call=14)  # on the way back
    solution = solver.sample(denoiser, torch.randn(2, 8), sigmas)
    with pytest.raises(RuntimeError, match="not what it was: the denoiser did not return the same"):
        solver.invert(denoiser, solution.state, sigmas)


def test_other_arguments_on_the_way_back_are_noticed() -> None:
    images, labels = load_digits()
    denoiser, sigmas = IdealDenoiser(images, labels), karras_sigmas(10)
    solver = BDIA(HeunEDM(), StepRatio(1), FixedPoint())
    args = {"class_labels": torch.tensor([1, 2])}
    solution = solver.sample(denoiser, torch.randn(2, 1, 8, 8) * 80, sigmas, extra_args=args)
    with pytest.raises(RuntimeError, match="other extra_args"):
        solver.invert(
            denoiser, solution.state, sigmas, extra_args={"class_labels": torch.tensor([1, 3])}
        )


def test_a_step_taken_twice_finds_a_denoiser_that_is_not_deterministic() -> None:
    sigmas, x = karras_sigmas(4), torch.randn(2, 8)
    solver = BDIA(HeunEDM("both"), 0.9, FixedPoint(check_determinism=True))
    with pytest.raises(RuntimeError, match=r"not deterministic: .*at level 0 .* 1 of 16 elements"):
        solver.sample(Noisy(call=3), x, sigmas)
    plain = BDIA(HeunEDM("both"), 0.9, FixedPoint())
    solution, expected = solver.sample(smooth, x, sigmas), plain.sample(smooth, x, sigmas)
    assert torch.equal(solution.x, expected.x)
    assert solution.nfe == expected.nfe + 2
    # The option is about the run and not about the state: either solver goes on with it.
    assert torch.equal(plain.invert(smooth, solution.state, sigmas).x, plain.arithmetic.snap(x))
