"""Inversion that is not exact: one state, and a step that is undone by solving for its start."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, final

import torch
from torch import Tensor

from .approximators import DDIM, EES25, IntegrationApproximator, check_approximator, leaving
from .formula import Shear
from .grids import Grid
from .run import Pair, Run, Steps
from .solver import Solver
from .state import Convergence
from .trust import InversionWarning
from .values import count, number

Residual: TypeAlias = Callable[[Tensor], Tensor]
"""``y -> x_{i-1} - (y + Δ(i → i-1 | y))``, 0 where the step from y leads to x_{i-1}; one step's cost."""


class IterativeSolver(Solver):
    """A one-step method, whose step ``x_{i-1} = x_i + Δ(i → i-1 | x_i)`` is an equation for x_i.

    Sampling is the method's own. A state is one tensor, with no partner.
    """

    states: ClassVar[int] = 1
    iterative: ClassVar[bool] = True

    approximator: IntegrationApproximator

    @abstractmethod
    def solve(
        self, residual: Residual, after: Tensor, guess: Tensor
    ) -> tuple[Tensor, Convergence | None]:
        """x_i, from `after` = x_{i-1} and a first guess; and the outcome of an iteration."""

    @final
    def undo(self, run: Run, steps: Steps, pair: Pair) -> Pair:
        (_, x), levels = pair, run.grid.levels
        failed: list[tuple[float, float]] = []
        for k, shears, _ in steps:
            x, outcome = self._undo(run, k, shears, x)
            if outcome is not None:
                run.convergence.append(outcome)
                if not bool(outcome.converged.all()):
                    failed.append((float(outcome.residual.max()), levels[k]))
            run.reach(k, (None, x))
        if failed:
            worst, sigma = max(failed)
            warnings.warn(
                f"{len(failed)} of {len(run.convergence)} steps were not undone to the tolerance; the "
                f"worst is that from sigma = {sigma:.6g}, with a relative residual of {worst:.3g}: take "
                "shorter steps, more iterations, or a solver that is exact; see solution.convergence",
                InversionWarning,
                stacklevel=5,  # past the walk, the run, and `invert`
            )
        return None, x

    def _undo(
        self, run: Run, k: int, shears: tuple[Shear, ...], after: Tensor
    ) -> tuple[Tensor, Convergence | None]:
        sigma, target = run.grid.levels[k : k + 2]
        scale = self.approximator.scale
        # The state that the method is published in hardly changes from level to level.
        ratio = scale(target) / scale(sigma)

        def residual(y: Tensor) -> Tensor:
            return after - run.rest(shears[0], y, k).to(after.dtype)

        return self.solve(residual, after, after * (ratio if math.isfinite(ratio) else 1.0))

    @final
    def start(self, sigma: float, target: float) -> Shear:
        return self.approximator.start(sigma, target)

    @final
    def steps(self, grid: Grid) -> list[tuple[Shear, ...]]:
        return self.approximator.steps(grid)


@final
@dataclass(frozen=True, repr=False, eq=False)
class DDIMInversion(IterativeSolver):
    """DDIM inversion (Song et al. 2021, arXiv 2010.02502; Mokady et al. 2023, arXiv 2211.09794).

    The step from x_i is undone as if the noise there were that of the state x_{i-1} at hand,

        x_i ≈ x_{i-1} - Δ(i → i-1 | y),        y = x_{i-1} s(σ_{i-1}) / s(σ_i),

    which for `DDIM` evaluates the network at z_{i-1} and the level σ_i, as diffusers'
    `DDIMInverseScheduler` does. It errs by the order of the method's own local error at best, O(h²) a
    step, and never says so: sampling from what it returns does not lead back. The evaluations of a step
    are those of the method.

    Args:
        approximator: the one-step method; `DDIM` is what the literature calls by this name.

    Raises:
        TypeError: at construction, if `approximator` is not usable.
    """

    approximator: IntegrationApproximator = DDIM()

    def __post_init__(self) -> None:
        check_approximator(self, self.approximator)

    def solve(
        self, residual: Residual, after: Tensor, guess: Tensor
    ) -> tuple[Tensor, Convergence | None]:
        return guess + residual(guess), None


@final
@dataclass(frozen=True, repr=False, eq=False)
class ReverseStepInversion(Solver):
    """Each step undone by the method's own step back, ``x_i ≈ x_{i-1} + Δ(i-1 → i | x_{i-1})``.

    The same method integrates the flow up the grid. Over `EES25` that nearly leads back: a step there
    and back errs by O(h⁶), where another method of order p leaves O(h^{p+1}), or O(h^{p+2}) if p is
    even. Over `DDIM` it is the textbook DDIM inversion, with the noise at the state and the level where
    the step begins; `DDIMInversion` hands that state to the network with the level where it ends. The
    evaluations of a step are those of the method. From the level 0 up it is `HeunEDM`, as in `BDIA`.

    Args:
        approximator: the one-step method, down the grid and up.

    Raises:
        TypeError: at construction, if `approximator` is not usable.
    """

    approximator: IntegrationApproximator = EES25()

    states: ClassVar[int] = 1
    iterative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_approximator(self, self.approximator)

    def undo(self, run: Run, steps: Steps, pair: Pair) -> Pair:
        s = run.grid.levels
        back = ((k, (self.start(s[k + 1], s[k]),), False) for k, *_ in steps)
        return run.walk(back, pair)

    def start(self, sigma: float, target: float) -> Shear:
        return leaving(sigma, self.approximator).start(sigma, target)

    def steps(self, grid: Grid) -> list[tuple[Shear, ...]]:
        return self.approximator.steps(grid)


@final
@dataclass(frozen=True, repr=False, eq=False)
class FixedPointInversion(IterativeSolver):
    """Each step undone by iteration (AIDI, Pan et al., ICCV 2023, arXiv 2309.04907).

    ``x_i = x_{i-1} - Δ(i → i-1 | x_i)`` is iterated from the guess of `DDIMInversion`, with Anderson
    acceleration: the next iterate is the combination of the last ones whose residuals cancel best,
    found for each element of the batch on its own. The iteration contracts where the step is short
    enough for the network; nothing assures that it does. Of the iterates the one with the smallest
    residual is returned.

    ``solution.convergence`` has the outcome of every step, and an `InversionWarning` says where the
    tolerance was not reached. Every evaluation is counted: that of each iteration is a step's.

    Args:
        approximator: the one-step method that samples.
        tolerance: of the residual, ``|x_{i-1} - y - Δ(i → i-1 | y)| / |x_{i-1}|``, for each element of
            the batch. Below the precision of the dtype it cannot be reached.
        max_iterations: evaluations of a step at most.
        memory: how many earlier iterates Anderson acceleration combines; 0 is plain iteration.

    Raises:
        TypeError, ValueError: at construction, if an argument is not usable.
    """

    approximator: IntegrationApproximator
    tolerance: float = 1e-6
    max_iterations: int = 50
    memory: int = 2

    def __post_init__(self) -> None:
        check_approximator(self, self.approximator)
        object.__setattr__(self, "tolerance", number("tolerance", self.tolerance))
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, got {self.tolerance}")
        for name, least in (("max_iterations", 1), ("memory", 0)):
            value = getattr(self, name)
            if count(name, value) < least:
                raise ValueError(f"{name} must be an integer, {least} or more, got {value!r}")

    def solve(
        self, residual: Residual, after: Tensor, guess: Tensor
    ) -> tuple[Tensor, Convergence | None]:
        per_element = (-1, *[1] * (after.ndim - 1))
        size = _norms(after).clamp_min(torch.finfo(after.dtype).tiny)
        y, best, smallest = guess, guess, torch.full_like(size, math.inf)
        moves: list[tuple[Tensor, Tensor]] = []
        last: tuple[Tensor, Tensor] | None = None
        iterations = 0
        while True:
            f = residual(y)
            iterations += 1
            error = _norms(f) / size
            better = error < smallest
            best = torch.where(better.reshape(per_element), y, best)
            smallest = torch.where(better, error, smallest)
            # What has left the smallest residual a thousandfold behind does not come back.
            done = (smallest <= self.tolerance) | ~(error < 1e3 * smallest)
            if bool(done.all()) or iterations == self.max_iterations:
                break
            if last is not None and self.memory:
                moves = [*moves, (y - last[0], f - last[1])][-self.memory :]
            last = y, f
            y = torch.where(done.reshape(per_element), best, y + f - _extrapolation(moves, f))
        return best, Convergence(iterations, smallest, smallest <= self.tolerance)


def _extrapolation(moves: list[tuple[Tensor, Tensor]], f: Tensor) -> Tensor:
    """``Σ_j c_j (Δy_j + Δf_j)`` with the c of the smallest ``|f - Σ_j c_j Δf_j|``, for each element."""
    if not moves:
        return torch.zeros_like(f)
    wide = torch.promote_types(f.dtype, torch.float32)
    df = torch.stack([df.reshape(df.shape[0], -1) for _, df in moves], 1).to(wide)
    with torch.autocast(f.device.type, enabled=False):  # half precision would make it singular
        gram = df @ df.mT
        # A little of the largest diagonal element keeps the solution finite where moves are parallel.
        ridge = gram.diagonal(dim1=1, dim2=2).amax(1).mul(100 * torch.finfo(wide).eps)
        ridge = ridge.clamp_min(torch.finfo(wide).tiny)
        gram = gram + ridge[:, None, None] * torch.eye(len(moves), dtype=wide, device=f.device)
        c = torch.linalg.solve(gram, df @ f.to(wide).reshape(f.shape[0], -1, 1))
    c = c.squeeze(2).to(f.dtype)
    per_element = (-1, *[1] * (f.ndim - 1))
    terms = [c[:, j].reshape(per_element) * (y + f) for j, (y, f) in enumerate(moves)]
    return torch.stack(terms).sum(0)


def _norms(x: Tensor) -> Tensor:
    """The norm of each element of the batch, shape ``(B,)``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norms: Tensor = torch.linalg.vector_norm(wide.reshape(x.shape[0], -1), dim=1)
    return norms
