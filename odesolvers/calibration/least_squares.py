"""Levenberg-Marquardt without gradients, over the logarithms of the errors of whole runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .objective import lengths, sketch

Vector: TypeAlias = npt.NDArray[np.float64]

_ENOUGH: Final = 0.02
"""A gain in the objective, a logarithm, that is worth another run."""
_DEAR, _SOFT = 10.0, 0.03
"""The price of an error above its ceiling, and how far around it the price rises, a logarithm."""


@dataclass(frozen=True)
class Trial:
    """The objective at one vector of unknowns, and the errors that it is made of.

    Attributes:
        at: the unknowns.
        value: the objective; infinite if the run diverged.
        errors: the geometric mean over states of each kind of error.
        residual: all relative errors, sketched, ``(rows, columns)``; a row for each state and kind.
        importance: the weight of each row in the objective over its squared error.
    """

    at: Vector
    value: float
    errors: Mapping[str, float]
    residual: Tensor
    importance: Tensor

    @classmethod
    def of(
        cls,
        at: Vector,
        errors: Mapping[str, Tensor],
        weights: Mapping[str, float],
        ceilings: Mapping[str, float] = MappingProxyType({}),
    ) -> Trial:
        """The trial with these errors, see `rows`, of each kind that has a weight.

        What an error is above its ceiling, if it has one, counts `_DEAR` times as much.
        """
        sizes = {name: lengths(errors[name]) for name in weights}
        means = {name: float(size.log().mean()) for name, size in sizes.items()}
        total = sum(weights.values())
        value = sum(w * means[name] for name, w in weights.items()) / total
        for name, ceiling in ceilings.items():
            above, w = (means[name] - math.log(ceiling)) / _SOFT, weights[name]
            value += (_DEAR - 1) * w / total * _SOFT * float(np.logaddexp(0, above))
            price = 1 + (_DEAR - 1) * float(np.exp(-np.logaddexp(0, -above)))
            weights = {**weights, name: price * w}
        return cls(
            at,
            value,
            {name: math.exp(mean) for name, mean in means.items()},
            torch.cat([sketch(errors[name]) for name in weights]),
            torch.cat(
                [w / total / len(sizes[name]) / sizes[name].square() for name, w in weights.items()]
            ),
        )

    @classmethod
    def diverged(cls, at: Vector) -> Trial:
        """The trial of a run that ended with values that are not finite."""
        nothing = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        return cls(at, math.inf, {}, nothing, nothing)


@dataclass
class Effort:
    """The runs of a calibration, however many fits it is made of.

    Attributes:
        max_runs: the most runs to make.
        bar: a progress bar over them, or None.
        runs: how many were made.
        moves: how often a fit improved on its start.
    """

    max_runs: int
    bar: Any = None
    runs: int = 0
    moves: int = 0

    def count(self) -> None:
        """Counts one run."""
        self.runs += 1
        if self.bar is not None:
            self.bar.update()


class LeastSquares(ABC):
    """A fit of unknowns over whole runs, each of which costs as much as any other.

    Attributes:
        effort: the runs that may be made.
        width: by how much unknowns differ in a difference that stands for a derivative.
    """

    width = 1e-3

    def __init__(self, effort: Effort) -> None:
        self.effort = effort

    @abstractmethod
    def trial(self, at: Vector) -> Trial:
        """One run with the unknowns `at`."""

    @abstractmethod
    def admissible(self, at: Vector) -> Vector:
        """The unknowns nearest to `at` that are allowed."""

    def run(self, at: Vector) -> Trial:
        """`trial`, counted."""
        self.effort.count()
        return self.trial(at)

    def tried(self, starts: Iterable[Vector]) -> list[Trial]:
        """The trials of unknowns to start from, until the runs are spent; the first at least."""
        trials: list[Trial] = []
        for at in starts:
            if trials and self.effort.runs >= self.effort.max_runs:
                break
            trials.append(self.run(self.admissible(at)))
        return trials

    def improve(self, best: Trial, last: int) -> Trial:
        """Levenberg-Marquardt from `best`, until it stands still, or `last` runs are made in all."""
        jacobian: Tensor | None = None
        damping, fresh, stalls = 1e-2, False, 0
        while (
            self.effort.runs < last
            and stalls < 2
            and damping < 1e3
            and math.isfinite(best.value)
            and len(best.at)
        ):
            if jacobian is None:
                if self.effort.runs + len(best.at) >= last:
                    break
                jacobian, fresh = self._differences(best), True
            trial = self.run(self.admissible(best.at - _move(best, jacobian, damping)))
            gain = best.value - trial.value
            if gain > 0:
                moved = torch.from_numpy(trial.at - best.at)
                miss = trial.residual - best.residual - jacobian @ moved
                jacobian = jacobian + miss.unsqueeze(-1) * moved / moved.dot(moved)
                best, damping = trial, max(damping / 4, 1e-5)
                self.effort.moves += 1
            if gain > _ENOUGH:
                fresh, stalls = False, 0
            elif not fresh:
                jacobian = None  # Broyden's has worn out
            elif gain > 0:
                fresh, stalls = False, stalls + 1
            else:
                damping *= 6
        return best

    def _differences(self, best: Trial) -> Tensor:
        """``∂ residual / ∂ unknowns``, ``(rows, columns, unknowns)``, one run for each unknown."""
        h, columns = self.width, []
        for k in range(len(best.at)):
            nudged = best.at.copy()
            nudged[k] += h
            trial = self.run(nudged)
            finite = math.isfinite(trial.value)
            columns.append((trial.residual - best.residual) / h if finite else best.residual * 0)
        return torch.stack(columns, dim=-1)


def _move(best: Trial, jacobian: Tensor, damping: float) -> Vector:
    """The damped Gauss-Newton move, no unknown by more than 1."""
    weighted = jacobian * best.importance.reshape(-1, 1, 1)
    hessian = torch.einsum("rcp,rcq->pq", jacobian, weighted)
    gradient = torch.einsum("rc,rcp->p", best.residual, weighted)
    diagonal = hessian.diagonal()
    ridge = damping * torch.diag(diagonal + 1e-6 * diagonal.max() + 1e-30)
    move: Vector = torch.linalg.solve(hessian + ridge, gradient).clamp(-1, 1).numpy()
    return move
