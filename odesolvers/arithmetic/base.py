"""The representation of states, in which shears are applied and inverted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_is
from ..grids import Grid
from ..settings import Settings
from .stack import SideInformation


class Arithmetic(Settings, ABC):
    """Computes ``gain · a + rest`` and its inverse on *stored* states, which are never written to.

    `forward` and `inverse` are enough where a stored state is the floating point tensor itself. An
    arithmetic that is `exact` may store something else, and keeps a memory for each run: `check`,
    `store`, `load`, `open` and `close` are called of such alone.

    Attributes:
        exact: whether `inverse` undoes `forward` to the bit.
        check_determinism: whether a run evaluates its first shear twice and compares the outputs.
    """

    exact: ClassVar[bool] = False
    check_determinism: bool = False

    def check(self, grid: Grid) -> None:
        """Raises a ValueError for a grid that the arithmetic cannot represent."""
        del grid

    def weight(self, g: float) -> float:
        """The weight nearest to `g` by which the arithmetic can multiply and divide a state."""
        return g

    def store(self, x: Tensor) -> Tensor:
        """The stored form of a floating point tensor."""
        return x

    def open(self, state: Any, origin: int, dtype: torch.dtype) -> Any:
        """The working memory of a run from a stored `state`.

        `origin` is the index of the first pair of the run, `dtype` that of what the denoiser sees. The
        run sets the attribute `sigma` of the memory, the level at hand, for messages, and keeps a
        `copy.copy` of it from the end of each step, from which an interrupted run goes on.
        """
        del state, origin, dtype

    def load(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The floating point tensor of a stored state."""
        del dtype
        return stored

    def close(
        self, memory: Any, current: Tensor, partner: Tensor | None, index: int
    ) -> SideInformation:
        """The side information of the pair at `index`, where a run ends."""
        del memory, current, partner, index
        raise NotImplementedError(
            f"{self} is exact, and must return the side information of a pair"
        )

    @abstractmethod
    def forward(self, gain: float, a: Tensor | None, rest: Tensor, memory: Any) -> Tensor:
        """``gain · a + rest``, which may overwrite `rest`; `a` is None for a single state."""

    @abstractmethod
    def inverse(self, gain: float, c: Tensor, rest: Tensor, memory: Any) -> Tensor:
        """``(c - rest) / gain``, the `a` that `forward` was given."""


def check_arithmetic(arithmetic: object) -> None:
    """An instance of `Arithmetic`, or a TypeError."""
    check_is(arithmetic, Arithmetic, "arithmetic must be an instance such as FloatingPoint()")
