"""What a solver hands to the loops: denoiser calls, and linear maps of a pair of states."""

from __future__ import annotations

from dataclasses import dataclass

from .combination import NOTHING, Combination


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser: at the state `point` (of earlier outputs alone), at level `sigma`."""

    point: Combination
    sigma: float


@dataclass(frozen=True)
class Step:
    """A shear of a pair of states, ``(a, b) -> (b, gain · a + rest(b))``, and so its own inverse.

    `rest` combines b, the state that the shear leaves as it is, with the outputs of `evaluations`.
    Since it does not depend on a, the shear is invertible wherever ``gain != 0``:
    ``(b, c) -> ((c - rest(b)) / gain, b)``. A one-step method has ``gain = 0``.

    The step of a two-step solver is one of them, with the states at three levels in turn: ``a`` is the
    older state, b the current one and c the newer. That of a coupled solver is several stages, on two
    states that leave one level together and arrive at the next together.
    """

    evaluations: tuple[Evaluation, ...]
    rest: Combination
    gain: float = 0.0

    @property
    def exchanges(self) -> bool:
        """Whether it does no more than put the pair in the other order."""
        return self.gain == 1.0 and self.rest == NOTHING
