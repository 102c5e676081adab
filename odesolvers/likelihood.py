"""Likelihoods: by the divergence of the flow, and a bound from evaluations of the denoiser alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from .approximators import HeunEDM, IntegrationApproximator
from .checks import check_is, check_start, describe, refuse_call, refuse_gain
from .grids import Grid, Sigmas
from .run import Denoiser, Run, modes
from .solver import Solver
from .state import Solution, State
from .trust import StabilityWarning
from .values import count, number

EXACT_TRACE_LIMIT: Final = 2**14
"""Elements of a state up to which the trace of a Jacobian is computed one by one."""


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Log densities at the lowest level of a grid.

    Attributes:
        log_p: natural logarithms of the density, float64 ``(B,)``, without a gradient.
        dimensions: elements of each state.
        nfe: denoiser evaluations spent on the batch.
    """

    log_p: Tensor
    dimensions: int
    nfe: int

    def bits_per_dim(self, width: float = 1.0) -> Tensor:
        """Code length in bits for each element, ``(B,)``.

        Args:
            width: of the bins in which elements are counted: 1 / 127.5 for pictures of 8 bits from -1
                to 1, to which uniform noise of that width was added. With 1 it is the density itself.
        """
        bits = -self.log_p / (self.dimensions * math.log(2))
        return bits - math.log2(_positive("width", number("width", width)))


@torch.inference_mode(False)
def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sigmas,
    *,
    solver: Solver | None = None,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    extra_args: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Likelihood:
    """The log density of `x` under the probability-flow ODE, by the trace of the denoiser's Jacobian.

    The density changes along the flow by its divergence (Chen et al. 2018, arXiv 1806.07366; Song et
    al. 2021, arXiv 2011.13456, equation 39):

        log p(x_0) = log N(x_N; 0, σ_N²) + ∫ div d(x, σ) dσ,    div d = (dim - tr ∂D/∂x) / σ.

    The integral is one more element of the state, so that any solver of the package computes both.

    Args:
        denoiser: differentiable in its first argument.
        x: data at level ``sigmas[-1]``, float32 or float64 ``(B, ...)``.
        sigmas: a decreasing grid, up to a level that hides the data; best with a last level above 0.
        solver: `HeunEDM` by default.
        probes: random sign vectors of Hutchinson's estimator, the same in every call of a run; each
            costs a vector-Jacobian product a call. None for the exact trace, which costs one for each
            element of the state, of which it may have 16,384.
        generator: of the probes.
        extra_args: keyword arguments for every call of the denoiser.
        progress: show a progress bar (needs tqdm).

    Raises:
        TypeError, ValueError, FloatingPointError: see `Solver.invert`.
    """
    solver = HeunEDM() if solver is None else solver
    check_is(solver, Solver, "solver must be an instance such as HeunEDM()")
    _check_data(x)
    if not callable(denoiser):
        refuse_call(denoiser, extra_args)
    shape, dimensions = x.shape, x[0].numel()
    probe = None
    if probes is not None:
        P = _positive("probes", count("probes", probes))
        signs = torch.randint(0, 2, (P, *shape), generator=generator, device=x.device)
        probe = (2 * signs - 1).to(x.dtype)
    elif dimensions > EXACT_TRACE_LIMIT:
        raise ValueError(
            f"the exact trace, probes=None, is for at most {EXACT_TRACE_LIMIT} elements: a state of "
            f"{describe(x)} has {dimensions}, and each costs a vector-Jacobian product in every call of "
            "the denoiser. Estimate it, with probes=1 or more"
        )

    def with_integral(y: Tensor, sigma: Tensor, /, **extra: Any) -> Tensor:
        with torch.enable_grad():
            point = y[:, :-1].detach().reshape(shape).requires_grad_()
            denoised = denoiser(point, sigma, **extra)
            trace = _trace(denoised, point, probe)
        integral = y[:, -1] - dimensions + trace
        return torch.cat([denoised.detach().flatten(1), integral[:, None].to(y.dtype)], 1)

    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
    if isinstance(solver, IntegrationApproximator):
        up = _up(solver, with_integral, start, sigmas, extra_args, progress)
    else:
        up = solver.invert(with_integral, start, sigmas, extra_args=extra_args, progress=progress)
    end, nfe = up.x, up.nfe
    end = end.double()
    log_p = _log_normal(end[:, :-1], Grid.of(sigmas).levels[0]) + end[:, -1]
    return Likelihood(log_p, dimensions, nfe)


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
    1509.00519). In a coupled solver the second state of a pair is the companion, and F the identity. See
    ``docs/likelihood.md``.

    Args:
        solver: two-step or coupled, in floating point, such as ``BDIA(Euler(), StepRatio(1))``.
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

    Raises:
        TypeError, ValueError, FloatingPointError: see `Solver.invert`; ValueError also for a solver that
            has no exact inverse.
    """
    check_is(solver, Solver, "solver must be an instance such as BDIA(Euler(), StepRatio(1))")
    if solver.states == 1 or solver.iterative or solver.arithmetic.exact:
        raise ValueError(
            f"the bound needs a bijection of pairs of states in floating point, got {solver}: take "
            "BDIA, or a coupled solver such as EDICT"
        )
    _check_data(x)
    K = _positive("samples", count("samples", samples))
    s0 = _positive("jitter", number("jitter", jitter))
    std = _positive("data_std", number("data_std", data_std))
    grid = Grid.of(sigmas)
    if grid.steps < 2:
        raise ValueError(
            f"the bound needs a grid of two steps or more, got {len(grid.levels)} levels"
        )
    s0 *= grid.levels[-2]
    s_N = _mismatch(_Pairs(solver, _gaussian(std), grid), s0, math.hypot(std, grid.levels[-1]))
    pairs = _Pairs(solver, denoiser, grid, extra_args=extra_args, progress=progress)
    mean, terms = pairs.second(x), []
    for _ in range(K):
        jump = s0 * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        top, next_to_top = pairs.up(x, mean + jump)
        miss = next_to_top - pairs.ahead(top)
        log_prior = _log_normal(top, grid.levels[0]) + _log_normal(miss, s_N)
        terms.append(log_prior - _log_normal(jump, s0))
    log_p = torch.logsumexp(torch.stack(terms), 0) - math.log(K)
    dimensions = x[0].numel()
    return Likelihood(log_p - dimensions * pairs.log_gain, dimensions, pairs.nfe)


class _Pairs:
    """The pairs at both ends of the runs of an invertible solver, and the evaluations spent on them."""

    def __init__(self, solver: Solver, denoiser: Denoiser, grid: Grid, **options: Any) -> None:
        self.solver, self.denoiser, self.grid, self.options = solver, denoiser, grid, options
        self.nfe = 0
        self.log_gain = 0.0
        for k, step in solver.plan(grid)[not solver.coupled :]:
            for shear in step:
                if shear.gain == 0.0:
                    refuse_gain(solver, grid, k)
                self.log_gain += math.log(abs(shear.gain))

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


def _mismatch(pairs: _Pairs, s0: float, std: float) -> float:
    """The deviation of ``x_{N-1} - F(x_N)`` over Gaussian data, of which a run is linear."""
    x, jump = torch.tensor([[[std], [0.0]], [[0.0], [s0]]], dtype=torch.float64)
    with warnings.catch_warnings():  # a loose bound is no wrong number
        warnings.simplefilter("ignore", StabilityWarning)
        top, next_to_top = pairs.up(x, pairs.second(x) + jump)
        return float((next_to_top - pairs.ahead(top)).norm())


def _up(
    solver: IntegrationApproximator,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: Any,
    progress: bool,
) -> Solution:
    """The run up the grid by steps of a one-step method."""
    with modes(False):
        run = Run(solver, denoiser, x, sigmas, None, extra_args)
        s = run.grid.levels
        steps = [
            (k, (solver.start(s[k + 1], s[k]),), False) for k in reversed(range(run.grid.steps))
        ]
        return run.finish(steps, run.walk, progress, run.grid.steps, 0)


def _log_normal(x: Tensor, std: float) -> Tensor:
    """The log density of N(0, std²) at each state, float64 ``(B,)``."""
    flat = x.detach().double().flatten(1) / std
    constant = flat.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(std))
    return -0.5 * flat.square().sum(1) - constant


def _trace(output: Tensor, x: Tensor, probes: Tensor | None) -> Tensor:
    """The trace of the Jacobian for each element of the batch, exact or by probes ``(P, B, ...)``."""
    n = x[0].numel() if probes is None else len(probes)
    total = x.new_zeros(len(x))
    for k in range(n):
        if probes is None:
            vector = x.new_zeros(x.shape)
            vector.flatten(1)[:, k] = 1.0
        else:
            vector = probes[k]
        product = None
        if output.requires_grad:
            (product,) = torch.autograd.grad(
                output, x, vector, retain_graph=k + 1 < n, allow_unused=True
            )
        if product is None:
            raise ValueError(
                "the denoiser's output has no gradient with respect to its input, and the divergence of "
                "the flow would be lost: is it under torch.no_grad() or torch.inference_mode(), or does "
                "it detach its input?"
            )
        total += (product * vector).flatten(1).sum(1)
    return total if probes is None else total / n


def _check_data(x: object) -> None:
    """Data of a batch, in single precision or better, or an error."""
    if not isinstance(x, Tensor):
        raise TypeError(
            "x must be a tensor of data (B, ...) at the lowest level of the grid, got "
            f"{type(x).__name__}"
            + ("; pass one of its tensors" if isinstance(x, State | Solution) else "")
        )
    check_start(x)
    if x.ndim < 2:
        raise ValueError(
            f"x must have shape (B, ...), got {tuple(x.shape)}: one state of many elements is a batch "
            "x[None], many of one element are x[:, None]"
        )
    if x.dtype.itemsize < 4:
        raise TypeError(
            f"{x.dtype} has too few digits for a sum over all elements: use x.float(), and "
            f"odesolvers.models.InDtype(denoiser, {x.dtype}) to keep the network in its dtype"
        )


Number = TypeVar("Number", int, float)


def _positive(name: str, value: Number) -> Number:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return value
