"""The representation of states, in which shears are applied and inverted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..grids import Grid
from ..settings import Settings
from .stack import SideInformation


class Arithmetic(Settings, ABC):
    """Computes ``gain · a + rest`` and its inverse on *stored* states.

    A stored state is a tensor in whatever form the arithmetic keeps; `rest` is a floating point tensor
    in storage that may be overwritten. States are never written to. Every method but the last two has
    the default of floating point: a stored state is the tensor itself, with nothing beside it.

    Attributes:
        exact: whether `inverse` undoes `forward` to the bit. Such an arithmetic hides values that are
            not finite, so runs check every denoiser output at once.
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

    def load(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The floating point tensor that the denoiser sees of a stored state."""
        del dtype
        return stored

    def open(self, state: Any, origin: int, dtype: torch.dtype) -> Any:
        """The working memory of a run from `state`, whose first pair stands at the index `origin`.

        `dtype` is that of the tensors that the denoiser sees. A run sets the attribute `sigma` of the
        memory, the level at hand, for messages.
        """
        del state, origin, dtype

    def close(
        self, memory: Any, current: Tensor, partner: Tensor | None, index: int
    ) -> SideInformation | None:
        """The side information of the pair at `index`, where a run ends."""
        del memory, current, partner, index
        return None

    @abstractmethod
    def forward(self, gain: float, a: Tensor | None, rest: Tensor, memory: Any) -> Tensor:
        """``gain · a + rest``; `a` is None at the start of a run that has one state only."""

    @abstractmethod
    def inverse(self, gain: float, c: Tensor, rest: Tensor, memory: Any) -> Tensor:
        """``(c - rest) / gain``, the `a` that `forward` was given."""
