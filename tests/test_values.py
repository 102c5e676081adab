"""Numbers and grids as callers give them: of Python, numpy or torch, under any default of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    RK4,
    ConstantGamma,
    DampedStepRatio,
    Euler,
    FixedPoint,
    FixedPointInversion,
    Grid,
    McCallumFoster,
    Objective,
    PerStep,
    Rex,
    State,
    StepRatio,
    adaptive_sigmas,
    calibrate,
    ddim_timesteps,
    exponential_sigmas,
    karras_sigmas,
    midpoint_sigmas,
    polyexponential_sigmas,
    sigmas_from_alphas_cumprod,
    stability_report,
    vp_sigmas,
)
from odesolvers.calibration.objective import rows
from odesolvers.likelihood import log_normal
from odesolvers.models import ClassifierFreeGuidance, flow_sigmas, flow_times

from .problems import gaussian, noise

NUMBERS: list[Callable[[float], Any]] = [
    np.float64,
    np.array,
    Fraction,
    lambda value: torch.tensor(value, dtype=torch.float64),
]
OF_A_NUMBER: list[Callable[[Any], object]] = [
    lambda number: BDIA(Euler(), number),
    ConstantGamma,
    StepRatio,
    lambda number: DampedStepRatio(number, number),
    lambda number: PerStep([number, number]),
    EDICT,
    lambda number: McCallumFoster(Euler(), number),
    lambda number: Rex(Euler(), number),
    lambda number: FixedPointInversion(DDIM(), number),
    lambda number: Objective(number, number),
    lambda number: ClassifierFreeGuidance(gaussian(), number),
]


@pytest.mark.parametrize("as_given", NUMBERS)
@pytest.mark.parametrize("make", OF_A_NUMBER[:-1])
def test_a_number_of_any_kind_is_the_same_setting(
    make: Callable[[Any], object], as_given: Callable[[float], Any]
) -> None:
    assert make(as_given(0.75)) == make(0.75)
    assert repr(make(as_given(0.75))) == repr(make(0.75))


OF_LEVELS: list[Callable[[Any], object]] = [
    lambda number: Grid.of(number * torch.ones(2) / torch.arange(1, 3)),
    lambda number: Grid.of([number, 0.0]),
    lambda number: Grid((number, 0.0)),
    lambda number: karras_sigmas(4, sigma_max=number),
    lambda number: sigmas_from_alphas_cumprod([0.9, number], [1, 0]),
    lambda number: flow_sigmas([number, 0.0]),
    lambda number: stability_report(BDIA(Euler()), karras_sigmas(4), data_std=number),
]
TRACKED = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("make", [*OF_A_NUMBER, *OF_LEVELS])
def test_a_gradient_that_would_be_lost_is_refused(make: Callable[[Any], object]) -> None:
    with pytest.raises(ValueError, match=r"requires a gradient, which would be lost.*detach"):
        make(TRACKED)
    with torch.no_grad():  # nothing asks for it
        make(TRACKED)
    make(TRACKED.detach())


@pytest.mark.parametrize(
    "wrong", [None, "0.5", True, 0.5j, b"x", [0.5, 0.5], torch.ones(2), Euler()], ids=repr
)
@pytest.mark.parametrize("make", OF_A_NUMBER)
def test_anything_else_is_refused_by_name(make: Callable[[Any], object], wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a number|must name|gamma must be"):
        make(wrong)


@pytest.mark.parametrize(
    "wrong",
    [math.nan, math.inf, -math.inf, 10**400, -(10**400)],
    ids=["nan", "inf", "-inf", "huge", "-huge"],
)
@pytest.mark.parametrize("make", [make for k, make in enumerate(OF_A_NUMBER) if k != 4])
def test_numbers_beyond_all_ranges_are_refused(make: Callable[[Any], object], wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"must be|needs|weighs"):
        make(wrong)


@pytest.mark.parametrize("as_given", [np.int64, np.uint8, torch.tensor, np.array])
def test_integers_of_any_kind(as_given: Callable[[int], Any]) -> None:
    assert torch.equal(karras_sigmas(as_given(8)), karras_sigmas(8))
    assert torch.equal(ddim_timesteps(as_given(8)), ddim_timesteps(8))
    assert FixedPoint(as_given(30)) == FixedPoint(30)
    x, sigmas = noise(2, 5, sigma=80.0), karras_sigmas(8)
    stopped = Euler().sample(gaussian(), x, sigmas, stop=as_given(3))
    assert stopped.state.index == 3
    assert State(x, None, as_given(3), tuple(sigmas.tolist()), "Euler()").index == 3
    assert torch.equal(ddim_timesteps(8, offset=as_given(1)), ddim_timesteps(8, offset=1))
    assert torch.equal(stopped.x, Euler().sample(gaussian(), x, sigmas, stop=3).x)


@pytest.mark.parametrize(
    "wrong", [18.0, "18", True, np.bool_(True), None, torch.tensor(18.0)], ids=repr
)
def test_what_is_no_integer_is_refused(wrong: Any) -> None:
    for make in (karras_sigmas, exponential_sigmas, vp_sigmas, ddim_timesteps, FixedPoint):
        with pytest.raises(TypeError, match=r"must be an integer, got"):
            make(wrong)
    with pytest.raises(TypeError, match="offset must be an integer"):
        ddim_timesteps(8, offset=wrong)
    with pytest.raises(TypeError, match="index must be an integer"):
        State(noise(2, 5), None, wrong, (2.0, 1.0), "Euler()")
    if wrong is not None:
        with pytest.raises(TypeError, match="stop must be an integer"):
            Euler().sample(gaussian(), noise(2, 5), karras_sigmas(8), stop=wrong)


@pytest.mark.parametrize("make", [karras_sigmas, exponential_sigmas, polyexponential_sigmas])
def test_limits_as_float32_tensors_give_the_float64_grid_of_their_values(
    make: Callable[..., torch.Tensor],
) -> None:
    low, high = torch.tensor(0.002), torch.tensor(80.0)
    assert torch.equal(make(8, low, high), make(8, low.item(), high.item()))
    assert make(8, low, high).dtype == torch.float64


GRIDS: list[Callable[[], torch.Tensor]] = [
    lambda: karras_sigmas(8),
    lambda: exponential_sigmas(8),
    lambda: polyexponential_sigmas(8, rho=2.0),
    lambda: vp_sigmas(8),
    lambda: ddim_timesteps(8),
    lambda: sigmas_from_alphas_cumprod([0.9, 0.5, 0.1], [2, 1]),
    lambda: midpoint_sigmas([80.0, 10.0, 0.0]),
    lambda: flow_times(8, shift=3.0),
    lambda: flow_sigmas(flow_times(8)),
    lambda: flow_sigmas(np.linspace(0, 1, 9)[::-1]),
]


@pytest.mark.parametrize("make", GRIDS)
def test_grids_do_not_follow_the_defaults_of_torch(make: Callable[[], torch.Tensor]) -> None:
    usual = make()
    with torch.device("meta"):
        assert torch.equal(make(), usual)
    for dtype in (torch.float64, torch.float16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(make(), usual)
            assert make().dtype == usual.dtype
        finally:
            torch.set_default_dtype(before)


def test_states_in_files_and_grids_of_a_run_do_not_either(tmp_path: Path) -> None:
    denoiser, x, path = gaussian(), noise(2, 5, sigma=80.0), tmp_path / "state.safetensors"
    usual = adaptive_sigmas(denoiser, x, 80.0, 0.1)
    with torch.device("meta"):  # stands for another than the CPU
        assert torch.equal(adaptive_sigmas(denoiser, x, 80.0, 0.1), usual)
        for solver in (BDIA(Euler()), BDIA(Euler(), StepRatio(1), FixedPoint()), BDIA(RK4())):
            made = solver.sample(denoiser, x, karras_sigmas(8)).state
            made.save(path)
            found = State.load(path)
            assert found.partner is not None
            assert made.partner is not None
            assert torch.equal(found.current, made.current)
            assert torch.equal(found.partner, made.partner)
            solver.invert(denoiser, found, torch.tensor(found.sigmas, device="cpu").float())


class Narrow(torch.Tensor):
    """A tensor that says it is on a device without float64."""

    device = torch.device("mps")

    def double(self) -> torch.Tensor:
        raise TypeError("the MPS framework doesn't support float64")

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


def test_figures_of_states_on_devices_without_float64() -> None:
    x = noise(2, 5, sigma=80.0)
    narrow = x.as_subclass(Narrow)
    assert torch.equal(rows(narrow, narrow), rows(x, x))
    assert torch.equal(log_normal(narrow, 80.0), log_normal(x, 80.0))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("solver", None), ("solver", Euler()), ("coupled", "no"), ("coupled", 1), ("side", {"a": 1})],
)
def test_states_made_by_hand_are_checked(name: str, wrong: Any) -> None:
    state = State(noise(2, 5), None, 0, (2.0, 1.0), "Euler()")
    with pytest.raises(TypeError, match=f"{name} must be .*, got "):
        replace(state, **{name: wrong})


LEVELS = [80.0, 10.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "sigmas",
    [
        tuple(LEVELS),
        np.array(LEVELS, dtype=np.float32),
        np.array(LEVELS[::-1])[::-1],  # of negative strides
        np.array(LEVELS, ">f8"),
        np.frombuffer(np.array(LEVELS).tobytes()),  # read-only, as in a file that is mapped
        np.array(LEVELS)[:, None].T[0],
        torch.tensor(LEVELS, dtype=torch.float32),
        [torch.tensor(level) for level in LEVELS],
        [np.float32(level) for level in LEVELS],
        [np.array(level) for level in LEVELS],
        Grid(LEVELS),  # type: ignore[arg-type]
        Grid(np.array(LEVELS)),  # type: ignore[arg-type]
        Grid(torch.tensor(LEVELS)),  # type: ignore[arg-type]
    ],
    ids=lambda sigmas: type(sigmas).__name__,
)
def test_a_grid_of_any_kind(sigmas: Any) -> None:
    assert Grid.of(sigmas) == Grid(tuple(LEVELS))
    x = noise(2, 5, sigma=80.0)
    state = Euler().sample(gaussian(), x, sigmas).state
    assert state.sigmas == tuple(LEVELS)
    assert all(type(level) is float for level in Grid.of(sigmas).levels)
    assert State(x, None, 1, Grid.of(sigmas), "Euler()").sigmas == tuple(LEVELS)  # type: ignore[arg-type]


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 5))
def test_a_start_that_is_not_finite_is_both_errors(value: float, place: int) -> None:
    x = torch.zeros(2, 5)
    x.view(-1)[place] = value
    for kind in (ValueError, FloatingPointError):
        for run in (Euler().sample, BDIA(Euler()).sample, BDIA(Euler()).invert):
            with pytest.raises(kind, match="not finite"):
                run(gaussian(), x, LEVELS)


def test_calibration_takes_noise_that_requires_gradients() -> None:
    x = noise(8, 5, sigma=20.0)
    sigmas = karras_sigmas(4, 0.05, 20.0)
    options: dict[str, Any] = {"reference_steps": 16, "max_runs": 20}
    usual = calibrate(gaussian(), x, sigmas, **options)
    assert calibrate(gaussian(), x.requires_grad_(), sigmas, **options).values == usual.values


@pytest.mark.parametrize("as_given", NUMBERS)
def test_a_guidance_scale_of_any_kind(as_given: Callable[[float], Any]) -> None:
    assert ClassifierFreeGuidance(gaussian(), as_given(2.5)).scale == 2.5
