"""Weights g_i learned for a model: least squares over whole runs, sampling and encoding together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..approximators import RK4, Euler, IntegrationApproximator
from ..bdia import BDIA
from ..formula import Combination, Denoise, Shear
from ..gamma import DampedStepRatio, GammaRule, PerStep, StepRatio, as_rule, step_ratios
from ..grids import Grid, Sigmas
from ..progress import progress_bar
from ..propagation import largest_product
from ..run import Denoiser, Run
from ..solver import Solver
from .objective import Objective, lengths, rows, sketch
from .rule import Calibrated, CalibrationReport

Vector = npt.NDArray[np.float64]

LOWEST, HIGHEST = 0.01, 2.0
"""The range of a learned weight."""
_STARTS: Final[tuple[GammaRule, ...]] = (
    StepRatio(1),
    StepRatio(1.5),
    StepRatio(2),
    *(DampedStepRatio(cutoff, power) for cutoff in (0.1, 0.3) for power in (1, 2, 3)),
    DampedStepRatio(),
    DampedStepRatio(1.0, 1),
)
_ENOUGH: Final = 0.02
"""A gain in the objective, a logarithm, that is worth another run."""


def calibrate(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sigmas,
    *,
    base: IntegrationApproximator | None = None,
    objective: Objective | None = None,
    extra_args: Mapping[str, Any] | None = None,
    starts: Sequence[float | GammaRule] = (),
    reference_steps: int = 128,
    max_amplification: float = 1e5,
    max_runs: int | None = None,
    progress: bool = False,
) -> Calibrated:
    """Learns the weights g_i of `BDIA` for a model from a small batch of noise.

    In one line, ``solver = BDIA(Euler(), calibrate(denoiser, x, sigmas))``.

    A fine solution (`RK4`) of the batch says where sampling should end and where encoding should lead
    back to. The weights are then fitted over whole runs, both ways at once: a Levenberg-Marquardt
    iteration on log g_i over the relative errors of all elements, reweighted for `objective`, with a
    Jacobian of differences that is kept up to date by Broyden's formula. It starts from the best of
    a list of rules and of the least squares of each step on its own, and ends no worse than it. No
    gradient of the denoiser is taken.

    Args:
        denoiser: see `Denoiser`; deterministic.
        x: noise at level ``sigmas[0]``, ``(B, ...)``. 8 to 32 states do; others than those that will
            be measured or used.
        sigmas: the grid to learn on; see `Calibrated` for others.
        base: the approximator that `BDIA` will wrap; `Euler` by default.
        objective: what to make small; sampling and encoding alike by default.
        extra_args: keyword arguments for every call of the denoiser, of the batch.
        starts: rules to start from beside those it knows, such as the weights of another grid.
        reference_steps: steps of the fine solution, at least; four evaluations each.
        max_amplification: the most that an inversion may amplify an error by, in the
            variance-preserving state, see `StabilityReport`; or what `StepRatio(1)` amplifies by, if
            that is more. 1e5 leaves float32 a round trip to better than 1 %.
        max_runs: when to stop at the latest; a run samples and encodes the batch once. By default 80,
            or what n steps need: 2 n + 30. Fewer than n + 15 allow no more than a choice among the
            rules to start from.
        progress: show a progress bar (needs tqdm).

    Returns:
        A rule for `BDIA`, with a `CalibrationReport`.

    Raises:
        ValueError: if the grid has fewer than two steps, or an argument is out of range.
        TypeError, FloatingPointError: as for `Solver.sample`; and if `x` is in half precision.
    """
    grid = Grid.of(sigmas)
    if grid.steps < 2:
        raise ValueError("calibration needs a grid of two steps or more: the first has no weight")
    max_runs = max(80, 2 * grid.steps + 30) if max_runs is None else max_runs
    if max_runs < 1 or reference_steps < 1 or not max_amplification >= 1:
        raise ValueError(
            "needs max_runs >= 1, reference_steps >= 1 and max_amplification >= 1, got "
            f"{max_runs}, {reference_steps} and {max_amplification}"
        )
    if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() < 4:
        raise TypeError(
            f"weights learnt on {x.dtype} states would be fitted to their rounding: pass x.float(), and "
            "wrap a network in half precision as odesolvers.models.InDtype(network, dtype)"
        )
    x = x.detach() if isinstance(x, Tensor) else x
    base = Euler() if base is None else base
    fit = _Fit(denoiser, x, grid, base, objective or Objective(), extra_args, max_amplification)
    with fit.bar(max_runs if progress else None):
        fit.solve_finely(reference_steps)
        before = fit.run(np.log(step_ratios(grid)))
        rules = [as_rule(rule) for rule in (*starts, *_STARTS)]
        weights = [rule.checked_weights(grid, base.scale) for rule in rules]
        logs = [np.log(np.maximum(w, LOWEST)) for w in weights]
        best = fit.best_of([*logs, fit.step_by_step()], max_runs)
        best = fit.improve(best, max_runs)
    alone = math.nan
    if fit.objective.sampling:
        alone = float(lengths(fit.sampled(base)).log().mean().exp())
    report = CalibrationReport(
        sampling=(before.sampling, best.sampling),
        encoding=(before.encoding, best.encoding),
        base=alone,
        runs=fit.runs,
        evaluations=fit.evaluations,
        moves=fit.moves,
    )
    values = tuple(float(g) for g in np.exp(best.log_g))
    return Calibrated(repr(base), grid.levels, values, report)


@dataclass(frozen=True)
class _Run:
    """The objective of one vector of weights, and its parts."""

    log_g: Vector
    value: float
    sampling: float
    encoding: float
    residual: Tensor
    """All relative errors, sketched, one row for each state and error: ``(rows, columns)``."""
    importance: Tensor
    """The weight of each row in the objective over its squared error."""


class _Fit:
    """The least squares of one calibration, and their cost so far."""

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        grid: Grid,
        base: IntegrationApproximator,
        objective: Objective,
        extra_args: Mapping[str, Any] | None,
        max_amplification: float,
    ) -> None:
        self.denoiser, self.x, self.grid, self.base = denoiser, x, grid, base
        self.objective, self.extra_args = objective, extra_args
        self.runs = self.evaluations = self.moves = 0
        self.neutral = np.clip(np.log(step_ratios(grid)), *np.log([LOWEST, HIGHEST]))
        s = np.sqrt(1 + np.array(grid.levels) ** 2)
        # The alternating error of x_i, over g_i, is that of x_{i+1}; both over sqrt(1 + σ²).
        self._log_scale = np.log(s[1:-1] / s[:-2])
        self.bound = max(math.log(max_amplification), self.log_amplification(self.neutral))
        self._progress: Any = None

    def bar(self, total: int | None) -> Any:
        """A context with a progress bar over the runs."""
        if total is None:
            return nullcontext()
        self._progress = progress_bar(total=total, desc="calibrate", unit="run")
        return self._progress

    def solve_finely(self, steps: int) -> None:
        """Computes the target of the batch by `RK4` on a refinement of the grid.

        A step to level 0 is refined down to the lowest level of the denoiser, where it has one.
        """
        each = max(1, math.ceil(steps / self.grid.steps))
        fine, lowest = [self.grid.levels[0]], float(getattr(self.denoiser, "sigma_min", 0.0))
        for sigma, target in self.grid.intervals():
            roots = np.linspace(sigma ** (1 / 7), target ** (1 / 7), each + 1)[1:]
            fine += [level for level in (roots[:-1] ** 7).tolist() if level >= lowest] + [target]
        path: dict[int, Tensor] = {}

        def keep(info: Mapping[str, Any]) -> None:
            if info["i"] % each == 0:
                path[info["i"] // each] = info["x"].cpu()

        solution = RK4().sample(
            self.denoiser, self.x, fine, extra_args=self.extra_args, callback=keep
        )
        self.evaluations += solution.nfe
        self.target = solution.x
        self._path = [*(path[k] for k in range(self.grid.steps)), solution.x.cpu()]

    @torch.no_grad()
    def step_by_step(self) -> Vector:
        """The weights that bring each step nearest to the fine solution, given those before it.

        ``g_i = <x_{i+1} - B, x*_{i-1} - F> / |x_{i+1} - B|²``, one run down the grid.
        """
        s, log_g, current = self.grid.levels, [], self.x.detach()
        older: Tensor | None = None
        run = Run(BDIA(self.base), self.denoiser, current, self.grid, 0, self.extra_args)
        for k in range(self.grid.steps):
            if older is None:
                newer = run.rest(self.base.start(s[0], s[1]), current, k)
            else:
                ahead, behind = (
                    run.rest(Shear.of(self._toward(k, side)), current, k) for side in (0, 1)
                )
                missed, wanted = older - behind, self._path[k + 1].to(ahead) - ahead
                best = float((missed * wanted).double().sum() / missed.double().square().sum())
                log_g.append(math.log(min(max(best, LOWEST), HIGHEST)))
                newer = ahead + math.exp(log_g[-1]) * missed
            older, current = current, newer
        self.evaluations += run.nfe
        return np.array(log_g)

    def _toward(self, k: int, side: int) -> Callable[[Combination, Denoise], Combination]:
        """The state ahead (0) or behind (1) of step k, by the base alone, as a formula."""
        s, both = self.grid.levels, self.base.both_increments
        return lambda x, D: x + both(x, s[k], s[k + 1], s[k - 1], D)[side]

    def log_amplification(self, log_g: Vector) -> float:
        """The largest sum of consecutive log 1/g_i going up, in variance-preserving units."""
        return math.log(largest_product(np.exp(self._log_scale - log_g)[::-1].tolist()))

    def admissible(self, log_g: Vector) -> Vector:
        """`log_g` within its range, drawn towards `StepRatio(1)` as far as the bound asks for."""
        log_g = np.clip(log_g, *np.log([LOWEST, HIGHEST]))
        if self.log_amplification(log_g) <= self.bound:
            return log_g
        low, high = 0.0, 1.0
        for _ in range(30):  # bisection: the amplification is convex along the way
            middle = (low + high) / 2
            inside = self.log_amplification(self._between(log_g, middle)) <= self.bound
            low, high = (middle, high) if inside else (low, middle)
        return self._between(log_g, low)

    def _between(self, log_g: Vector, share: float) -> Vector:
        return np.asarray(self.neutral + share * (log_g - self.neutral))

    def sampled(self, solver: Solver) -> Tensor:
        """Errors of the batch, sampled from its noise; see `rows`."""
        end = solver.sample(self.denoiser, self.x, self.grid, extra_args=self.extra_args)
        self.evaluations += end.nfe
        return rows(end.x - self.target, self.target)

    def encoded(self, solver: Solver) -> Tensor:
        """Errors of the codes of where the batch should have ended."""
        code = solver.invert(self.denoiser, self.target, self.grid, extra_args=self.extra_args)
        self.evaluations += code.nfe
        return rows(code.x - self.x, self.x)

    def run(self, log_g: Vector) -> _Run:
        """Sample the batch and encode where it should have ended."""
        solver = BDIA(self.base, PerStep(np.exp(log_g).tolist()))
        weights = {name: w for name, w in asdict(self.objective).items() if w}
        self.runs += 1
        if self._progress is not None:
            self._progress.update()
        errors: dict[str, Tensor] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights that amplify: that is measured here
                if "sampling" in weights:
                    errors["sampling"] = self.sampled(solver)
                if "encoding" in weights:
                    errors["encoding"] = self.encoded(solver)
        except FloatingPointError:
            nothing = torch.zeros(0, 0, dtype=torch.float64)
            return _Run(log_g, math.inf, math.inf, math.inf, nothing, nothing)
        sizes = {name: lengths(error) for name, error in errors.items()}
        means = {name: float(size.log().mean()) for name, size in sizes.items()}
        total = sum(weights.values())
        return _Run(
            log_g=log_g,
            value=sum(w * means[name] for name, w in weights.items()) / total,
            sampling=math.exp(means.get("sampling", math.nan)),
            encoding=math.exp(means.get("encoding", math.nan)),
            residual=torch.cat([sketch(error) for error in errors.values()]),
            importance=torch.cat(
                [w / total / len(sizes[name]) / sizes[name].square() for name, w in weights.items()]
            ),
        )

    def best_of(self, starts: Iterable[Vector], max_runs: int) -> _Run:
        """The best of the weights to start from, the first at least."""
        tried: list[_Run] = []
        for log_g in starts:
            if tried and self.runs >= max_runs:
                break
            tried.append(self.run(self.admissible(log_g)))
        return min(tried, key=lambda run: run.value)

    def improve(self, best: _Run, max_runs: int) -> _Run:
        """Levenberg-Marquardt from `best`, until it stands still or the runs are spent."""
        jacobian: Tensor | None = None
        damping, fresh, stalls = 1e-2, False, 0
        while self.runs < max_runs and stalls < 2 and damping < 1e3 and math.isfinite(best.value):
            if jacobian is None:
                if self.runs + len(best.log_g) >= max_runs:
                    break
                jacobian, fresh = self._differences(best), True
            trial = self.run(self.admissible(best.log_g - self._move(best, jacobian, damping)))
            gain = best.value - trial.value
            if gain > 0:
                moved = torch.from_numpy(trial.log_g - best.log_g)
                miss = trial.residual - best.residual - jacobian @ moved
                jacobian = jacobian + miss.unsqueeze(-1) * moved / moved.dot(moved)
                best, damping = trial, max(damping / 4, 1e-5)
                self.moves += 1
            if gain > _ENOUGH:
                fresh, stalls = False, 0
            elif not fresh:
                jacobian = None  # Broyden's has worn out
            elif gain > 0:
                fresh, stalls = False, stalls + 1
            else:
                damping *= 6
        return best

    def _differences(self, best: _Run) -> Tensor:
        """``∂ residual / ∂ log g``, ``(rows, columns, parameters)``, one run for each parameter."""
        h, columns = 1e-3, []
        for k in range(len(best.log_g)):
            nudged = best.log_g.copy()
            nudged[k] += h
            run = self.run(nudged)
            finite = math.isfinite(run.value)
            columns.append((run.residual - best.residual) / h if finite else best.residual * 0)
        return torch.stack(columns, dim=-1)

    @staticmethod
    def _move(best: _Run, jacobian: Tensor, damping: float) -> Vector:
        weighted = jacobian * best.importance.reshape(-1, 1, 1)
        hessian = torch.einsum("rcp,rcq->pq", jacobian, weighted)
        gradient = torch.einsum("rc,rcp->p", best.residual, weighted)
        diagonal = hessian.diagonal()
        ridge = damping * torch.diag(diagonal + 1e-6 * diagonal.max() + 1e-30)
        move: Vector = torch.linalg.solve(hessian + ridge, gradient).clamp(-1, 1).numpy()
        return move
