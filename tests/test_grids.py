"""Grids against k-diffusion, NVlabs' formula and diffusers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from odesolvers import (
    Grid,
    ddim_timesteps,
    exponential_sigmas,
    karras_sigmas,
    polyexponential_sigmas,
    sigmas_from_alphas_cumprod,
    vp_sigmas,
)


@pytest.fixture
def _float64() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("n", [2, 3, 18, 50, 1000])
def test_equal_to_k_diffusions_in_float64(k_diffusion: ModuleType, n: int) -> None:
    theirs = k_diffusion.sampling
    pairs = [
        (karras_sigmas(n, 0.01, 50.0, 5.0), theirs.get_sigmas_karras(n, 0.01, 50.0, 5.0)),
        (exponential_sigmas(n, 0.01, 50.0), theirs.get_sigmas_exponential(n, 0.01, 50.0)),
        (
            polyexponential_sigmas(n, 0.01, 50.0, 1.5),
            theirs.get_sigmas_polyexponential(n, 0.01, 50.0, 1.5),
        ),
        (vp_sigmas(n), theirs.get_sigmas_vp(n)),
    ]
    for ours, expected in pairs:
        assert ours.dtype == torch.float64
        assert ours.shape == (n + 1,)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("n", [2, 18, 256])
def test_equal_to_nvlabs_t_steps(n: int) -> None:
    """The formula of generate.py, by numpy."""
    rho, low, high = 7, 0.002, 80
    i = np.arange(n, dtype=np.float64)
    steps = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    np.testing.assert_allclose(karras_sigmas(n).numpy()[:-1], steps, rtol=1e-13)
    assert karras_sigmas(n)[-1] == 0


def test_without_the_zero() -> None:
    for make in (karras_sigmas, exponential_sigmas, polyexponential_sigmas, vp_sigmas):
        assert torch.equal(make(9, append_zero=False), make(9)[:-1])
    assert karras_sigmas(5, append_zero=False)[[0, -1]].tolist() == pytest.approx([80, 0.002])


@pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
)
def test_timesteps_equal_diffusers_ddim(diffusers: ModuleType, spacing: str, offset: int) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        ours = ddim_timesteps(n, spacing=spacing, offset=offset)  # type: ignore[arg-type]
        assert ours.shape == (n,)
        # By rounding, numpy's arange gives diffusers one step more than asked for at some n.
        assert ours.tolist() == scheduler.timesteps.tolist()[:n], n


def test_levels_are_those_of_the_schedule(diffusers: ModuleType) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(50)
    alphas = scheduler.alphas_cumprod
    sigmas = sigmas_from_alphas_cumprod(alphas, ddim_timesteps(50, offset=1), final="first")
    for sigma, t in zip(sigmas, [*scheduler.timesteps.tolist(), 0], strict=True):
        alpha = float(alphas[t])
        assert float(sigma) == pytest.approx(((1 - alpha) / alpha) ** 0.5, rel=1e-12)
    assert float(scheduler.final_alpha_cumprod) == float(alphas[0])
    to_zero = sigmas_from_alphas_cumprod(alphas, ddim_timesteps(50, offset=1))
    assert torch.equal(to_zero[:-1], sigmas[:-1])
    assert to_zero[-1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karras_sigmas(1), "n >= 2 noise levels above 0, got 1"),
        (lambda: karras_sigmas(5, 2.0, 1.0), "sigma_min = 2.0, sigma_max = 1.0"),
        (lambda: karras_sigmas(5, 0.0, 1.0), "0 < sigma_min"),
        (lambda: karras_sigmas(5, rho=0.0), "rho must be positive"),
        (lambda: karras_sigmas(5, rho=1e-300), "rho = 1e-300 is out of range"),
        (lambda: karras_sigmas(5, rho=1e-2), "rho = 0.01 is out of range"),
        (lambda: karras_sigmas(5, rho=1e300), "1 to 1, are beyond the precision"),
        (lambda: polyexponential_sigmas(5, rho=-1.0), "rho must be positive"),
        (lambda: vp_sigmas(5, eps_s=0.0), "0 < eps_s < 1"),
        (lambda: ddim_timesteps(0), "between 1 and num_train_timesteps"),
        (lambda: ddim_timesteps(5, spacing="even"), "'leading', 'trailing' or 'linspace'"),  # type: ignore[arg-type]
        (lambda: sigmas_from_alphas_cumprod([0.9, 1.1], [1, 0]), r"numbers in \(0, 1\]"),
        (lambda: sigmas_from_alphas_cumprod([0.9, 0.5], [1.0, 0.0]), "row of integers"),  # type: ignore[list-item]
        (lambda: sigmas_from_alphas_cumprod([0.9, 0.5], [2, 0]), r"lie in \[0, 2\), got 0 to 2"),
        (lambda: sigmas_from_alphas_cumprod([0.9, 0.5], [1, -20]), "got -20 to 1"),
        (
            lambda: sigmas_from_alphas_cumprod([0.9, 0.5, 0.1], ddim_timesteps(3, 3, offset=1)),
            "got 1 to 3; where an offset leads past the last, take fewer steps or spacing='trailing'",
        ),
        (lambda: sigmas_from_alphas_cumprod([0.9, 0.5], [0, 1]), "must decrease strictly"),
        (lambda: sigmas_from_alphas_cumprod([0.9, 0.5], [1, 0], final="first"), "length zero"),
        (lambda: sigmas_from_alphas_cumprod([0.9, 0.5], [1], final="last"), "'zero' or 'first'"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_grid_is_read_from_tensors_arrays_and_lists() -> None:
    expected = (2.0, 1.0, 0.0)
    for sigmas in ([2, 1, 0], (2.0, 1.0, 0.0), np.array([2, 1, 0]), torch.tensor([2.0, 1.0, 0.0])):
        assert Grid.of(sigmas).levels == expected
    assert Grid.of(Grid(expected)).levels == expected
    assert Grid(expected).steps == 2
    levels = karras_sigmas(7)
    assert Grid.of(levels.tolist()) == Grid.of(levels)
    alphas = torch.linspace(0.99, 0.01, 20, dtype=torch.float64)
    by_list = sigmas_from_alphas_cumprod(alphas.tolist(), [19, 7, 0])
    assert torch.equal(by_list, sigmas_from_alphas_cumprod(alphas, [19, 7, 0]))


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "at least two noise levels"),
        ([], "at least two noise levels"),
        ([[2.0, 1.0]], r"one row.*shape \(1, 2\)"),
        (3.0, r"shape \(\)"),
        ([2.0, float("nan"), 0.0], r"sigmas\[1\] = nan"),
        ([float("inf"), 1.0], r"sigmas\[0\] = inf"),
        ([2.0, 1.0, -0.1], r"sigmas\[2\] = -0.1"),
        ([2.0, 1.0, 1.0], r"sigmas\[1\] = 1 and sigmas\[2\] = 1"),
        ([0.0, 1.0, 2.0], r"flip it with sigmas.flip\(0\)"),
        ([2.0, 0.0, 0.0], r"sigmas\[1\] = 0 and sigmas\[2\] = 0"),
    ],
)
def test_bad_grids_are_refused(sigmas: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid.of(sigmas)  # type: ignore[arg-type]


def test_a_grid_made_by_hand_is_checked_too() -> None:
    with pytest.raises(ValueError, match="must decrease strictly"):
        Grid((1.0, 2.0, 3.0))


@pytest.mark.parametrize("make", [Grid, Grid.of], ids=["Grid", "of"])
@pytest.mark.parametrize(
    "sigmas",
    [
        "321",
        ["3", "1"],
        {3.0: 1},
        np.array([3 + 1j, 1]),
        torch.tensor([3 + 1j, 1]),
        np.array([True, False]),
        torch.tensor([True, False]),
        np.array([3.0, 1.0], object),
    ],
    ids=repr,
)
def test_what_is_no_row_of_numbers_is_refused_by_name(
    make: Callable[[Any], Grid], sigmas: Any
) -> None:
    with pytest.raises((TypeError, ValueError), match=r"sigmas must be (one row of|real) numbers"):
        make(sigmas)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "uint64"])
def test_timesteps_of_any_integers_are_places_in_the_schedule(dtype: str) -> None:
    alphas, steps = [0.9, 0.5, 0.1], np.array([2, 1, 0], dtype)  # as many as the schedule has
    expected = sigmas_from_alphas_cumprod(alphas, [2, 1, 0])
    assert torch.equal(sigmas_from_alphas_cumprod(alphas, steps), expected)  # type: ignore[arg-type]
    assert torch.equal(sigmas_from_alphas_cumprod(alphas, torch.from_numpy(steps)), expected)
    with pytest.raises(TypeError, match="timesteps must be real numbers"):
        sigmas_from_alphas_cumprod(alphas, torch.tensor([True, False, True]))
