"""Likelihoods by the divergence of the flow."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from .approximators import HeunEDM, IntegrationApproximator
from .checks import check_is, check_output, check_start, describe, refuse_call, version
from .grids import Grid, Sigmas
from .run import Denoiser, Run, modes
from .settings import identity, once
from .solver import Solver
from .state import Solution, State
from .trust import StabilityWarning
from .values import count, number, widened

LIKELIHOOD_LIMIT: Final = 0.1
"""Expected error in bits per dimension above which a log density is warned of."""
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
        return bits - math.log2(positive("width", number("width", width)))


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

    Warns:
        StabilityWarning: if the solver is expected to be off by more than 0.1 bits per dimension on this
            grid, as it is on Gaussian data or on two clusters: a solver may follow the flow and not its
            divergence.

    Raises:
        TypeError, ValueError, FloatingPointError: see `Solver.invert`.
    """
    solver = HeunEDM() if solver is None else solver
    check_is(solver, Solver, "solver must be an instance such as HeunEDM()")
    check_data(x)
    if not callable(denoiser):
        refuse_call(denoiser, extra_args)
    shape, dimensions = x.shape, x[0].numel()
    probe = None
    if probes is not None:
        P = positive("probes", count("probes", probes))
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
            if describe(denoised) != describe(point):  # or the trace would fail in words of its own
                level = float(sigma[0])
                k = sum(s > level * (1 + 1e-6) for s in grid.levels)
                check_output(denoised, point, version(point), [], level, k, finite=False)
            trace = _trace(denoised, point, probe)
        integral = y[:, -1] - dimensions + trace
        return torch.cat([denoised.detach().flatten(1), integral[:, None].to(y.dtype)], 1)

    with torch.no_grad():
        grid = Grid.of(sigmas)
    _warn(solver, grid, x)
    log_p, nfe = _integrated(solver, with_integral, x.flatten(1), grid, extra_args, progress)
    return Likelihood(log_p, dimensions, nfe)


def _integrated(
    solver: Solver,
    with_integral: Denoiser,
    x: Tensor,
    grid: Grid,
    extra_args: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> tuple[Tensor, int]:
    """The log densities of states ``(B, dim)`` by a run up the grid, and its evaluations."""
    start = torch.cat([x, x.new_zeros(len(x), 1)], 1)
    if isinstance(solver, IntegrationApproximator):  # whose own inverse is to be refused
        with modes(False):
            run = Run(solver, with_integral, start, grid, None, extra_args)
            s = run.grid.levels
            steps = [
                (k, (solver.start(s[k + 1], s[k]),), False) for k in reversed(range(run.grid.steps))
            ]
            up = run.finish(steps, run.walk, progress, run.grid.steps, 0)
    else:
        up = solver.invert(with_integral, start, grid, extra_args=extra_args, progress=progress)
    end = widened(up.x)
    return log_normal(end[:, :-1], grid.levels[0]) + end[:, -1], up.nfe


def expected_errors(solver: Solver, grid: Grid, dtype: torch.dtype) -> tuple[float, float]:
    """The errors of log densities in one dimension, in bits, without a call of a network.

    Of Gaussian data of standard deviation 0.5, where the run is linear, and of two clusters at -1 and 1
    of standard deviation 0.3.
    """
    return (
        _expected_error(solver, grid, torch.zeros(1, dtype=dtype), 0.5, [1.0]),
        _expected_error(
            solver, grid, torch.tensor([1.0, -1.0], dtype=dtype), 0.3, [-1.5, -0.5, 0.5, 1.5]
        ),
    )


def _expected_error(
    solver: Solver, grid: Grid, means: Tensor, std: float, places: list[float]
) -> float:
    """For clusters of these means, at these distances from the first in units of its width."""

    def with_integral(y: Tensor, sigma: Tensor, /, **_: Any) -> Tensor:
        x, width = y[:, :1], std**2 + sigma[:, None].to(y.dtype) ** 2
        weights = torch.softmax(-((x - means) ** 2) / (2 * width), 1)
        mean = (weights * means).sum(1, keepdim=True)
        spread = (weights * (means - mean) ** 2).sum(1, keepdim=True)
        share = std**2 / width
        trace = share + (1 - share) * spread / width
        return torch.cat([mean + share * (x - mean), y[:, 1:] - 1.0 + trace], 1)

    width = math.hypot(std, grid.levels[-1])
    x = means[0] + width * means.new_tensor(places)[:, None]
    terms = torch.stack([log_normal(x - mean, width) for mean in means])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log_p, _ = _integrated(solver, with_integral, x, grid)
    except ArithmeticError:
        return math.inf
    except ValueError:  # the run of the data is refused in the same words
        return 0.0
    error = log_p - torch.logsumexp(terms, 0) + math.log(len(means))
    return float(error.abs().mean()) / math.log(2)


def _warn(solver: Solver, grid: Grid, x: Tensor) -> None:
    """Warns of an error that is expected to be above `LIKELIHOOD_LIMIT`."""
    key = "likelihood", *identity(solver), grid.levels, x.dtype
    bits, clusters = once(key, lambda: expected_errors(solver, grid, x.dtype))
    if not max(bits, clusters) <= LIKELIHOOD_LIMIT:
        nats = bits * math.log(2) * x[0].numel()
        higher = "a grid from a higher level, " if grid.levels[0] < 1.0 else ""
        warnings.warn(
            f"log densities are expected to be off by {bits:.2g} bits per dimension, in all by "
            f"{nats:.2g} nats, where the data are Gaussian, and {clusters:.2g} bits per dimension where "
            f"they are two clusters: {solver!s:.80} errs by that over the {grid.steps} steps of this "
            f"grid. Use more steps, {higher}or a solver whose integral of the divergence is better, "
            "such as HeunEDM() or RK4()",
            StabilityWarning,
            stacklevel=4,  # past this function, `log_likelihood` and its mode of torch
        )


def log_normal(x: Tensor, std: float) -> Tensor:
    """The log density of N(0, std²) at each state, float64 ``(B,)``."""
    flat = widened(x.detach()).flatten(1) / std
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


def check_data(x: object) -> None:
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


def positive(name: str, value: Number) -> Number:
    """`value`, or a ValueError unless it is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return value
