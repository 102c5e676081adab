"""Where a run stands on its grid, and what a run returns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arithmetic import SideInformation
from .grids import Grid


@dataclass(frozen=True, eq=False)
class State:
    """The pair of states of one run: all that is needed to go on in either direction.

    Of a two-step solver such as `BDIA` the two are neighbours on the grid: sampling continues from
    `current` and corrects with `partner`; inversion continues from `partner` and recovers what came
    before from `current`. Of a coupled solver such as `EDICT` both stand at the same level, and each
    step updates one with the help of the other. States are never modified.

    Attributes:
        current: the state at ``sigmas[index]``, shape ``(B, ...)``.
        partner: the state at ``sigmas[index - 1]``, or the companion of a coupled solver at
            ``sigmas[index]``; same shape and dtype. None where the run has one state only: the first
            of a two-step solver, and every state of a one-step method.
        index: where on the grid `current` stands.
        sigmas: all levels of the grid the run belongs to.
        solver: the `repr` of the solver that made it.
        side: what an exact arithmetic keeps beside the pair, which is then int64, see `FixedPoint`;
            None in floating point.
        coupled: whether `partner` stands at the level of `current`.
    """

    current: Tensor
    partner: Tensor | None
    index: int
    sigmas: tuple[float, ...]
    solver: str
    side: SideInformation | None = None
    coupled: bool = False

    def to(self, device: torch.device | str) -> State:
        """The same state with its tensors on `device`."""
        return replace(
            self,
            current=self.current.to(device),
            partner=None if self.partner is None else self.partner.to(device),
            side=None if self.side is None else self.side.map(lambda tensor: tensor.to(device)),
        )

    def fork(self) -> State:
        """The same pair as the beginning of a run of its own, to go on with other ``extra_args``.

        In floating point that is the state itself. In fixed point a state remembers the run that led to
        it, and refuses to be undone by another; its fork has no history.
        """
        if self.side is None or self.partner is None:
            return self
        return replace(self, side=self.side.fresh(self.current, self.partner, self.index))

    def check(self, grid: Grid, solver: str) -> None:
        """Refuse to go on with another grid or another solver than the state comes from.

        Raises:
            ValueError: naming the first difference.
        """
        if self.sigmas != grid.levels:
            pairs = zip(self.sigmas, grid.levels, strict=False)
            k = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
            raise ValueError(
                "the state comes from another grid: "
                + (
                    f"it has {len(self.sigmas)} levels, sigmas has {len(grid.levels)}"
                    if k is None
                    else f"level {k} is {self.sigmas[k]!r} there and {grid.levels[k]!r} in sigmas"
                )
                + "; pass the grid that made the state"
            )
        if self.solver != solver:
            raise ValueError(
                f"the state comes from another solver: it was made by {self.solver}, this is "
                f"{solver}; a step is undone only by the solver that took it"
            )
        first = 0 if self.partner is None or self.coupled else 1
        if not first <= self.index <= grid.steps:
            raise ValueError(f"index must be between {first} and {grid.steps}, got {self.index}")

    def save(self, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
        """Write the state to a safetensors file, from which `load` reads it back to the bit.

        Args:
            path: the file, conventionally ``*.safetensors``; replaced if it exists.
            notes: anything that JSON can hold, kept in the file for `odesolvers.storage.read`.

        Raises:
            ImportError: where safetensors is not installed.
            OSError: if the file cannot be written.
        """
        from .storage import write

        write(self, path, notes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
        """Read a state that `save` wrote, onto `device`.

        Raises:
            ImportError: where safetensors is not installed.
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a state, is damaged (its checksum disagrees), or is in
                another version of the format.
        """
        from .storage import read

        return read(path, device)[0]


@dataclass(frozen=True, eq=False)
class Convergence:
    """How an iteration that undid one step ended.

    Attributes:
        iterations: evaluations of the step.
        residual: what the smallest residual was, for each element of the batch, shape ``(B,)``.
        converged: whether that is within the tolerance, shape ``(B,)``.
    """

    iterations: int
    residual: Tensor
    converged: Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """What `sample` and `invert` return.

    Attributes:
        x: the state at the level where the run stopped, shape and dtype of the input.
        state: everything needed to continue, or to go back.
        nfe: denoiser evaluations spent.
        convergence: of each step that was undone by iteration, in the order of the run; see
            `FixedPointInversion`.
    """

    x: Tensor
    state: State
    nfe: int
    convergence: tuple[Convergence, ...] = ()


def check_pair(state: State) -> None:
    """Refuse a pair of tensors that cannot stand beside each other."""
    current, partner = state.current, state.partner
    if partner is not None and _form(partner) != _form(current):
        raise ValueError(
            f"the two states of a pair must agree, got {describe(partner)} and {describe(current)}"
        )


def _form(x: Tensor) -> tuple[torch.dtype, torch.Size, torch.device]:
    return x.dtype, x.shape, x.device


def describe(x: Tensor) -> str:
    """Dtype, shape and device in words."""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"
