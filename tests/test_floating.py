"""Linear combinations in floating point, against the same in extended precision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    Combination,
    Euler,
    FloatingPoint,
    HeunEDM,
    IntegrationApproximator,
    InversionWarning,
    StepRatio,
    integrate,
    karras_sigmas,
    stability_report,
)
from odesolvers.arithmetic import Arithmetic
from odesolvers.arithmetic.floating import move
from odesolvers.models import Gaussian
from odesolvers.step import Move, Step

from .problems import gaussian, noise, relative_error

Long = npt.NDArray[np.longdouble]
FLOATING = FloatingPoint()

weights = st.one_of(
    st.floats(-3.0, 3.0),
    st.sampled_from([0.0, 1.0, -1.0, 1e-3, 1e-8, 1e-12, 0.5, 2.0, 50.0, -50.0]),
)
gains = st.one_of(
    st.floats(-3.0, 3.0),
    st.sampled_from([1.0, -1.0, 1 - 1e-6, 1 - 1e-9, 1 - 2**-53, 1 + 1e-8, 1e-3, 1e-6, -1e-4, 20.0]),
).filter(lambda g: abs(g) >= 1e-6)


def extended(x: Tensor) -> Long:
    return x.double().numpy().astype(np.longdouble)


def exact(gain: float, rest: Combination, older: Tensor, values: Sequence[Tensor]) -> Long:
    terms = [np.longdouble(c) * extended(values[k]) for k, c in rest]
    return sum(terms, np.longdouble(gain) * extended(older))


@given(
    gains,
    st.lists(weights, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 1000),
)
def test_a_stage_is_its_formula_and_its_own_inverse(
    gain: float, coefficients: list[float], blends: bool, dtype: torch.dtype, seed: int
) -> None:
    if blends:  # as every stage of a flow that leaves the states alone where the denoiser does
        coefficients = [*coefficients, (1.0 - gain) - math.fsum(coefficients)]
    step = Step((), Combination(dict(enumerate(coefficients))), gain)
    older, *values = noise(1 + len(coefficients), 64, seed=seed).to(dtype)
    kept = [value.clone() for value in (older, *values)]

    newer = FLOATING.forward(step, older, values)
    size = abs(gain) * older.double().norm()
    size += sum(abs(c) * values[k].double().norm() for k, c in step.rest)
    form = torch.finfo(dtype)
    rounding = form.eps / 2 * float(size) + 8 * form.smallest_normal * form.eps  # of 64 subnormals
    error = np.linalg.norm((extended(newer) - exact(gain, step.rest, older, values)).astype(float))
    assert error <= 8 * rounding

    back = FLOATING.inverse(step, newer, values)
    assert float((back - older).double().norm()) <= 20 * rounding / abs(gain)
    for value, before in zip((older, *values), kept, strict=True):
        assert torch.equal(value, before)
    for scratch in (None, torch.full_like(older, torch.nan)):
        place = older.clone()
        assert FLOATING.forward(step, place, values, None, place, scratch) is place
        assert torch.equal(place, newer)
        assert FLOATING.inverse(step, place, values, None, place, scratch) is place
        assert torch.equal(place, back)


@given(st.lists(weights, min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_a_point_is_its_formula(coefficients: list[float], dtype: torch.dtype) -> None:
    coefficients = [*coefficients, 1.0 - math.fsum(coefficients)]
    point = Combination(dict(enumerate(coefficients)))
    older, *values = noise(1 + len(coefficients), 64).to(dtype)
    found = extended(FLOATING.combine(point, values))
    size = sum(abs(c) * float(values[k].double().norm()) for k, c in point)
    error = np.linalg.norm((found - exact(0.0, point, older, values)).astype(float))
    assert error <= 4 * torch.finfo(dtype).eps * size


@given(gains, st.lists(weights, min_size=2, max_size=4))
def test_a_mean_has_its_coefficients(gain: float, coefficients: list[float]) -> None:
    """In double precision, however near the gain is to 1."""
    coefficients = [*coefficients, (1.0 - gain) - math.fsum(coefficients)]
    rest = Combination(dict(enumerate(coefficients)))
    mean = rest.mean_over(1.0 - gain)
    assume(mean is not None)
    assert mean is not None
    found = {mean.first: 1.0}
    for k, weight in mean.moves:
        found = {j: (1.0 - weight) * c for j, c in found.items()} | {k: weight}
    largest = max(abs(c) for _, c in rest)
    for k, c in rest:
        assert found[k] * (1.0 - gain) == pytest.approx(c, rel=1e-14, abs=1e-14 * largest)


def test_nothing_is_no_mean() -> None:
    assert Combination({}).mean_over(1e-13) is None
    assert Step((), Combination({}), 1 - 1e-13).blend is None


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")
@pytest.mark.parametrize(
    ("solver", "steps"),
    [
        (BDIA(DDIM(), 0.5), 4),
        (BDIA(DDIM(), 0.1), 3),
        (BDIA(Euler(), StepRatio(2)), 4),
        (BDIA(HeunEDM(), 0.1), 3),
    ],
    ids=str,
)
def test_small_weights_do_not_cost_precision(solver: BDIA, steps: int) -> None:
    """1 - g in single precision would not know a small g from its neighbours."""
    x, grid = noise(64, 5, sigma=80.0, dtype=torch.float32), karras_sigmas(steps)
    there = solver.sample(Gaussian(std=0.5), x, grid)
    error = relative_error(solver.invert(Gaussian(std=0.5), there.state, grid).x, x)
    assert error < 3 * stability_report(solver, grid).round_trip_error(torch.float32)


def shrink(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of data with deviation 1, in any dtype."""
    return x / (1 + sigma.to(x.dtype).unsqueeze(1) ** 2)


@given(
    st.sampled_from([Euler(), DDIM(), HeunEDM()]),
    st.one_of(
        st.floats(0.3, 1.0),
        st.sampled_from([1.0, 1 - 1e-9, 0.5, StepRatio(1), StepRatio(2)]),
    ),
    st.integers(2, 6),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_a_watched_run_takes_the_same_steps_to_the_bit(
    approximator: IntegrationApproximator,
    gamma: float | StepRatio,
    steps: int,
    append_zero: bool,
    dtype: torch.dtype,
) -> None:
    """A run that shows its states takes none of the short ways, and puts each in a tensor of its own."""
    solver = BDIA(approximator, gamma)
    sigmas = karras_sigmas(steps + 1 - append_zero, 0.05, 5.0, append_zero=append_zero)
    x = noise(2, 3, sigma=5.0).to(dtype)
    watched = partial(solver.sample, callback=lambda shown: None)
    there, same = solver.sample(shrink, x, sigmas), watched(shrink, x, sigmas)
    assert torch.equal(there.x, same.x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InversionWarning)
        for start in (there.state, there.x):
            back = solver.invert(shrink, start, sigmas)
            same = solver.invert(shrink, start, sigmas, callback=lambda shown: None)
            assert torch.equal(back.x, same.x)
            if back.state.partner is not None:
                assert same.state.partner is not None
                assert torch.equal(back.state.partner, same.state.partner)


@pytest.mark.parametrize("approximator", [Euler(), DDIM()])
def test_steps_of_one_call_go_the_short_way(
    approximator: IntegrationApproximator, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[Move] = []
    monkeypatch.setattr(
        integrate, "move", lambda how, *tensors: moves.append(how) or move(how, *tensors)
    )
    solver, sigmas = BDIA(approximator), karras_sigmas(6)
    there = solver.sample(shrink, noise(2, 3), sigmas)
    assert len(moves) == 5
    moves.clear()
    solver.invert(shrink, there.state, sigmas)
    assert len(moves) == 5


def test_a_pair_of_one_tensor_twice_is_a_pair() -> None:
    solver, sigmas = BDIA(DDIM(), 0.9), karras_sigmas(5)
    state = solver.sample(shrink, noise(2, 3), sigmas, stop=3).state
    twice = replace(state, partner=state.current)
    apart = replace(state, partner=state.current.clone())
    for run in (solver.sample, solver.invert):
        assert torch.equal(run(shrink, twice, sigmas).x, run(shrink, apart, sigmas).x)


def test_an_arithmetic_may_store_states_in_a_form_of_its_own() -> None:
    """In float64 behind a float32 denoiser, with nothing beside it."""

    @dataclass(frozen=True)
    class Wide(FloatingPoint):
        def store(self, x: Tensor) -> Tensor:
            return x.double()

        def load(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
            return stored.to(dtype)

        def forward(self, step, older, values, *others):  # type: ignore[no-untyped-def]
            return super().forward(
                step, older, [value.double() for value in values], None, None, None
            )

        def inverse(self, step, newer, values, *others):  # type: ignore[no-untyped-def]
            return super().inverse(
                step, newer, [value.double() for value in values], None, None, None
            )

    assert issubclass(Wide, Arithmetic)
    x, solver = noise(4, 5, sigma=80.0, dtype=torch.float32), BDIA(Euler(), 0.96, Wide())
    there = solver.sample(gaussian(), x, karras_sigmas(8))
    assert there.x.dtype == torch.float32
    assert there.state.current.dtype == torch.float64
    back = solver.invert(gaussian(), there.state, karras_sigmas(8))
    assert relative_error(back.x, x) < 1e-6
