"""A small problem whose flow is known, and rows of the suite that are measured on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from benchmarks.common import Problem, Reference
from benchmarks.suite import run as suite_run
from benchmarks.suite.peers import Sample, Sampler
from benchmarks.suite.rows import Row
from benchmarks.suite.solvers import plain
from odesolvers import Denoiser

from .problems import gaussian


def tiny(**changes: Any) -> Problem:
    problem = Problem("tiny", lambda device: gaussian(), (5,), 4, fine=400, version=0)
    return replace(problem, **changes)


def measure(solver: Sampler, problem: Problem | None = None, budget: int = 12) -> Row:
    problem = problem or tiny()
    x = problem.noise(0)
    truth = Reference(x, gaussian().flow(x, 80.0, 0.02), 0.0)
    run = suite_run.Run(problem, plain("solver", "test", solver), budget, 0)
    return suite_run.measure(run, truth, None)


@dataclass(frozen=True)
class Lost:
    """Leaves the numbers, with an error or without."""

    error: type[Exception] | None

    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Sample:
        if self.error is not None and len(x) > 2:  # the count of evaluations goes well
            raise self.error
        for sigma in sigmas[:-1]:
            denoiser(x, sigma.expand(len(x)))
        return Sample(x * math.nan)
