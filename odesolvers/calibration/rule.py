"""Weights and levels learned for a model: the rule that carries them, and its file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from reprlib import repr as short
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..gamma import GammaRule, step_ratios
from ..grids import Grid
from ..typed import hexadecimal, optional, parsed, read, whole
from ..values import count, printable_cause
from ..writing import read_regular, replacing

FORMAT: Final = "odesolvers calibration"
VERSION: Final = 2
"""Version 1 has neither the consistency error nor learned levels."""
_LONGEST: Final = 2**23
"""Bytes of the longest file; one of 1000 steps has 0.06 million."""
_BEYOND: Final = 4.0
_LARGEST: Final = 1e6


@final
@dataclass(frozen=True)
class CalibrationReport:
    """The outcome of a calibration. Errors are geometric means over its batch; NaN where not asked for.

    Attributes:
        sampling: (before, after): sampling error under `StepRatio(1)`, and as calibrated.
        encoding: (before, after): likewise for the encoding error.
        base: sampling error of the approximator alone on the same grid.
        runs: how often the batch was sampled and encoded.
        evaluations: denoiser calls spent, the fine solution among them.
        moves: how often the fit improved on its start; 0 is the best of the starts as it was.
        consistency: (before, after): likewise for the consistency error, see `Objective`.
    """

    sampling: tuple[float, float]
    encoding: tuple[float, float]
    base: float
    runs: int
    evaluations: int
    moves: int = 0
    consistency: tuple[float, float] = (math.nan, math.nan)

    def __str__(self) -> str:
        lines = [
            f"calibrated in {self.runs} runs, {self.evaluations} denoiser calls of the batch, "
            f"{self.moves} moves from the best start"
        ]
        for name in ("sampling", "encoding", "consistency"):
            before, after = getattr(self, name)
            if math.isfinite(after):
                lines.append(f"  {name} error {after:.2e}, {before:.2e} with StepRatio(1)")
        if math.isfinite(self.base):
            lines.append(f"  the approximator alone samples with {self.base:.2e}")
        return "\n".join(lines)


@final
@dataclass(frozen=True, repr=False, eq=False)
class Calibrated(GammaRule):
    """Weights that `calibrate` learned for one model, base and range of noise levels.

    The grid of the calibration, `sigmas`, uses them as they are, and so does a copy of it in float32.
    Another grid in the same range uses their ratio to the step ratio,

        ψ_k = (g_1 ... g_k) / (h_k / h_0),        g_i = (h_i / h_{i+1}) (ψ_i / ψ_{i+1})

    as a function of the level: ``log ψ`` is smoothed by (1/4, 1/2, 1/4), which removes what alternates
    from step to step and has no meaning on another grid; its ends are kept. It is interpolated linearly
    in log σ at the middle of each step, and its trend goes on below the lowest of them, to a quarter of
    that level. As steps shrink, g_i goes to 1, and a base of odd order gains its order.

    Where the levels were learned with the weights, `sigmas_in` gives them for other numbers of steps,
    and other levels in the same number, which the weights do not suit, are refused.

    Attributes:
        base: the `repr` of their approximator.
        levels: the grid of the calibration.
        values: g_i in x, one for every step but the first, in sampling order.
        report: the outcome of the calibration; not a setting of the rule.
        levels_learned: whether the levels were learned with the weights.
    """

    base: str
    levels: tuple[float, ...]
    values: tuple[float, ...]
    report: CalibrationReport | None = field(default=None, compare=False)
    levels_learned: bool = False

    def __post_init__(self) -> None:
        if len(self.values) != len(self.levels) - 2 or len(self.values) == 0:
            raise ValueError(
                f"a grid of {len(self.levels)} levels has {len(self.levels) - 2} weights, got "
                f"{len(self.values)}"
            )
        if not all(1 / _LARGEST <= g <= _LARGEST for g in self.values):
            raise ValueError(
                f"learnt weights lie between {1 / _LARGEST:g} and {_LARGEST:g}, got {self.values}"
            )
        Grid(self.levels)

    @property
    def sigmas(self) -> Tensor:
        """The grid of the calibration, float64 ``(n + 1,)`` on the CPU."""
        return torch.tensor(self.levels, dtype=torch.float64, device="cpu")

    def sigmas_in(self, steps: int) -> Tensor:
        """The grid of the calibration in another number of steps.

        ``σ^(1/7)`` at k / n is interpolated by a monotone cubic (Fritsch and Butland 1984): the steps
        of a longer grid change as smoothly as second-order solvers need.

        Args:
            steps: 1 or more; as many as the calibration has give `sigmas`.

        Returns:
            float64 tensor ``(steps + 1,)`` on the CPU, with the same ends.

        Raises:
            TypeError, ValueError: if `steps` is not a number of steps.
        """
        steps = count("steps", steps)
        if steps < 1:
            raise ValueError(f"a grid has 1 step or more, got steps = {steps}")
        if steps == len(self.levels) - 1:
            return self.sigmas
        levels = _resampled(np.array(self.levels) ** (1 / 7), steps) ** 7
        levels[0], levels[-1] = self.levels[0], self.levels[-1]
        return torch.from_numpy(levels)

    def _learned_on(self, grid: Grid) -> bool:
        """Whether `grid` is that of the calibration, or a copy of it in float32."""
        own, other = (np.array(levels, np.float32) for levels in (self.levels, grid.levels))
        return np.array_equal(own, other)

    def encoding_error(self, grid: Grid) -> float | None:
        if self.report is None or not self._learned_on(grid):
            return None
        measured = (self.report.encoding[1], self.report.consistency[1])
        return next(filter(math.isfinite, measured), None)

    def check_approximator(self, approximator: object) -> None:
        if repr(approximator) != self.base:
            raise ValueError(
                f"these weights were calibrated for {self.base}, this is {approximator!r}: calibrate "
                "again with base=..."
            )

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        del scale
        if self._learned_on(grid):
            return list(self.values)
        if self.levels_learned and len(grid.levels) == len(self.levels):
            raise ValueError(
                f"these weights were learned together with {len(self.levels)} noise levels of their "
                "own, and this grid of as many has others: pass rule.sigmas as the grid, or calibrate "
                "on this one"
            )
        own, levels = Grid(self.levels), grid.levels
        if not self.levels[0] / 2 <= levels[0] <= 2 * self.levels[0]:
            raise ValueError(
                f"these weights were calibrated on levels from {self.levels[0]:.6g} to "
                f"{self.levels[-1]:.6g}, this grid begins at {levels[0]:.6g}: calibrate on a grid of "
                "this range"
            )
        log_psi = np.cumsum([0.0, *np.log(self.values) - np.log(step_ratios(own))])
        inner = (log_psi[:-2] + 2 * log_psi[1:-1] + log_psi[2:]) / 4
        log_psi = np.concatenate([log_psi[:1], inner, log_psi[-1:]])
        known, wanted = -_log_middles(own), -_log_middles(grid)  # np.interp wants rising numbers
        beyond = np.clip(wanted - known[-1], 0.0, math.log(_BEYOND))
        trend = (log_psi[-1] - log_psi[-2]) / (known[-1] - known[-2])
        at = np.interp(wanted, known, log_psi) + trend * beyond
        return [
            r * math.exp(b - a) for r, (a, b) in zip(step_ratios(grid), pairwise(at), strict=True)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rule and its report to a JSON file, from which `load` reads it back to the bit."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "base": self.base,
            "levels": [sigma.hex() for sigma in self.levels],
            "values": [g.hex() for g in self.values],
            "report": None if self.report is None else _without_nan(asdict(self.report)),
            "levels_learned": self.levels_learned,
        }
        with replacing(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibrated:
        """Read a rule that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            OSError: if it is no regular file, or cannot be read.
            ValueError: if the file is not a calibration, is damaged, or is in another version of the
                format.
        """
        content, name = read_regular(path, _LONGEST + 1), os.fspath(path)
        try:
            if len(content) > _LONGEST:
                raise ValueError(f"it has more than {_LONGEST} bytes")
            found = parsed(content, dict)
            kind = {"format": found.get("format"), "version": found.get("version")}
            if kind["format"] != FORMAT:
                raise ValueError("it was not saved by Calibrated.save")
            if type(kind["version"]) is not int or not 1 <= kind["version"] <= VERSION:
                raise ValueError(
                    f"it is in version {kind['version']!r:.20} of the format, this odesolvers reads "
                    f"versions up to {VERSION}"
                )
            form = _FILE if kind["version"] == VERSION else _FIRST
            fields = read({k: v for k, v in found.items() if k not in kind}, form)
            report = fields.pop("report")
            return cls(**fields, report=None if report is None else CalibrationReport(**report))
        except ValueError as error:  # what came from a file may be of any length
            raise ValueError(
                f"{name} is not a calibration: {ascii(str(error))[1:-1]:.300}"
            ) from printable_cause(error)


def _measured(value: Any) -> float:
    """The form of an error in a report: a number, or null where it was not asked for."""
    if value is None or type(value) is float:
        return math.nan if value is None else value
    raise ValueError(f"must be a number or null, got {short(value)}")


_REPORT: Final = {
    "sampling": (_measured, _measured),
    "encoding": (_measured, _measured),
    "base": _measured,
    "runs": whole(0),
    "evaluations": whole(0),
    "moves": whole(0),
}
_FIRST: Final = {
    "base": str,
    "levels": [hexadecimal],
    "values": [hexadecimal],
    "report": optional(_REPORT),
}
_FILE: Final = {
    **_FIRST,
    "report": optional({**_REPORT, "consistency": (_measured, _measured)}),
    "levels_learned": bool,
}


def _without_nan(report: dict[str, Any]) -> dict[str, Any]:
    """The report with null for NaN, which JSON does not have."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return {name: plain(value) for name, value in report.items()}


def _log_middles(grid: Grid) -> npt.NDArray[np.float64]:
    middles: npt.NDArray[np.float64] = np.log(
        [(sigma + target) / 2 for sigma, target in grid.intervals()]
    )
    return middles


def _resampled(u: npt.NDArray[np.float64], steps: int) -> npt.NDArray[np.float64]:
    """`steps` + 1 values at even places of the monotone cubic through decreasing `u` at even places."""
    d = np.diff(u)
    slopes = np.concatenate([d[:1], 2 * d[:-1] * d[1:] / (d[:-1] + d[1:]), d[-1:]])
    if len(d) > 1:  # of the parabola through three points, within what is monotone
        ends = np.array([1.5 * d[0] - 0.5 * d[1], 1.5 * d[-1] - 0.5 * d[-2]])
        slopes[[0, -1]] = np.clip(ends, 3 * d[[0, -1]], 0.0)
    at = np.linspace(0, len(d), steps + 1)
    k = np.minimum(at.astype(int), len(d) - 1)
    t = at - k
    a, b, p, q = u[k], u[k + 1], slopes[k], slopes[k + 1]
    found: npt.NDArray[np.float64] = (
        (1 + 2 * t) * (1 - t) ** 2 * a + t * t * (3 - 2 * t) * b
    ) + t * (1 - t) * ((1 - t) * p - t * q)
    return found
