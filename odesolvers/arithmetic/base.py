"""How a state is stored, and how a step is applied to it and undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..combination import Combination
from ..step import Step


class Arithmetic(ABC):
    """Applies ``newer = gain · older + rest`` and its inverse to tensors.

    `values` are what the terms of a `Combination` stand for: the current state and the outputs of
    the denoiser, in order. Results are in storage of their own.
    """

    @abstractmethod
    def combine(self, combination: Combination, values: Sequence[Tensor]) -> Tensor:
        """``Σ_k c_k values[k]``"""

    @abstractmethod
    def forward(self, step: Step, older: Tensor | None, values: Sequence[Tensor]) -> Tensor:
        """``gain · older + rest``; `older` is None where the gain is 0."""

    @abstractmethod
    def inverse(self, step: Step, newer: Tensor, values: Sequence[Tensor]) -> Tensor:
        """``(newer - rest) / gain``: the `older` that `forward` was given."""
