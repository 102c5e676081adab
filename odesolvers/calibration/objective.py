"""The quantity that a calibration minimises, and the errors that it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from ..values import number

_SKETCH: Final = 4096
"""The most columns of a sketch."""


@final
@dataclass(frozen=True)
class Objective:
    """The quantity that `calibrate` minimises: ``sampling · log e_s + encoding · log e_c``, on average.

    e_s is the distance of a sample to the fine solution, e_c that of the code of a lone image to the
    noise it came from, each relative to the root mean square of what it should be. Logarithms, so
    that neither the scale of the two errors nor a few hard states decide.

    Attributes:
        sampling: weight of the sampling error, 0 or more.
        encoding: weight of the encoding error, 0 or more; not both 0.
    """

    sampling: float = 1.0
    encoding: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            object.__setattr__(self, name, number(name, weight))
        total = self.sampling + self.encoding
        if not (self.sampling >= 0 and self.encoding >= 0 and 0 < total < math.inf):
            raise ValueError(
                "an objective weighs sampling and encoding by numbers of 0 or more, not both 0, got "
                f"sampling = {self.sampling}, encoding = {self.encoding}"
            )


def rows(error: Tensor, like: Tensor) -> Tensor:
    """Errors over the root mean square of what they are errors of: norm 1 is an error of 100 %."""
    size = like.double().reshape(len(like), -1).norm(dim=1).square().mean().sqrt()
    rows: Tensor = (error.double().reshape(len(error), -1) / size).cpu()
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
