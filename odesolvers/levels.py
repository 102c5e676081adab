"""The noise levels of a run as its denoiser is handed them."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .grids import level_dtype

Levels: TypeAlias = "tuple[float, ...]"
"""The noise levels of the states that one call of the denoiser is made at."""

_WRITTEN_OUT: Final = 2**22
"""Elements up to which each state of a batch has a number of its own in memory."""


def level_tensors(
    calls: tuple[Levels, ...], levels: npt.NDArray[np.float64], x: Tensor, dtype: torch.dtype
) -> dict[Levels, Tensor]:
    """For the levels of each of `calls` a tensor of as many times the batch of `x`, in one transfer.

    `levels` are those of all calls in one row, and `dtype` is that of the states. The tensors are views
    of one that is made for this run, whose version says whether any of them was written to.
    """
    n = x.shape[0]
    rows = torch.tensor(levels, dtype=level_dtype(dtype), device=x.device).unsqueeze(1)
    if n > 1:
        rows = rows.expand(-1, n)
    if len(levels) > len(calls):
        sizes = [n * len(call) for call in calls]
        return dict(zip(calls, torch.split(rows.flatten(), sizes), strict=True))
    # Of a batch of millions, as of points in a plane, they would outgrow the states.
    rows = rows.contiguous() if rows.numel() <= _WRITTEN_OUT else rows
    return dict(zip(calls, rows.unbind(), strict=True))
