"""The quantity that a calibration minimises, and the errors that it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from ..values import number, widened

_SKETCH: Final = 4096
"""The most columns of a sketch."""


@final
@dataclass(frozen=True)
class Objective:
    """The quantity that `calibrate` minimises: the weighted mean of the logarithms of three errors.

    Each error is a distance over the root mean square of its target. Logarithms, so that neither the
    scale of the errors nor a few hard states decide.

    Attributes:
        sampling: weight of the distance of a sample to the fine solution, 0 or more.
        encoding: weight of the distance of the code of a lone image, the end of the fine solution, to
            the noise that it came from, 0 or more.
        consistency: weight of the distance of the code of the solver's own sample, known in 8 bits
            alone, to the noise that it came from, 0 or more: what detects a watermark in the noise.
            For models of pictures in [-1, 1]. Not all three are 0.
    """

    sampling: float = 1.0
    encoding: float = 1.0
    consistency: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            object.__setattr__(self, name, number(name, weight))
        weights = tuple(vars(self).values())
        if not (all(weight >= 0 for weight in weights) and 0 < sum(weights) < math.inf):
            found = ", ".join(f"{name} = {weight}" for name, weight in vars(self).items())
            raise ValueError(
                "an objective weighs sampling, encoding and consistency by numbers of 0 or more, not "
                f"all 0, got {found}"
            )


def eight_bits(x: Tensor) -> Tensor:
    """`x` in [-1, 1] as pictures of 8 bits have it, with rounding errors that do not depend on x.

    Uniform noise of half the distance of two values stands for them, always the same, so that
    differences of errors are smooth; values beyond the range are clipped.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
    return (x + noise.to(x) / 255).clamp(-1, 1)


def rows(error: Tensor, like: Tensor) -> Tensor:
    """Errors over the root mean square of what they are errors of: norm 1 is an error of 100 %."""
    size = widened(like).reshape(len(like), -1).norm(dim=1).square().mean().sqrt()
    rows: Tensor = (widened(error).reshape(len(error), -1) / size).cpu()
    return rows


def lengths(rows: Tensor) -> Tensor:
    """The norm of each row, with a floor: a state that is met exactly must not outweigh the others."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1).clamp_min(1e-7)
    return lengths


def sketch(rows: Tensor) -> Tensor:
    """Rows of at most `_SKETCH` columns with nearly the same lengths and angles.

    The count sketch of Charikar, Chen and Farach-Colton (2002): each column is added, with a random
    sign, to a random column of the sketch.
    """
    n = rows.shape[1]
    if n <= _SKETCH:
        return rows
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (n,), generator=generator).to(rows.dtype) * 2 - 1
    column = torch.randint(0, _SKETCH, (n,), generator=generator)
    return rows.new_zeros(len(rows), _SKETCH).index_add_(1, column, rows * sign)
