"""The noise levels of a run as its denoiser is handed them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import torch
from torch import Tensor

from .grids import level_dtype

if TYPE_CHECKING:
    from .route import Route

Levels: TypeAlias = "tuple[float, ...]"
"""The noise levels of the states that one call of the denoiser is made at."""

_WRITTEN_OUT: Final = 2**22
"""Elements up to which each state of a batch has a number of its own in memory."""


def level_tensors(route: Route, x: Tensor, dtype: torch.dtype) -> dict[Levels, Tensor]:
    """For the levels of each call of `route` a tensor of that many batches of `x`, in one transfer.

    `dtype` is that of the states. The tensors are views of one that is made for this run, whose version
    says whether any of them was written to.
    """
    n, calls, levels = x.shape[0], route.calls, route.levels
    rows = torch.tensor(levels, dtype=level_dtype(dtype), device=x.device).unsqueeze(1)
    if n > 1:
        rows = rows.expand(-1, n)
    if len(levels) > len(calls):
        sizes = [n * len(call) for call in calls]
        return dict(zip(calls, torch.split(rows.flatten(), sizes), strict=True))
    # Of a batch of millions, as of points in a plane, they would outgrow the states.
    rows = rows.contiguous() if rows.numel() <= _WRITTEN_OUT else rows
    return dict(zip(calls, rows.unbind(), strict=True))
