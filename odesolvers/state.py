"""The pair of states that runs start from and return."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import files
from .arithmetic import SideInformation
from .checks import check_is, describe, refuse_pair
from .grids import Grid
from .values import count, shown


@dataclass(frozen=True, eq=False)
class State:
    """The pair of states of a run: all that is needed to go on in either direction. Never modified.

    Attributes:
        current: the state at ``sigmas[index]``, shape ``(B, ...)``.
        partner: the state at ``sigmas[index - 1]`` in a two-step solver such as `BDIA`; the companion at
            ``sigmas[index]`` in a coupled one such as `EDICT`; same shape and dtype. None for a single
            state: the first of a two-step solver, and every state of a one-step method.
        index: the place of `current` on the grid.
        sigmas: all levels of the grid.
        solver: the `repr` of the solver of the run.
        side: the side information of an exact arithmetic, whose pair is int64, see `FixedPoint`.
        coupled: whether `partner` stands at the level of `current`.

    Raises:
        TypeError, ValueError: at construction, if the tensors, the grid and the index do not fit.
    """

    current: Tensor
    partner: Tensor | None
    index: int
    sigmas: tuple[float, ...]
    solver: str
    side: SideInformation | None = None
    coupled: bool = False

    def __post_init__(self) -> None:
        grid = self.sigmas if isinstance(self.sigmas, Grid) else Grid(self.sigmas)
        object.__setattr__(self, "sigmas", grid.levels)
        object.__setattr__(self, "index", count("index", self.index))
        check_is(self.solver, str, "solver must be the repr of a solver, such as 'BDIA(Euler())'")
        check_is(self.coupled, bool, "coupled must be True or False")
        check_is(self.side, SideInformation | None, "side must be SideInformation or None")
        first = 0 if self.partner is None or self.coupled else 1
        if not first <= self.index < len(grid.levels):
            end = len(grid.levels) - 1
            raise ValueError(f"index must be between {first} and {end}, got {self.index!r}")
        a, b = self.current, self.partner
        if not isinstance(a, Tensor) or (
            b is not None and (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device)
        ):
            refuse_pair(a, b)

    def to(self, device: torch.device | str) -> State:
        """The same state with its tensors on `device`."""
        side = None if self.side is None else self.side.map(lambda tensor: tensor.to(device))
        return self._each(lambda x: x.to(device), side)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> State:
        """The states of elements of the batch: ``state[2:4]``, ``state[[0, 5]]``, ``state[mask]``."""
        pick = self.current[rows] if isinstance(rows, slice | list | Tensor) else None
        if pick is None or pick.ndim != self.current.ndim or not pick.numel():
            raise IndexError(
                f"a state is indexed along its batch of {len(self.current)}, and keeps the batch: "
                f"state[2:4], state[[0, 5]] or state[mask], got {rows!r}"
            )
        side = None if self.side is None else self.side.of_rows(rows, self.current.shape)
        return self._each(lambda x: x[rows], side)

    def _each(self, change: Callable[[Tensor], Tensor], side: SideInformation | None) -> State:
        partner = None if self.partner is None else change(self.partner)
        return replace(self, current=change(self.current), partner=partner, side=side)

    def __repr__(self) -> str:
        pair = "" if self.partner is None else "two of "
        place = f"level {self.index} of {len(self.sigmas) - 1}"
        return f"State({pair}{describe(self.current)}, {place}, {shown(self.solver, 80)})"

    def fork(self) -> State:
        """The same pair as the start of a new run, to continue with other ``extra_args``.

        In floating point that is the state itself. A fixed-point state remembers the run that led to it
        and refuses to be undone by another one; its fork has no history.
        """
        if self.side is None or self.partner is None:
            return self
        return replace(self, side=self.side.fresh(self.current, self.partner, self.index))

    def save(self, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
        """Writes a safetensors file, from which `load` reads the state back to the bit.

        Args:
            path: the file, conventionally ``*.safetensors``; replaced whole if it exists.
            notes: anything that JSON can hold, for `load_with_notes`.

        Raises:
            ImportError: if safetensors is not installed.
            OSError: if the file cannot be written, or `path` is no regular file.
        """
        files.write_state(path, vars(self), notes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
        """Reads a state that `save` wrote, onto `device`.

        Raises:
            ImportError: if safetensors is not installed.
            FileNotFoundError: if there is no such file.
            OSError: if it is no regular file, or cannot be read.
            ValueError: if the file is not a state, is damaged (its checksum disagrees), or is in
                another version of the format. No file leads to another error, or runs code.
        """
        return cls.load_with_notes(path, device)[0]

    @classmethod
    def load_with_notes(
        cls, path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> tuple[State, dict[str, Any]]:
        """`load`, and the notes that were saved with the state."""
        state, notes = files.read_state(path, cls)
        return state.to(device), notes


@dataclass(frozen=True, eq=False)
class Convergence:
    """The outcome of an iteration that undid one step.

    Attributes:
        iterations: evaluations of the step.
        residual: the smallest residual, for each element of the batch, shape ``(B,)``.
        converged: whether that is within the tolerance, shape ``(B,)``.
    """

    iterations: int
    residual: Tensor
    converged: Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of `sample` and `invert`.

    Attributes:
        x: the state at the level where the run stopped, shape and dtype of the input.
        state: everything needed to continue, or to go back.
        nfe: denoiser evaluations spent.
        convergence: for each step that was undone by iteration, in the order of the run; see
            `FixedPointInversion`.
    """

    x: Tensor
    state: State
    nfe: int
    convergence: tuple[Convergence, ...] = ()

    def __repr__(self) -> str:
        return f"Solution(x={describe(self.x)}, state={self.state}, nfe={self.nfe})"
