"""Likelihoods against closed forms, and against k-diffusion's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    EDICT,
    RK4,
    Euler,
    FixedPoint,
    FixedPointInversion,
    HeunEDM,
    PerStep,
    ReversibleHeun,
    StepRatio,
    karras_sigmas,
)
from odesolvers.extend import Solver
from odesolvers.likelihood import Likelihood, log_likelihood
from odesolvers.models import Gaussian, GaussianMixture
from odesolvers.pair_likelihood import importance_samples, log_likelihood_bound

from .problems import noise

LOW = 0.02
STD = torch.linspace(0.3, 1.5, 5).double()


def normal(x: Tensor, std: Tensor) -> Tensor:
    """The log density of N(0, diag(std²))."""
    return torch.distributions.Normal(torch.zeros_like(std), std).log_prob(x).sum(-1)


def eight_dimensions() -> tuple[GaussianMixture, Tensor, Tensor]:
    """Five Gaussians in eight dimensions; data at the level `LOW`, and their log density there."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    stds = 0.2 + 0.3 * torch.rand(5, generator=generator).double()
    wide = torch.sqrt(stds**2 + LOW**2)[:, None].expand(5, 8)
    of = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(5).double()),
        torch.distributions.Independent(torch.distributions.Normal(means, wide), 1),
    )
    torch.manual_seed(1)
    x = of.sample((256,))
    return GaussianMixture(means, stds), x, of.log_prob(x)


def bits(found: Likelihood, true: Tensor) -> Tensor:
    """How many bits per dimension the density found is below the true one."""
    return (true - found.log_p) / (found.dimensions * math.log(2))


@pytest.mark.parametrize(
    "solver", [None, RK4(), BDIA(RK4()), BDIA(HeunEDM("behind"), StepRatio(1))], ids=repr
)
def test_the_density_of_a_gaussian(solver: Solver | None) -> None:
    sigmas = karras_sigmas(200, LOW, 80.0, append_zero=False)
    wide = torch.sqrt(STD**2 + LOW**2)
    x = wide * noise(6, 5)
    found = log_likelihood(Gaussian(0.0, STD), x, sigmas, solver=solver, probes=None)
    right = (
        normal(x, wide)
        + normal(torch.zeros(5), torch.full((5,), 80.0))
        - normal(torch.zeros(5), torch.sqrt(STD**2 + 80.0**2))
    )  # the prior leaves the width of the data out
    assert (found.log_p - right).abs().max() < 5e-2
    assert found.dimensions == 5


def test_the_density_of_a_mixture_and_its_order_in_the_steps() -> None:
    denoiser, x, true = eight_dimensions()
    errors = [
        bits(
            log_likelihood(
                denoiser, x, karras_sigmas(n, LOW, 80.0, append_zero=False), probes=None
            ),
            true,
        )
        .abs()
        .mean()
        .item()
        for n in (40, 80)
    ]
    assert errors[1] < 1e-2
    assert 3 < errors[0] / errors[1] < 5.5  # order 2


@pytest.mark.filterwarnings("ignore:log densities are expected to be off")  # few steps
def test_probes_estimate_the_trace_without_bias() -> None:
    denoiser, x, _ = eight_dimensions()
    sigmas, generator = karras_sigmas(20, LOW, 80.0, append_zero=False), torch.Generator()
    exact = log_likelihood(denoiser, x, sigmas, probes=None).log_p
    estimates = [
        log_likelihood(denoiser, x, sigmas, probes=p, generator=generator.manual_seed(2)).log_p
        - exact
        for p in (1, 8)
    ]
    for estimate in estimates:
        assert estimate.mean().abs() < 4 * estimate.std() / math.sqrt(len(x))
    assert 2 < estimates[0].std() / estimates[1].std() < 4  # the root of 8 is 2.8


def test_it_agrees_with_k_diffusion() -> None:
    """On data whose Jacobian is diagonal, of which every sign probe finds the trace."""
    sampling = pytest.importorskip("k_diffusion.sampling", reason="k-diffusion is not installed")
    denoiser, x = Gaussian(0.0, STD), torch.sqrt(STD**2 + LOW**2) * noise(6, 5)
    theirs, _ = sampling.log_likelihood(denoiser, x, LOW, 80.0, atol=1e-8, rtol=1e-8)
    errors = []
    for n in (80, 160):
        sigmas = karras_sigmas(n, LOW, 80.0, append_zero=False)
        found = log_likelihood(denoiser, x, sigmas, solver=RK4())
        errors.append(float((found.log_p - theirs).abs().max()))
    assert errors[1] < 1e-5
    assert errors[0] / errors[1] > 8  # order 4, until their tolerance


@pytest.mark.filterwarnings("ignore:log densities are expected to be off")  # few steps
@pytest.mark.parametrize("solver", [None, BDIA(HeunEDM("behind"), StepRatio(1))], ids=repr)
def test_it_is_the_same_in_inference_mode_and_needs_a_graph(solver: Any) -> None:
    denoiser, x, _ = eight_dimensions()
    sigmas = karras_sigmas(10, LOW, 80.0, append_zero=False)
    outside = log_likelihood(denoiser, x, sigmas, solver=solver, probes=None)
    with torch.inference_mode():
        inside = log_likelihood(denoiser, x.clone(), sigmas, solver=solver, probes=None)
    assert torch.equal(inside.log_p, outside.log_p)
    with pytest.raises(ValueError, match="no gradient with respect to its input"):
        log_likelihood(torch.no_grad()(denoiser.forward), x, sigmas, solver=solver)
    with pytest.raises(FloatingPointError, match="not finite"):
        log_likelihood(lambda x, s: x * torch.nan, x, sigmas, solver=solver)


def test_states_of_any_shape_and_conditions() -> None:
    def denoiser(x: Tensor, sigma: Tensor, std: float) -> Tensor:
        return x * (std**2 / (std**2 + sigma**2))[:, None, None, None]

    sigmas, x = karras_sigmas(100, LOW, 80.0, append_zero=False), 0.5 * noise(2, 1, 2, 2)
    found = log_likelihood(denoiser, x, sigmas, probes=None, extra_args={"std": 0.5})
    wide = torch.full((4,), math.hypot(0.5, LOW)).double()
    assert (found.log_p - normal(x.flatten(1), wide)).abs().max() < 3e-2
    assert found.log_p.shape == found.bits_per_dim().shape == (2,)
    per_bin = found.bits_per_dim(width=1 / 127.5) - found.bits_per_dim()
    assert per_bin == pytest.approx(math.log2(127.5))


@pytest.mark.filterwarnings("ignore:the bound is expected to miss")
@pytest.mark.parametrize(
    "solver",
    [BDIA(Euler(), StepRatio(1)), BDIA(HeunEDM("behind"), StepRatio(1)), BDIA(Euler()), EDICT()],
    ids=repr,
)
@pytest.mark.parametrize(("jitter", "data_std"), [(2.0, 0.4), (0.5, 0.4), (2.0, 1.5)])
def test_the_bound_is_never_above_the_truth(solver: Any, jitter: float, data_std: float) -> None:
    denoiser, x, true = eight_dimensions()
    for n, samples in ((10, 1), (10, 16), (40, 16)):
        sigmas = karras_sigmas(n, LOW, 80.0, append_zero=False)
        found = log_likelihood_bound(
            solver,
            denoiser,
            x,
            sigmas,
            samples=samples,
            jitter=jitter,
            data_std=data_std,
            generator=torch.Generator().manual_seed(n),
        )
        below = bits(found, true)
        assert below.mean() > -3 * below.std() / math.sqrt(len(x))


def test_the_bound_is_tight_at_twenty_evaluations() -> None:
    denoiser, x, true = eight_dimensions()
    sigmas = karras_sigmas(20, LOW, 80.0, append_zero=False)
    found = log_likelihood_bound(
        BDIA(Euler(), StepRatio(1)),
        denoiser,
        x,
        sigmas,
        samples=256,
        data_std=0.35,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.nfe == 1 + 256 * 19  # one for the mean of x_1, then 18 and one for the first step
    assert bits(found, true).mean() < 0.02


def test_the_bound_is_equal_to_the_density_where_runs_are_linear() -> None:
    """Over Gaussian data the model is Gaussian, and r is nearly its own conditional."""
    sigmas = karras_sigmas(200, LOW, 80.0, append_zero=False)
    x = math.hypot(0.5, LOW) * noise(64, 6)
    right = normal(x, torch.full((6,), math.hypot(0.5, LOW)).double())
    found = log_likelihood_bound(
        BDIA(HeunEDM("behind"), StepRatio(1)), Gaussian(0.0, 0.5), x, sigmas, samples=4
    )
    assert bits(found, right).mean().abs() < 1e-2


WEIGHTED = [BDIA(Euler(), StepRatio(1)), BDIA(HeunEDM("behind"), StepRatio(1)), ReversibleHeun()]


@pytest.mark.parametrize("solver", WEIGHTED, ids=repr)
@pytest.mark.parametrize("samples", [1, 8])
def test_weights_are_without_bias_at_any_number_of_steps(solver: Any, samples: int) -> None:
    """Of samples of a denoiser of other data, towards a mixture whose moments are known.

    Five steps are far from the flow, and the denoiser's mean and width are not those of the mixture.
    """
    target = torch.distributions.Normal(torch.tensor([0.2, -0.1]).double(), 0.4)
    start = 80.0 * noise(20_000, 2, seed=4)
    x, found = importance_samples(
        solver,
        Gaussian(0.0, 0.6),
        start,
        karras_sigmas(6, LOW, 80.0, append_zero=False),
        samples=samples,
        data_std=0.6,
        generator=torch.Generator().manual_seed(5),
    )
    w = torch.exp(target.log_prob(x).sum(1) - found.log_p)
    spread = w.std() / math.sqrt(len(w))
    assert spread < 0.05
    assert (w.mean() - 1).abs() < 4 * spread
    for value, right in (
        (x[:, 0], 0.2),
        (x[:, 1], -0.1),
        ((x[:, 0] - 0.2) ** 2, 0.16),
        (x[:, 0] * x[:, 1], -0.02),
    ):
        of = w * (value - right)
        assert of.mean().abs() < 4 * of.std() / math.sqrt(len(w))


def test_the_first_of_the_samples_costs_no_run() -> None:
    sigmas, solver = karras_sigmas(6, LOW, 80.0, append_zero=False), BDIA(Euler(), StepRatio(1))
    x = 80.0 * noise(4, 2)
    _, found = importance_samples(solver, Gaussian(), x, sigmas, samples=1)
    assert found.nfe == 5 + 1  # the steps, and one for the mean of x_1
    _, found = importance_samples(solver, Gaussian(), x, sigmas, samples=3)
    assert found.nfe == 6 + 2 * 5


@pytest.mark.filterwarnings("ignore:log densities are expected to be off")  # few steps
def test_what_is_no_use_is_refused() -> None:
    x, sigmas = noise(2, 3), karras_sigmas(5, LOW, 80.0, append_zero=False)
    for solver in (Euler(), FixedPointInversion(Euler()), BDIA(Euler(), 1.0, FixedPoint())):
        with pytest.raises(ValueError, match="needs a bijection"):
            log_likelihood_bound(solver, Gaussian(), x, sigmas)
    solver = BDIA(Euler())
    for name in ("samples", "jitter", "data_std"):
        for value in (0, -1):
            with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
                log_likelihood_bound(solver, Gaussian(), x, sigmas, **{name: value})  # type: ignore[arg-type]
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="jitter must be positive"):
            log_likelihood_bound(solver, Gaussian(), x, sigmas, jitter=value)
    with pytest.raises(ValueError, match="two steps or more, got 2 levels"):
        log_likelihood_bound(solver, Gaussian(), x, sigmas[:2])
    forgetful = BDIA(Euler(), PerStep([0.5, 0.0, 0.5]))
    with pytest.raises(ValueError, match="weight g = 0"):
        log_likelihood_bound(forgetful, Gaussian(), x, sigmas)
    with pytest.raises(ValueError, match="weight g = 0"):
        log_likelihood(Gaussian(), x, sigmas, solver=forgetful)
    for probes in (0, -1):
        with pytest.raises(ValueError, match=f"probes must be positive, got {probes}"):
            log_likelihood(Gaussian(), x, sigmas, probes=probes)
    with pytest.raises(TypeError, match="callable"):
        log_likelihood(3, x, sigmas)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        log_likelihood(Gaussian(), x, sigmas).bits_per_dim(0)


@pytest.mark.parametrize(
    "function",
    [
        log_likelihood,
        partial(log_likelihood_bound, BDIA(Euler())),
        partial(importance_samples, BDIA(Euler())),
    ],
    ids=["log_likelihood", "log_likelihood_bound", "importance_samples"],
)
def test_data_of_another_form_are_refused(function: Callable[..., Any]) -> None:
    sigmas, denoiser = karras_sigmas(5, LOW, 80.0, append_zero=False), Gaussian()
    solution = BDIA(Euler()).invert(denoiser, noise(2, 3), sigmas)
    for x, message in (
        (solution, "got Solution; pass one of its tensors"),
        (solution.state, "got State; pass one of its tensors"),
        ([[1.0, 2.0]], "got list"),
        (torch.ones(3, 2, dtype=torch.int64), "floating point tensor, got torch.int64"),
        (noise(2, 3).half(), r"torch.float16 has too few digits.*use x.float\(\)"),
    ):
        with pytest.raises(TypeError, match=message):
            function(denoiser, x, sigmas)
    for shape in ((), (4,), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match=r"must have shape \(B, ...\)"):
            function(denoiser, torch.zeros(shape), sigmas)
    with pytest.raises(ValueError, match="not finite"):
        function(denoiser, noise(2, 3) * math.nan, sigmas)


def test_the_exact_trace_is_refused_where_it_would_not_end() -> None:
    sigmas = karras_sigmas(3, LOW, 80.0, append_zero=False)
    x = torch.zeros(1, 3, 128, 128)
    with pytest.raises(ValueError, match="49152, and each costs a vector-Jacobian product"):
        log_likelihood(Gaussian(), x, sigmas, probes=None)


@pytest.mark.filterwarnings("ignore:log densities are expected to be off")  # few steps
def test_a_denoiser_that_hides_its_input_is_refused() -> None:
    """Its weights give the output a graph, in which the input is not."""
    weight = torch.tensor(0.5).double().requires_grad_()
    sigmas = karras_sigmas(5, LOW, 80.0, append_zero=False)
    with pytest.raises(ValueError, match="does it detach its input"):
        log_likelihood(lambda x, sigma: weight * x.detach(), noise(2, 3), sigmas)
