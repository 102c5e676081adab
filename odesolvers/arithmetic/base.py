"""How a state is stored, and how a step is applied to it and undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..combination import Combination
from ..grids import Grid
from ..step import Step
from .stack import SideInformation, Stack


class Arithmetic(ABC):
    """Applies ``newer = gain · older + rest``, a stage of a step, and its inverse to tensors.

    `older` and `newer` are *stored* states, in whatever form the arithmetic keeps them; `values` are
    what the terms of a `Combination` stand for, floating point tensors all: the current state and
    the outputs of the denoiser, in order. They are not written to. Results are in storage of their
    own, or in `out` where that is given: it may be `older` or `newer` itself, which are not needed any
    more then. `scratch` is storage to work in, in the form of the values.

    Every method but the last three has a default, which is that of floating point: a stored state
    is the tensor itself and nothing is kept beside it.
    """

    @property
    def check_determinism(self) -> bool:
        """Whether a run evaluates its first stage twice and compares the outputs to the bit."""
        return False

    @property
    def exact(self) -> bool:
        """Whether `inverse` undoes `forward` to the bit."""
        return False

    @property
    def keeps_nan(self) -> bool:
        """Whether what is not finite in a state or a value stays so in the states made of it."""
        return True

    def check(self, grid: Grid) -> None:
        """Refuse a grid that the arithmetic cannot represent, with a ValueError."""
        del grid

    def weight(self, g: float) -> float:
        """The weight nearest to `g` that the arithmetic can multiply a state by and undo."""
        return g

    def store(self, x: Tensor) -> Tensor:
        """The floating point tensor `x` in stored form."""
        return x

    def load(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """What the denoiser is shown of a stored state: a tensor of `dtype`."""
        del dtype
        return stored

    def open(
        self, current: Tensor, partner: Tensor | None, side: SideInformation | None, origin: int
    ) -> Stack | None:
        """The working memory of a run that goes on from a stored pair, or starts from one state.

        `origin` is the index of the first pair that the run will hold, see `State.index`.
        """
        del current, partner, side, origin
        return None

    def close(
        self,
        stack: Stack | None,
        current: Tensor,
        partner: Tensor | None,
        index: int,
        dtype: torch.dtype,
    ) -> SideInformation | None:
        """What the state at `index`, where the run ends, must carry beside its pair."""
        del stack, current, partner, index, dtype
        return None

    @abstractmethod
    def combine(
        self, combination: Combination, values: Sequence[Tensor], out: Tensor | None = None
    ) -> Tensor:
        """``Σ_k c_k values[k]``"""

    @abstractmethod
    def forward(
        self,
        step: Step,
        older: Tensor | None,
        values: Sequence[Tensor],
        stack: Stack | None,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Tensor:
        """``gain · older + rest``; `older` is None where a run has one state only."""

    @abstractmethod
    def inverse(
        self,
        step: Step,
        newer: Tensor,
        values: Sequence[Tensor],
        stack: Stack | None,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Tensor:
        """``(newer - rest) / gain``: the `older` that `forward` was given."""
