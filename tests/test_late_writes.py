"""A denoiser that writes to what an earlier call had or gave: the right result, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    BELM,
    EDICT,
    RK4,
    Euler,
    FixedPoint,
    HeunEDM,
    McCallumFoster,
    ReversibleHeun,
    Rex,
    karras_sigmas,
)
from odesolvers.extend import Solver

from .problems import mixture, noise

SOLVERS: list[Solver] = [
    Euler(),
    RK4(),
    BDIA(Euler()),
    BDIA(HeunEDM()),
    BDIA(Euler(), 1.0, FixedPoint()),
    BDIA(RK4(), 1.0, FixedPoint()),
    BELM(),
    EDICT(),
    McCallumFoster(HeunEDM()),
    ReversibleHeun(),
    Rex(RK4()),
]
GRID = karras_sigmas(7, 0.1, 10.0, append_zero=False)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kept", ["input", "output"])
@pytest.mark.parametrize("calls_ago", [1, 2])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_late_writes_are_harmless_or_refused(
    solver: Solver, calls_ago: int, kept: str, inference: bool
) -> None:
    x, refused = noise(2, 3, sigma=10.0), False
    there = solver.sample(mixture(), x, GRID)
    ways = [(solver.sample, x)]
    if solver.states == 2:
        ways.append((solver.invert, there.state))  # type: ignore[arg-type]
    for run, start in ways:
        held: list[Tensor] = []

        def denoiser(x: Tensor, sigma: Tensor, /, held: Any = held, **_: Any) -> Tensor:
            found = mixture()(x, sigma)
            if len(held) >= calls_ago:
                held[-calls_ago].mul_(1.01)
            held.append(x if kept == "input" else found)
            return found

        right = run(mixture(), start, GRID).x
        try:
            with torch.inference_mode(inference):
                found = run(denoiser, start, GRID).x
        except ValueError as error:
            refused = True
            assert f"wrote to an earlier {kept}" in str(error)  # noqa: PT017
        else:
            assert torch.equal(found, right)
    if calls_ago == 1 and kept == "input" and solver.states == 2 and not solver.arithmetic.exact:
        assert refused or isinstance(solver, ReversibleHeun)
