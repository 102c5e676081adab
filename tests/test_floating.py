"""`FloatingPoint` against extended precision: each step is its formula, and its own inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    Euler,
    FloatingPoint,
    HeunEDM,
    StepRatio,
    karras_sigmas,
    stability_report,
)
from odesolvers.extend import Combination, SideInformation, Solver
from odesolvers.models import Gaussian

from .problems import gaussian, noise, relative_error

FLOATING = FloatingPoint()
Long = npt.NDArray[np.longdouble]
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


def exact(gain: float, rest: Combination, a: Tensor, values: Sequence[Tensor]) -> Long:
    terms = [np.longdouble(c) * extended(values[k]) for k, c in rest.terms.items()]
    return sum(terms, np.longdouble(gain) * extended(a))


@given(
    gains,
    st.lists(weights, min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 1000),
)
def test_a_shear_is_its_formula_and_its_own_inverse(
    gain: float, coefficients: list[float], dtype: torch.dtype, seed: int
) -> None:
    rest = Combination(dict(enumerate(coefficients)))
    a, *values = noise(1 + len(coefficients), 64, seed=seed).to(dtype)
    kept = [value.clone() for value in (a, *values)]

    c = FLOATING.forward(gain, a, rest.of(values), None).to(dtype)
    size = abs(gain) * a.double().norm()
    size += sum(abs(w) * values[k].double().norm() for k, w in rest.terms.items())
    form = torch.finfo(dtype)
    rounding = form.eps / 2 * float(size) + 8 * form.smallest_normal * form.eps  # of 64 subnormals
    error = np.linalg.norm((extended(c) - exact(gain, rest, a, values)).astype(float))
    assert error <= 8 * rounding

    back = FLOATING.inverse(gain, c, rest.of(values), None).to(dtype)
    assert float((back - a).double().norm()) <= 20 * rounding / abs(gain)
    for value, before in zip((a, *values), kept, strict=True):
        assert torch.equal(value, before)


@given(st.lists(weights, min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_a_combination_is_its_formula(coefficients: list[float], dtype: torch.dtype) -> None:
    point = Combination(dict(enumerate(coefficients)))
    a, *values = noise(1 + len(coefficients), 64).to(dtype)
    found = extended(point.of(values))
    size = sum(abs(c) * float(values[k].double().norm()) for k, c in point.terms.items())
    error = np.linalg.norm((found - exact(0.0, point, a, values)).astype(float))
    assert error <= 4 * torch.finfo(dtype).eps * size + 64 * torch.finfo(dtype).tiny


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")
@pytest.mark.parametrize(
    ("solver", "steps"),
    [
        (BDIA(DDIM(), 0.5), 4),
        (BDIA(DDIM(), 0.1), 3),
        (BDIA(Euler(), StepRatio(2)), 4),
        (BDIA(HeunEDM("both"), 0.1), 3),
    ],
    ids=str,
)
def test_small_weights_do_not_cost_precision(solver: BDIA, steps: int) -> None:
    x, grid = noise(64, 5, sigma=80.0, dtype=torch.float32), karras_sigmas(steps)
    there = solver.sample(Gaussian(std=0.5), x, grid)
    error = relative_error(solver.invert(Gaussian(std=0.5), there.state, grid).x, x)
    assert error < 3 * stability_report(solver, grid).round_trip_error(torch.float32)


def test_a_pair_of_one_tensor_twice_is_a_pair() -> None:
    solver, sigmas, denoiser = BDIA(DDIM(), 0.9), karras_sigmas(5), Gaussian(std=1.0)
    state = solver.sample(denoiser, noise(2, 3), sigmas, stop=3).state
    twice = replace(state, partner=state.current)
    apart = replace(state, partner=state.current.clone())
    for run in (solver.sample, solver.invert):
        assert torch.equal(run(denoiser, twice, sigmas).x, run(denoiser, apart, sigmas).x)


def test_an_arithmetic_may_store_states_in_a_form_of_its_own() -> None:
    """In float64 behind a float32 denoiser."""

    class Memory:
        sigma = 0.0

    @dataclass(frozen=True)
    class Wide(FloatingPoint):
        exact = True  # stored states are not the tensors themselves

        def store(self, x: Tensor) -> Tensor:
            return x.double()

        def open(self, state: Any, origin: int, dtype: torch.dtype) -> Any:
            return Memory()

        def load(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
            return stored.to(dtype)

        def close(self, memory: Any, current: Tensor, partner: Any, index: int) -> SideInformation:
            none, zero = torch.zeros(0, 1, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
            return SideInformation(torch.float32, (), none, (), index, zero)

        def forward(self, gain, a, rest, memory):  # type: ignore[no-untyped-def]
            return super().forward(gain, a, rest.double(), memory)

        def inverse(self, gain, c, rest, memory):  # type: ignore[no-untyped-def]
            return super().inverse(gain, c, rest.double(), memory)

    x, solver = noise(4, 5, sigma=80.0, dtype=torch.float32), BDIA(Euler(), 0.96, Wide())
    there = solver.sample(gaussian(), x, karras_sigmas(8))
    assert there.x.dtype == torch.float32
    assert there.state.current.dtype == torch.float64
    back = solver.invert(gaussian(), there.state, karras_sigmas(8))
    assert relative_error(back.x, x) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "solver", [BDIA(HeunEDM(), 0.9), BDIA(DDIM(), 0.8), EDICT(0.9), HeunEDM()], ids=repr
)
def test_neither_layout_nor_batch_reach_the_bits(solver: Solver, dtype: torch.dtype) -> None:
    """In sizes at which vector kernels leave a tail to scalar ones, which may round differently."""
    grid = karras_sigmas(6, 0.1, 20.0)

    def denoiser(x: Tensor, sigma: Tensor, /, **_: Any) -> Tensor:
        return torch.tanh(x.double() / 9).to(x.dtype).contiguous()

    for seed in range(4):
        x = noise(3 + seed, 3, 5, 7, sigma=20.0, seed=seed, dtype=dtype)
        whole = solver.sample(denoiser, x, grid).x
        rows = [x[k : k + 1] for k in range(len(x))]
        parts = torch.cat([solver.sample(denoiser, row, grid).x for row in rows])
        assert torch.equal(parts, whole)
        turned = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        assert torch.equal(solver.sample(denoiser, turned, grid).x, whole)
