"""Warnings before a run that cannot be trusted, and none before one that can."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    RK4,
    Euler,
    FixedPoint,
    HeunEDM,
    HeunStepRatio,
    InversionWarning,
    McCallumFoster,
    PerStep,
    SmoothedOutput,
    StabilityWarning,
    StepRatio,
    karras_sigmas,
    stability_report,
    vp_sigmas,
)
from odesolvers.extend import Solver
from odesolvers.models import Gaussian, flow_sigmas, flow_times

from .problems import noise, relative_error

STD = 0.5


def go_back(solver: BDIA, sigmas: torch.Tensor, dtype: torch.dtype, stop: int = 0) -> None:
    denoiser = Gaussian(std=STD)
    state = solver.sample(denoiser, noise(2, 3, sigma=80.0, dtype=dtype), sigmas).state
    solver.invert(denoiser, state, sigmas, stop=stop)


def encode(solver: BDIA, sigmas: torch.Tensor) -> None:
    solver.invert(Gaussian(std=STD), STD * noise(2, 3), sigmas)


def test_a_lost_round_trip_is_announced() -> None:
    solver, sigmas = BDIA(DDIM(), 0.5), karras_sigmas(50)
    with pytest.warns(InversionWarning, match=r"3\.6e\+06 times .*float64 state or") as caught:
        go_back(solver, sigmas, torch.float32)
    assert caught[0].filename == __file__
    go_back(solver, sigmas, torch.float64)  # 0.006 is expected
    with pytest.warns(InversionWarning, match=r"torch.float64 .*Use arithmetic=FixedPoint\(\)"):
        go_back(solver, karras_sigmas(60), torch.float64)


def test_a_rule_that_is_in_use_is_not_recommended() -> None:
    plain = BDIA(Euler(), StepRatio(1))
    with pytest.warns(InversionWarning, match="Use more and shorter steps, or a grid that ends"):
        encode(plain, karras_sigmas(5))
    with pytest.warns(InversionWarning, match=r"state or arithmetic=FixedPoint\(\); see"):
        go_back(plain, karras_sigmas(60), torch.bfloat16)
    with pytest.warns(StabilityWarning, match="use more and shorter steps; see"):
        plain.sample(Gaussian(), noise(2, 3, sigma=80.0), [80, 10, 10 - 1e-11, 1, 0])
    with pytest.warns(InversionWarning, match=r"FixedPoint\(\), or StepRatio\(1\)"):
        go_back(BDIA(Euler(), 0.5), karras_sigmas(60), torch.float32)


def test_a_warning_names_a_long_solver_in_short() -> None:
    sigmas = karras_sigmas(50)
    long = PerStep((0.5,) * 48 + (0.5 + 2**-40,))
    with pytest.warns(InversionWarning, match=r"BDIA\(DDIM\(\), gamma=PerStep") as caught:
        go_back(BDIA(DDIM(), long), sigmas, torch.float32)
    with pytest.warns(InversionWarning, match=r"BDIA\(DDIM\(\), gamma=PerStep") as encoding:
        encode(BDIA(DDIM(), long), sigmas)
    for warning in (*caught, *encoding):
        assert len(str(warning.message)) < 500


def test_what_holds_is_not_announced() -> None:
    """Nor a lost cause's last steps, nor integers: warnings are errors here."""
    go_back(BDIA(DDIM(), 0.5), karras_sigmas(50), torch.float32, stop=40)
    go_back(BDIA(DDIM(), 0.5, FixedPoint()), karras_sigmas(20), torch.float32)
    go_back(BDIA(HeunEDM(), StepRatio(2)), karras_sigmas(50), torch.float32)


@pytest.mark.parametrize(
    "solver", [BDIA(DDIM(), 0.5), BDIA(DDIM(), 0.8), BDIA(DDIM(), 0.8, FixedPoint())], ids=repr
)
def test_a_code_that_is_no_noise_is_announced(solver: BDIA) -> None:
    with pytest.warns(InversionWarning, match="code of a lone image .*in any arithmetic") as caught:
        encode(solver, karras_sigmas(50))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("n", [18, 30, 50])
@pytest.mark.parametrize(
    "solver",
    [BDIA(DDIM(), 1.0), BDIA(Euler(), StepRatio(1)), BDIA(HeunEDM(), StepRatio(2))],
    ids=repr,
)
def test_a_code_that_is_noise_is_not_announced(solver: BDIA, n: int) -> None:
    encode(solver, karras_sigmas(n))
    encode(solver, vp_sigmas(n))


OFF_THE_FLOW = [
    (BDIA(HeunEDM()), karras_sigmas(8)),
    (BDIA(HeunEDM(), arithmetic=FixedPoint()), karras_sigmas(8)),
    (EDICT(), karras_sigmas(8, append_zero=False)),
    (McCallumFoster(HeunEDM()), karras_sigmas(8)),
    (BDIA(HeunEDM()), flow_sigmas(flow_times(28, shift=3.0))),
]


@pytest.mark.parametrize(("solver", "sigmas"), OFF_THE_FLOW, ids=str)
def test_samples_off_by_more_than_the_data_are_warned_of_at_every_run(
    solver: Solver, sigmas: torch.Tensor
) -> None:
    denoiser = Gaussian(0.0, 0.5)
    x = noise(64, 4, sigma=sigmas[0].item())
    assert stability_report(solver, sigmas).sampling_error > 1
    for _ in range(2):
        with pytest.warns(StabilityWarning, match="samples are expected to be off by"):
            sampled = solver.sample(denoiser, x, sigmas).x
    right = x * ((0.25 + sigmas[-1] ** 2) / (0.25 + sigmas[0] ** 2)).sqrt()
    assert relative_error(sampled, right) > 0.5


@pytest.mark.parametrize(
    "solver", [BDIA(Euler()), BDIA(HeunEDM(), HeunStepRatio()), HeunEDM()], ids=str
)
def test_samples_near_the_flow_are_not_warned_of(solver: Solver) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver.sample(Gaussian(0.0, 0.5), noise(2, 4, sigma=80.0), karras_sigmas(10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [0, 2, 3, 4])
def test_round_trips_off_the_flow_are_expected_to_lose_what_they_lose(
    case: int, dtype: torch.dtype
) -> None:
    solver, sigmas = OFF_THE_FLOW[case]
    x = noise(64, 64, sigma=math.hypot(0.5, sigmas[0].item()), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = solver.sample(Gaussian(0.0, 0.5), x, sigmas)
        back = solver.invert(Gaussian(0.0, 0.5), there.state, sigmas).x
    measured = float((back - x).double().norm() / x.double().norm())
    expected = stability_report(solver, sigmas).round_trip_error(dtype)
    assert measured / 30 < expected < 1e4 * measured  # at g = 1 roundings cancel


COINCIDENT = [
    BDIA(HeunEDM(), StepRatio(2)),
    BDIA(RK4(), SmoothedOutput(StepRatio(2.9))),
    BDIA(Euler(), StepRatio(2)),
    BDIA(DDIM(), StepRatio(2), FixedPoint()),
]


@pytest.mark.parametrize("solver", COINCIDENT, ids=repr)
@pytest.mark.parametrize("gap", [1e-7, 1e-8, 1e-9, 1e-10, 1e-12])
@pytest.mark.parametrize("place", [2, 9, 17])
def test_levels_that_nearly_coincide_are_warned_of_where_they_spoil_the_sample(
    solver: Solver, gap: float, place: int
) -> None:
    """Merged or rounded grids: a step after a tiny one weighs the state before it by 1e9 and more."""
    levels = karras_sigmas(20).tolist()
    levels.insert(place + 1, levels[place] * (1 - gap))
    denoiser, x = Gaussian(0.0, STD), noise(64, 4, sigma=80.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            sampled = solver.sample(denoiser, x, levels).x
        except (OverflowError, ValueError):
            return  # refused aloud
    right = x * math.sqrt(0.25 / (0.25 + 6400))
    if relative_error(sampled, right) > 3:
        assert "nearly coincide" in str(caught[0].message)


@pytest.mark.parametrize(
    ("solver", "levels"),
    [
        (BDIA(Euler()), [1.0, 1e-44, 0.0]),
        (BDIA(Euler(), arithmetic=FixedPoint(53)), [1.0, 1e-46, 1e-47]),
        (BDIA(Euler(), StepRatio(3)), [1.0, 1.0 - 1e-14, 0.5, 0.0]),
        (DDIM(), [1e39, 1e38, 1.0]),
        (EDICT(), [1e39, 1e38, 1.0]),
    ],
    ids=str,
)
def test_coefficients_that_a_dtype_does_not_hold_are_named(
    solver: Solver, levels: list[float]
) -> None:
    x = noise(2, 3, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"which torch.float32 does not hold|does not fit the grid"
    ):
        solver.sample(Gaussian(0.0, STD), x, levels)
