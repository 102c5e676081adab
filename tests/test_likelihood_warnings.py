"""What is said of likelihoods that are not expected to be right, against what they are off by."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    EDICT,
    RK4,
    DPMSolverPP2S,
    Euler,
    Rex,
    StabilityWarning,
    StepRatio,
    karras_sigmas,
)
from odesolvers.extend import Solver
from odesolvers.likelihood import log_likelihood
from odesolvers.models import Gaussian
from odesolvers.pair_likelihood import importance_samples, log_likelihood_bound

from .problems import noise
from .test_likelihood import LOW, bits, eight_dimensions, normal


def said(record: Any) -> dict[str, float]:
    """The figures of the one warning of these two kinds."""
    found = [w for w in record if "bits per dimension" in str(w.message)]
    assert len(found) <= 1
    assert all(w.filename == __file__ for w in found)
    return {
        unit: float(figure)
        for w in found
        for figure, unit in re.findall(r"(?:by|miss) (\S+) (bits|nats)", str(w.message))
    }


@pytest.mark.parametrize("solver", [None, RK4(), BELM(), Rex(Euler()), EDICT(), BDIA(DDIM(), 0.9)])
@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_likelihood_is_off_by_is_said(solver: Solver | None, n: int, dtype: Any) -> None:
    """As measured on states whose squares have the mean of those of the data."""
    sigmas, std = karras_sigmas(n + 1, LOW, 80.0, append_zero=False), math.hypot(0.5, LOW)
    x = std * torch.tensor([[1.0, -1.0, 1.0], [0.5**0.5, 2**0.5, -(0.5**0.5)]], dtype=dtype)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        found = log_likelihood(Gaussian(0.0, 0.5), x, sigmas, solver=solver, probes=None)
    off, figures = (
        bits(found, normal(x.double(), torch.full((3,), std).double())).abs(),
        said(record),
    )
    assert bool(figures) == (off[0] > 0.1)
    if figures:
        assert off.tolist() == pytest.approx([figures["bits"]] * 2, rel=0.06)
        assert figures["nats"] == pytest.approx(figures["bits"] * 3 * math.log(2), rel=0.1)


@pytest.mark.parametrize(
    ("solver", "n"),
    [
        (BDIA(DPMSolverPP2S()), 60),
        (BDIA(DPMSolverPP2S(), StepRatio(1)), 35),
        (BDIA(RK4(), StepRatio(1)), 10),
    ],
)
def test_what_clusters_are_off_by_is_said_where_a_gaussian_is_not(solver: Solver, n: int) -> None:
    sigmas = karras_sigmas(n + 1, LOW, 80.0, append_zero=False)
    denoiser, x, true = eight_dimensions()
    with pytest.warns(StabilityWarning, match="where they are two clusters") as record:
        found = log_likelihood(denoiser, x[:64], sigmas, solver=solver, probes=None)
    assert bits(found, true[:64]).abs().mean() > 0.3
    assert said(record)["bits"] < 0.1


@pytest.mark.parametrize("solver", [None, BDIA(Euler(), StepRatio(1))], ids=repr)
def test_outputs_of_another_form_are_refused_as_in_a_run(solver: Solver | None) -> None:
    sigmas = karras_sigmas(81, LOW, 80.0, append_zero=False)
    outputs: list[tuple[Callable[..., Any], str]] = [
        (
            lambda x, sigma: (x,),
            "must return a tensor, got tuple at level (79|80) of the grid, sigma = 0.02",
        ),
        (lambda x, sigma: x[:, :1], "must return the form of its input"),
        (lambda x, sigma: x.float(), "returned torch.float32 for a state in torch.float64"),
    ]
    for denoiser, message in outputs:
        with pytest.raises((TypeError, ValueError), match=message):
            log_likelihood(denoiser, noise(2, 3), sigmas, solver=solver)


@pytest.mark.parametrize("scale", [0.05, 1.0, 80.0, 800.0])
def test_noise_of_another_width_is_noticed(scale: float) -> None:
    """Its samples are near one point, and their weights look equal."""
    sigmas, x = karras_sigmas(41, LOW, 80.0, append_zero=False), scale * noise(32, 2)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        importance_samples(BDIA(Euler(), StepRatio(1)), Gaussian(), x, sigmas, samples=1)
    assert [w.filename for w in record] == [__file__] * (scale != 80.0)


@pytest.mark.parametrize("solver", [BDIA(Euler(), StepRatio(1)), BELM(), Rex(Euler()), EDICT()])
@pytest.mark.parametrize("n", [10, 40])
def test_what_a_bound_misses_is_said(solver: Solver, n: int) -> None:
    sigmas, std = karras_sigmas(n + 1, LOW, 80.0, append_zero=False), math.hypot(0.3, LOW)
    x, generator = std * noise(4000, 2), torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"samples": 1, "data_std": 0.3}
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        found = log_likelihood_bound(
            solver, Gaussian(0.0, 0.3), x, sigmas, generator=generator, **options
        )
    off = bits(found, normal(x, torch.full((2,), std).double())).mean().item()
    figures = said(record)
    assert bool(figures) == (off > 0.5)
    if figures:
        assert figures["bits"] == pytest.approx(off, rel=0.1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        importance_samples(solver, Gaussian(0.0, 0.3), 80 * x, sigmas, jitter=2.0, **options)
    assert said(record) == figures
