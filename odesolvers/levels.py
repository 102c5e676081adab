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

    `levels` are those of all calls in one row, and `dtype` is that of the states. The tensors are parts
    of one that is made for this run; each has a version of its own, which tells whether it was written
    to.
    """
    if not calls:  # a pair that stands at both ends of the way already
        return {}
    n, one_each = x.shape[0], len(levels) == len(calls)
    flat = torch.tensor(levels, dtype=level_dtype(dtype), device=x.device)
    if n > 1:
        rows = flat.unsqueeze(1).expand(-1, n)
        if one_each and rows.numel() > _WRITTEN_OUT:
            # Of a batch of millions, as of points in a plane, they would outgrow the states.
            return dict(zip(calls, rows.unbind(), strict=True))
        flat = rows.flatten()
    if one_each:
        parts = torch.unsafe_split(flat, n)
    else:
        parts = torch.unsafe_split_with_sizes(flat, [n * len(call) for call in calls])
    return dict(zip(calls, parts, strict=True))
