"""Weights g_i and noise levels learned for a model: least squares over whole runs, both ways at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..approximators import Euler, IntegrationApproximator
from ..bdia import BDIA
from ..formula import Combination, Denoise, Shear
from ..gamma import DampedStepRatio, GammaRule, PerStep, StepRatio, as_rule, step_ratios
from ..grids import Grid, Sigmas
from ..progress import progress_bar
from ..propagation import largest_product
from ..run import Denoiser, Run
from ..values import row, widened
from .batch import Batch
from .least_squares import Effort, LeastSquares, Trial, Vector
from .objective import Objective, lengths, rows
from .rule import Calibrated, CalibrationReport
from .spacing import Spacing

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
_ROUGH: Final = 0.03
"""The width of differences between levels in float32: a network is rougher there than its rounding."""
_CARRIED: Final = 3
"""The number of rules, the best on the given grid, that other grids are tried with."""


def calibrate(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sigmas,
    *,
    levels: bool | Sigmas = False,
    base: IntegrationApproximator | None = None,
    objective: Objective | None = None,
    extra_args: Mapping[str, Any] | None = None,
    starts: Sequence[float | GammaRule] = (),
    reference_steps: int = 128,
    max_amplification: float = 1e5,
    max_runs: int | None = None,
    progress: bool = False,
) -> Calibrated:
    """Learns the weights g_i of `BDIA`, and the noise levels too, for a model from a batch of noise.

    In one line, ``solver = BDIA(Euler(), calibrate(denoiser, x, sigmas))``. With ``levels=True`` the
    rule brings its own grid: ``BDIA(Euler(), rule).sample(denoiser, x, rule.sigmas)``.

    A fine solution (`RK4`) of the batch says where sampling should end and where encoding should lead
    back to. The unknowns are then fitted over whole runs, both ways at once: a Levenberg-Marquardt
    iteration on log g_i, and on the logarithms of the ratios of steps, over the relative errors of all
    elements, reweighted for `objective`, with a Jacobian of differences that is kept up to date by
    Broyden's formula. It starts from the best of a list of rules, grids and the least squares of each
    step on its own, and ends no worse than it. No gradient of the denoiser is taken.

    Args:
        denoiser: see `Denoiser`; deterministic.
        x: noise at level ``sigmas[0]``, ``(B, ...)``. 8 to 32 states do; others than those that will
            be measured or used.
        sigmas: the grid to learn on; see `Calibrated` for others. Where the levels are learned, its
            ends and its number of steps, and a grid to start from.
        levels: whether to learn all levels but the two ends; or levels to choose from, such as all of
            a model's training levels, in any order.
        base: the approximator that `BDIA` will wrap; `Euler` by default.
        objective: what to make small; sampling and encoding alike by default.
        extra_args: keyword arguments for every call of the denoiser, of the batch.
        starts: rules to start from beside those it knows, such as the weights of another grid.
        reference_steps: steps of the fine solution, at least; four evaluations each.
        max_amplification: the most that an inversion may amplify an error by, in the
            variance-preserving state, see `StabilityReport`; or what `StepRatio(1)` amplifies by, if
            that is more. 1e5 leaves float32 a round trip to better than 1 %.
        max_runs: when to stop at the latest; a run samples and encodes the batch once. By default 80,
            or what n steps need: 2 n + 30; with levels 30 n + 60, at most 600. Fewer than n + 15, or
            2 n + 30, allow no more than a choice among what to start from.
        progress: show a progress bar (needs tqdm).

    Returns:
        A rule for `BDIA`, with a `CalibrationReport`.

    Raises:
        ValueError: if the grid has fewer than two steps, there are too few levels to choose from, or
            an argument is out of range.
        TypeError, FloatingPointError: as for `Solver.sample`; and if `x` is in half precision.
    """
    grid = Grid.of(sigmas)
    if grid.steps < 2:
        raise ValueError("calibration needs a grid of two steps or more: the first has no weight")
    free = levels is not False
    if max_runs is None:
        n = grid.steps
        max_runs = min(30 * n + 60, 600) if free else max(80, 2 * n + 30)
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
    base, objective = Euler() if base is None else base, objective or Objective()
    known = None if isinstance(levels, bool) else _row(levels)
    if known is not None:
        Spacing(grid).among(grid, known)  # refuses at once
    bar = progress_bar(total=max_runs, desc="calibrate", unit="run") if progress else None
    with nullcontext() if bar is None else bar:
        batch, effort = Batch(denoiser, x, grid, extra_args, reference_steps), Effort(max_runs, bar)

        def fit_on(grid: Grid, spacing: Spacing | None = None) -> _Fit:
            return _Fit(batch, grid, base, objective, max_amplification, effort, spacing)

        fit = fit_on(grid)
        before = fit.run(fit.unknowns(grid, np.log(step_ratios(grid))))
        rules = [as_rule(rule) for rule in (*starts, *_STARTS)]
        trials = fit.tried([*fit.of_rules(rules), fit.unknowns(grid, fit.step_by_step())])
        best = fit.improve(_least(trials), max_runs // 3 if free else max_runs)
        if free:
            ranked = sorted(zip(trials, rules, strict=False), key=lambda pair: pair[0].value)
            carried = [rule for _, rule in ranked[:_CARRIED]]
            spacing = Spacing(grid, batch.lowest)
            last = max_runs if known is None else max_runs - grid.steps - 15
            weights, fit = fit.read(best.at), fit_on(grid, spacing)
            on_grids = [fit.of_rules(carried, other) for other in (grid, *spacing.starts())]
            best = replace(best, at=fit.unknowns(*weights))
            if effort.runs < last:
                best = _with_levels(fit, fit.run(best.at), on_grids, last)
            if known is not None:
                chosen, log_g = fit.read(best.at)
                fit = fit_on(spacing.among(chosen, known))
                again = fit.tried([fit.unknowns(fit.grid, log_g), *fit.of_rules(carried)])
                best = fit.improve(_least(again), max_runs)
        learned, log_g = fit.read(best.at)
        alone = math.nan
        if objective.sampling:
            ends = batch.sampled(base, learned)
            alone = float(lengths(rows(ends - batch.target, batch.target)).log().mean().exp())
    pairs = {
        name: (before.errors.get(name, math.nan), best.errors.get(name, math.nan))
        for name in asdict(objective)
    }
    report = CalibrationReport(
        **pairs,
        base=alone,
        runs=effort.runs,
        evaluations=batch.evaluations,
        moves=effort.moves,
    )
    values = tuple(np.exp(log_g).tolist())
    return Calibrated(repr(base), learned.levels, values, report, free)


def _least(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.value)


def _with_levels(fit: _Fit, alone: Trial, starts: Sequence[Sequence[Vector]], last: int) -> Trial:
    """The best trial of a fit of weights and levels; errors above those of `alone` are dear.

    From the best rule of each of `starts`, the rules of one grid, and from `alone`, whose weights hold
    its levels fast: one after the other, each with two thirds of the runs left, until one halves the
    errors.
    """
    if len(alone.errors) > 1:
        fit.ceilings = alone.errors
        alone = fit.run(alone.at)
    tried = (_least(fit.tried(rules)) for rules in starts if fit.effort.runs < last)
    begun = sorted(tried, key=lambda trial: trial.value)
    found = [alone]
    for trial in (*begun[:1], alone, *begun[1:]):
        if not _least(found).value < alone.value - math.log(2):  # both may be infinite
            found.append(fit.improve(trial, last - (last - fit.effort.runs) // 3))
    return _least(found)


class _Fit(LeastSquares):
    """The least squares of one calibration.

    The unknowns are ``log(g_i / r_i)``, where r_i is the ratio of a step to the one before it, and
    those of `spacing`, if the levels are learned.
    """

    def __init__(
        self,
        batch: Batch,
        grid: Grid,
        base: IntegrationApproximator,
        objective: Objective,
        max_amplification: float,
        effort: Effort,
        spacing: Spacing | None,
    ) -> None:
        super().__init__(effort)
        if spacing is not None and batch.x.dtype == torch.float32:
            self.width = _ROUGH
        self.ceilings: Mapping[str, float] = {}
        self.batch, self.grid, self.base, self.spacing = batch, grid, base, spacing
        self.weights = {name: w for name, w in asdict(objective).items() if w}
        self.bound = math.log(max_amplification)

    def unknowns(self, grid: Grid, log_g: Vector) -> Vector:
        ratios = log_g - np.log(step_ratios(grid))
        return ratios if self.spacing is None else np.append(ratios, self.spacing.unknowns(grid))

    def read(self, at: Vector) -> tuple[Grid, Vector]:
        """The grid and the logarithms of the weights."""
        n = self.grid.steps
        grid = self.grid if self.spacing is None else self.spacing.grid(at[n - 1 :])
        return grid, at[: n - 1] + np.log(step_ratios(grid))

    def admissible(self, at: Vector) -> Vector:
        """Steps and weights within their ranges, and within the bound on what inversions amplify.

        Weights are drawn towards `StepRatio(1)` as far as the bound asks for.
        """
        grid, log_g = self.read(at)
        if self.spacing is not None:
            grid = self.spacing.grid(self.spacing.admissible(self.spacing.unknowns(grid)))
        limits = np.log([LOWEST, HIGHEST])
        neutral = np.clip(np.log(step_ratios(grid)), *limits)
        log_g = np.clip(log_g, *limits)
        s = np.sqrt(1 + np.array(grid.levels) ** 2)
        # The alternating error of x_i, over g_i, is that of x_{i+1}; both over sqrt(1 + σ²).
        scale = np.log(s[1:-1] / s[:-2])

        def amplification(log_g: Vector) -> float:
            return math.log(largest_product(np.exp(scale - log_g)[::-1].tolist()))

        def drawn(share: float) -> Vector:
            return np.asarray(neutral + share * (log_g - neutral))

        bound, low, high = max(self.bound, amplification(neutral)), 0.0, 1.0
        if amplification(log_g) > bound:
            for _ in range(30):  # bisection: the amplification is convex along the way
                middle = (low + high) / 2
                inside = amplification(drawn(middle)) <= bound
                low, high = (middle, high) if inside else (low, middle)
            log_g = drawn(low)
        return self.unknowns(grid, log_g)

    def trial(self, at: Vector) -> Trial:
        """Samples the batch and encodes where it should have ended."""
        grid, log_g = self.read(at)
        solver = BDIA(self.base, PerStep(np.exp(log_g).tolist()))
        errors = self.batch.errors(solver, grid, self.weights)
        if errors is None:
            return Trial.diverged(at)
        return Trial.of(at, errors, self.weights, self.ceilings)

    def of_rules(self, rules: Sequence[GammaRule], grid: Grid | None = None) -> list[Vector]:
        """The unknowns of `rules` on a grid, by default the fit's own."""
        grid = self.grid if grid is None else grid
        weights = [rule.checked_weights(grid, self.base.scale) for rule in rules]
        return [self.unknowns(grid, np.log(np.maximum(w, LOWEST))) for w in weights]

    @torch.no_grad()
    def step_by_step(self) -> Vector:
        """The log weights that bring each step nearest to the fine solution, given those before it.

        ``g_i = <x_{i+1} - B, x*_{i-1} - F> / |x_{i+1} - B|²``, one run down the grid.
        """
        s, log_g, current = self.grid.levels, [], self.batch.x
        older: Tensor | None = None
        extra = self.batch.extra_args
        run = Run(BDIA(self.base), self.batch.denoiser, current, self.grid, 0, extra)
        for k in range(self.grid.steps):
            if older is None:
                newer = run.rest(self.base.start(s[0], s[1]), current, k)
            else:
                ahead, behind = (
                    run.rest(Shear.of(self._toward(k, side)), current, k) for side in (0, 1)
                )
                missed, wanted = older - behind, self.batch.path[k + 1].to(ahead) - ahead
                best = float(widened(missed * wanted).sum() / widened(missed).square().sum())
                log_g.append(math.log(min(max(best, LOWEST), HIGHEST)))
                newer = ahead + math.exp(log_g[-1]) * missed
            older, current = current, newer
        self.batch.evaluations += run.nfe
        return np.array(log_g)

    def _toward(self, k: int, side: int) -> Callable[[Combination, Denoise], Combination]:
        """The state ahead (0) or behind (1) of step k, by the base alone, as a formula."""
        s, both = self.grid.levels, self.base.both_increments
        return lambda x, D: x + both(x, s[k], s[k + 1], s[k - 1], D)[side]


def _row(levels: Sigmas) -> list[float]:
    """Levels to choose from, in any order, as numbers."""
    if isinstance(levels, Grid):
        return list(levels.levels)
    found: list[float] = row("levels", levels, torch.float64).tolist()
    return found
