"""Likelihoods from evaluations alone: a bound for given data, and samples with unbiased weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from .checks import check_is, refuse_gain
from .grids import Grid, Sigmas
from .likelihood import Likelihood, check_data, log_normal, positive
from .run import Denoiser
from .solver import Solver
from .state import Solution, State
from .trust import StabilityWarning
from .values import count, number, widened

BOUND_LIMIT: Final = 0.5
"""What a sample is expected to miss, in bits per dimension, above which a bound is warned of."""


def log_likelihood_bound(
    solver: Solver,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sigmas,
    *,
    samples: int = 16,
    jitter: float = 2.0,
    data_std: float = 0.5,
    generator: torch.Generator | None = None,
    extra_args: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Likelihood:
    """A lower bound on the log density that an exactly invertible solver gives `x`, without derivatives.

    A run of `solver` down the grid is a bijection of pairs of states with a known Jacobian, ``Π g^dim``
    over its shears. With a pair ``x_N ~ N(0, σ_N²)``, ``x_{N-1} ~ N(F(x_N), s_N²)`` to start from, F the
    first step, it is a model of pairs ``(x_1, x_0)``, and of `x` with x_1 as a latent variable. Drawing
    x_1 from ``r = N(step up from x_0, s_0²)``,

        log p(x_0) >= E log 1/K Σ_k p(x_N) N(x_{N-1}; F(x_N), s_N²) / (Π g^dim r(x_1 | x_0)),

    which rises to the density of the model with the number of samples K (Burda et al. 2016, arXiv
    1509.00519). That density is not quite that of the flow: averaged over data it is not above that of
    the data, whatever the model, but for one x, an unusual one above all, it can be.

    In a coupled solver the second state of a pair is the companion, and F the identity. See
    ``docs/likelihood.md``.

    Args:
        solver: two-step or coupled, in floating point, such as ``BDIA(Euler(), StepRatio(1))``; see the
            warning below.
        denoiser: as for `Solver.invert`; it is not differentiated.
        x: data at level ``sigmas[-1]``, float32 or float64 ``(B, ...)``.
        sigmas: a decreasing grid, up to a level that hides the data.
        samples: K, each for one run of the batch.
        jitter: s_0 relative to the level above the last.
        data_std: standard deviation of the data about a point, that of one cluster where they have
            several. s_N is what s_0 becomes where the solver carries Gaussian data of this width up. Any
            value gives a bound; it is loose for a wrong one.
        generator: of the samples.
        extra_args: keyword arguments for every call of the denoiser.
        progress: show a progress bar for each run (needs tqdm).

    Returns:
        The bound in place of the density.

    Warns:
        StabilityWarning: if one sample is expected to miss more than 0.5 bits per dimension on Gaussian
            data of this width, as with `EDICT`, `Rex` and `BELM`, which amplify on the way up.

    Raises:
        TypeError, ValueError, FloatingPointError: see `Solver.invert`; ValueError also for a solver that
            has no exact inverse.
    """
    check_data(x)
    K = positive("samples", count("samples", samples))
    model = _PairModel(
        solver, denoiser, sigmas, jitter, data_std, extra_args=extra_args, progress=progress
    )
    mean = model.second(x)
    return model.likelihood(x, [model.upwards(x, mean, generator) for _ in range(K)])


def importance_samples(
    solver: Solver,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sigmas,
    *,
    samples: int = 16,
    jitter: float = 1.0,
    data_std: float = 0.5,
    generator: torch.Generator | None = None,
    extra_args: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> tuple[Tensor, Likelihood]:
    """Samples, and log densities by which they are weighted without bias, without derivatives.

    A run of `solver` from ``x_N = x``, ``x_{N-1} ~ N(F(x_N), s_N²)`` draws a pair ``(x_1, x_0)`` of the
    model of `log_likelihood_bound`, whose density p is known. With its x_1 as the first of K, and the
    others from r,

        p̂(x_0) = 1/K Σ_k p(x_0, x_1^k) / r(x_1^k | x_0)     has     E f(x_0) / p̂(x_0) = ∫ f(x) dx

    for any f, any K and any number of steps: normalisations and expectations of an unnormalised density
    follow by importance sampling. In contrast to it, weights by a bound, or by an estimate of the
    divergence, of samples that were drawn before are biased.

    Args:
        solver: as for `log_likelihood_bound`.
        denoiser: as for `log_likelihood_bound`.
        x: draws of N(0, σ_N²) at level ``sigmas[0]``, float32 or float64 ``(B, ...)``.
        sigmas: a decreasing grid.
        samples: K. The first costs no run but the one that samples; each other costs one.
        jitter: as for `log_likelihood_bound`; it also moves the samples, a little.
        data_std: as for `log_likelihood_bound`. Weights have heavy tails where it is too small.
        generator: of the pairs.
        extra_args: as for `log_likelihood_bound`.
        progress: as for `log_likelihood_bound`.

    Returns:
        The samples, at level ``sigmas[-1]``, and log p̂ of each.

    Warns:
        StabilityWarning: as for `log_likelihood_bound`.
        UserWarning: if `x` is of another width than such draws can be.

    Raises:
        TypeError, ValueError, FloatingPointError: as for `log_likelihood_bound`.
    """
    check_data(x)
    K = positive("samples", count("samples", samples))
    model = _PairModel(
        solver, denoiser, sigmas, jitter, data_std, extra_args=extra_args, progress=progress
    )
    # Half the log likelihood ratio of the width of x against that of its prior.
    square = float(widened(x.detach() / model.grid.levels[0]).square().mean())
    if not x.numel() * (square - 1 - math.log(square or 1e-300)) < 80:
        warnings.warn(
            f"x is no draw of noise at the level {model.grid.levels[0]:g}: its root mean square is "
            f"{math.sqrt(square):.2g} times that, and the weights are not without bias. Draw "
            "sigmas[0] * torch.randn(...)",
            stacklevel=2,
        )
    miss = model.s_N * _normal(x, generator)
    data, second = model.down(x, model.ahead(x) + miss)
    mean = model.second(data)
    terms = [model.log_ratio(x, miss, second - mean)]
    terms += [model.upwards(data, mean, generator) for _ in range(K - 1)]
    return data, model.likelihood(data, terms)


class _Pairs:
    """The pairs at both ends of the runs of an invertible solver, and the evaluations spent on them."""

    def __init__(self, solver: Solver, denoiser: Denoiser, grid: Grid, **options: Any) -> None:
        self.solver, self.denoiser, self.grid, self.options = solver, denoiser, grid, options
        self.nfe = 0

    def second(self, x: Tensor) -> Tensor:
        """The state beside `x` at the lower end: one step up, or in a coupled solver the same."""
        if self.solver.coupled:
            return x
        return self._run(self.solver.invert, x, stop=self.grid.steps - 1).x

    def up(self, x: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The pair at the upper end that a run down leads from to this one."""
        coupled, levels = self.solver.coupled, self.grid.levels
        pair = State(x, second, self.grid.steps, levels, repr(self.solver), coupled=coupled)
        end = self._run(self.solver.invert, pair).state
        assert end.partner is not None
        return (end.current, end.partner) if coupled else (end.partner, end.current)

    def down(self, top: Tensor, next_to_top: Tensor) -> tuple[Tensor, Tensor]:
        """The pair at the lower end that a run down leads to from this one."""
        coupled = self.solver.coupled
        one, other = (top, next_to_top) if coupled else (next_to_top, top)
        index, args = int(not coupled), (self.grid.levels, repr(self.solver))
        end = self._run(self.solver.sample, State(one, other, index, *args, coupled=coupled)).state
        assert end.partner is not None
        return end.current, end.partner

    def ahead(self, top: Tensor) -> Tensor:
        """The state beside `top` at the upper end: one step down, or in a coupled solver the same."""
        return top if self.solver.coupled else self._run(self.solver.sample, top, stop=1).x

    def _run(self, way: Callable[..., Solution], x: Tensor | State, **options: Any) -> Solution:
        solution = way(self.denoiser, x, self.grid, **self.options, **options)
        self.nfe += solution.nfe
        return solution


def _gaussian(std: float) -> Denoiser:
    """The denoiser of N(0, std²), of states of one dimension."""

    def denoiser(x: Tensor, sigma: Tensor, /, **_: Any) -> Tensor:
        return x * (std**2 / (std**2 + sigma[:, None] ** 2))

    return denoiser


class _PairModel(_Pairs):
    """The density of pairs ``(x_0, x_1)`` that runs down the grid lead to, and r(x_1 | x_0)."""

    def __init__(
        self,
        solver: Solver,
        denoiser: Denoiser,
        sigmas: Sigmas,
        jitter: float,
        data_std: float,
        **options: Any,
    ) -> None:
        check_is(solver, Solver, "solver must be an instance such as BDIA(Euler(), StepRatio(1))")
        if solver.states == 1 or solver.iterative or solver.arithmetic.exact:
            raise ValueError(
                f"the bound needs a bijection of pairs of states in floating point, got {solver}: take "
                "BDIA(Euler(), StepRatio(1))"
            )
        jitter = positive("jitter", number("jitter", jitter))
        std = positive("data_std", number("data_std", data_std))
        super().__init__(solver, denoiser, Grid.of(sigmas), **options)
        levels = self.grid.levels
        if self.grid.steps < 2:
            raise ValueError(
                f"the bound needs a grid of two steps or more, got {len(levels)} levels"
            )
        self.log_gain = 0.0
        for k, step in solver.plan(self.grid)[not solver.coupled :]:
            for shear in step:
                if shear.gain == 0.0:
                    refuse_gain(solver, self.grid, k)
                self.log_gain += math.log(abs(shear.gain))
        self.s_0 = jitter * levels[-2]
        # Over Gaussian data a run is linear: that of a typical x and no jump, and of the jump alone.
        pairs, width = _Pairs(solver, _gaussian(std), self.grid), math.hypot(std, levels[-1])
        x, jump = torch.tensor([[[width], [0.0]], [[0.0], [self.s_0]]], dtype=torch.float64)
        with warnings.catch_warnings():  # said in bits below
            warnings.simplefilter("ignore", StabilityWarning)
            top, next_to_top = pairs.up(x, pairs.second(x) + jump)
            self.s_N = float((next_to_top - pairs.ahead(top)).norm())
        # The mean of log_ratio, less that of the density of the data.
        missed = 0.5 * float((top / levels[0]).square().sum()) - 0.5 + self.log_gain
        missed += math.log(levels[0] * self.s_N / (width * self.s_0))
        if not missed <= BOUND_LIMIT * math.log(2):
            warnings.warn(
                f"the bound is expected to miss {missed / math.log(2):.2g} bits per dimension with one "
                f"sample, even where the data are Gaussian of deviation {std:g}: over the "
                f"{self.grid.steps} steps of this grid {solver!s:.80} leads pairs to others than those "
                "of the prior. Importance weights are of hardly any use. Take "
                "BDIA(Euler(), StepRatio(1)), and the default jitter",
                StabilityWarning,
                stacklevel=3,
            )

    def upwards(self, x: Tensor, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        """The log ratio at a draw of ``r(x_1 | x) = N(mean, s_0²)``."""
        jump = self.s_0 * _normal(x, generator)
        top, next_to_top = self.up(x, mean + jump)
        return self.log_ratio(top, next_to_top - self.ahead(top), jump)

    def log_ratio(self, top: Tensor, miss: Tensor, jump: Tensor) -> Tensor:
        """``log p(x_0, x_1) - log r(x_1 | x_0)``, by the pair at the upper end and x_1 less its mean."""
        log_prior = log_normal(top, self.grid.levels[0]) + log_normal(miss, self.s_N)
        return log_prior - top[0].numel() * self.log_gain - log_normal(jump, self.s_0)

    def likelihood(self, x: Tensor, log_ratios: list[Tensor]) -> Likelihood:
        """The logarithm of the mean of K ratios."""
        log_p = torch.logsumexp(torch.stack(log_ratios), 0) - math.log(len(log_ratios))
        return Likelihood(log_p, x[0].numel(), self.nfe)


def _normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
