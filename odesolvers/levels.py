"""The noise levels of a run as its denoiser is handed them."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import Final, TypeAlias

import torch
from torch import Tensor

from .grids import level_dtype

Levels: TypeAlias = "tuple[float, ...]"
"""The noise levels of the states that one call of the denoiser is made at."""


_KEPT: Final = 2**16
"""Elements of level tensors that are kept from run to run, at most."""

_WRITTEN_OUT: Final = 2**22
"""Elements up to which each state of a batch has a number of its own in memory."""


def level_tensors(calls: tuple[Levels, ...], x: Tensor, dtype: torch.dtype) -> dict[Levels, Tensor]:
    """For the levels of each of `calls` a tensor of as many times the batch of `x`, in one transfer.

    `dtype` is that of the states. The tensors are views of one, whose version says whether any of them
    was written to. On the CPU they are kept for the next run, since making them takes as long as some
    steps; elsewhere they may belong to a stream, or to a graph that is being captured, and with
    gradients to whoever asks for those.
    """
    n = len(x)
    shared = x.device.type == "cpu" and type(x) is Tensor and n * len(calls) <= _KEPT
    if not shared or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return dict(zip(calls, _rows(calls, n, dtype, x.device), strict=True))
    rows = _kept(calls, n, dtype)
    if any(row._version for row in rows[:1]):  # by somebody who was handed it by an earlier run
        _kept.cache_clear()
        rows = _kept(calls, n, dtype)
    return dict(zip(calls, rows, strict=True))


def _rows(
    calls: tuple[Levels, ...], n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    flat = torch.tensor(list(chain.from_iterable(calls)), dtype=level_dtype(dtype)).to(device)
    rows = flat.unsqueeze(1).expand(-1, n)
    if len(flat) > len(calls):
        return torch.split(rows.flatten(), [n * len(levels) for levels in calls])
    # Of a batch of millions, as of points in a plane, they would outgrow the states.
    return (rows.contiguous() if rows.numel() <= _WRITTEN_OUT else rows).unbind()


@lru_cache(maxsize=64)
def _kept(calls: tuple[Levels, ...], n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _rows(calls, n, dtype, torch.device("cpu"))
