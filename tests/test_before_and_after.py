"""Every solver, against what the package computed before its core was rewritten.

`data/before.json` was written by ``python -m tests.test_before_and_after`` on the version before. Samples and
codes of the mixture are held to 1e-12, evaluations to the number.
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
    "EDICT(0.93",
    *(f"{name}({base}, 0.99" for name in ("McCallumFoster", "Rex") for base in BASES),
    "ReversibleHeun(",
]
ITERATIVE = ["DDIMInversion()", "DDIMInversion(HeunEDM())", "FixedPointInversion(Euler())"]


def measure(text: str) -> dict[str, Any]:
    """A sample, the code of the lone sample, and the evaluations of both."""
    solver = eval(text, vars(odesolvers).copy())
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
    """The same to a few of its units; and the round trip to the bit."""
    before = json.loads(FILE.read_text())[closed(text, "arithmetic=FixedPoint()")]
    solver = eval(closed(text, "arithmetic=FixedPoint()"), vars(odesolvers).copy())
    x = FixedPoint().snap(noise(2, 3, sigma=10.0))
    there = solver.sample(mixture(), x, GRID)
    assert torch.equal(solver.invert(mixture(), there.state, GRID).x, x)
    y = torch.tensor(before["sample"], dtype=torch.float64)
    assert float((there.x.flatten() - y).abs().max()) < 2.0**-32


if __name__ == "__main__":
    exact = [closed(text, "arithmetic=FixedPoint()") for text in INVERTIBLE]
    found = {text: measure(text) for text in (*texts(), *exact)}
    FILE.write_text(json.dumps(found, indent=0) + "\n")
