"""Every solver, against what the package computed before its core was rewritten.

`data/before.json` was written by this file at the version before. Samples and codes of the mixture are
held to 1e-12, evaluations to the number. What was changed since on purpose: `BDIA` over methods of two
stages had a second stage on each side, which is now ``HeunEDM("both")``, and `EDICT` was not the
published one.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import odesolvers
from odesolvers import FixedPoint, InversionWarning, karras_sigmas

from .problems import mixture, noise, relative_error

FILE = Path(__file__).parent / "data" / "before.json"
GRID = karras_sigmas(7, sigma_min=0.1, sigma_max=10.0, rho=4.0)

BASES = (
    "Euler()",
    "DDIM()",
    "FlowEuler()",
    "HeunEDM()",
    "Midpoint()",
    "RK3()",
    "RK4()",
    "DPMSolverPP2S()",
)
GAMMAS = ("1.0", "0.9", "StepRatio(1)", "StepRatio(2)", "DampedStepRatio()", "SmoothedOutput(1.0)")
INVERTIBLE = [
    *(f"BDIA({base}, {gamma}" for base in BASES for gamma in GAMMAS),
    "BDIA(Exponential(Midpoint()), StepRatio(1)",
    "BELM(",
    *(f"{name}({base}, 0.99" for name in ("McCallumFoster", "Rex") for base in BASES),
    "ReversibleHeun(",
]
ITERATIVE = ["DDIMInversion()", "DDIMInversion(HeunEDM())", "FixedPointInversion(Euler())"]


def made(text: str) -> Any:
    """The solver of that time."""
    for base in ("HeunEDM", "Midpoint", "DPMSolverPP2S"):
        text = text.replace(f"BDIA({base}()", f"BDIA({base}('both')")
    return odesolvers.parse(
        text.replace("Exponential(Midpoint())", "Exponential(Midpoint('both'))")
    )


def measure(text: str) -> dict[str, Any]:
    """A sample, the code of the lone sample, and the evaluations of both."""
    solver = made(text)
    x = noise(2, 3, sigma=10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InversionWarning)
        down = solver.sample(mixture(), x, GRID)
        found = {"sample": down.x.flatten().tolist(), "nfe": [down.nfe]}
        if text not in BASES:
            up = solver.invert(mixture(), down.x, GRID)
            back = solver.invert(mixture(), down.state, GRID)
            found |= {"code": up.x.flatten().tolist(), "nfe": [down.nfe, up.nfe, back.nfe]}
    return found


def closed(text: str, arithmetic: str = "") -> str:
    return text + (", " if arithmetic and not text.endswith("(") else "") + arithmetic + ")"


def texts() -> list[str]:
    return [*BASES, *map(closed, INVERTIBLE), *ITERATIVE]


@pytest.mark.parametrize("text", texts())
def test_samples_and_codes(text: str) -> None:
    before, after = json.loads(FILE.read_text())[text], measure(text)
    assert after["nfe"] == before["nfe"]
    for name in ("sample", "code"):
        if name in before:
            x, y = torch.tensor([after[name], before[name]], dtype=torch.float64)
            assert relative_error(x, y) < 1e-12


@pytest.mark.parametrize("text", INVERTIBLE)
def test_fixed_point(text: str) -> None:
    """The round trip is exact, and the sample that of floating point up to the fractions' rounding."""
    solver = made(closed(text, "arithmetic=FixedPoint()"))
    x = FixedPoint().snap(noise(2, 3, sigma=10.0))
    there = solver.sample(mixture(), x, GRID)
    assert torch.equal(solver.invert(mixture(), there.state, GRID).x, x)
    before = torch.tensor(json.loads(FILE.read_text())[closed(text)]["sample"], dtype=torch.float64)
    assert relative_error(there.x.flatten(), before) < 2e-3
