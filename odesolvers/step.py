"""What a solver hands to the loops: denoiser calls, and linear maps of a pair of states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .combination import HERE, NOTHING, STATE, Combination, Mean
from .levels import Levels


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser: at the state `point` (of earlier outputs alone), at level `sigma`."""

    point: Combination
    sigma: float

    @cached_property
    def here(self) -> bool:
        """Whether `point` is the state itself."""
        return self.point == HERE

    @cached_property
    def levels(self) -> Levels:
        """`sigma`, as the levels of one call."""
        return (self.sigma,)


class Blend(NamedTuple):
    """A state that is moved towards the mean of others: how much of it is kept, and how far it moves."""

    mean: Mean
    kept: float
    moved: float


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

    @cached_property
    def exchanges(self) -> bool:
        """Whether it does no more than put the pair in the other order."""
        return self.gain == 1.0 and self.rest == NOTHING

    @cached_property
    def only(self) -> Levels | None:
        """The levels of its only call, where that is at b and neither b nor the output is forgotten."""
        if len(self.evaluations) == 1 and self.evaluations[0].here and not self.forgets:
            return self.evaluations[0].levels
        return None

    @cached_property
    def blend(self) -> Blend | None:
        """The stage as ``(a, b) -> (b, gain a + (1 - gain) m)``, with the mean m of `rest`; or None.

        So is every stage that leaves the states alone where the denoiser returns just them.
        """
        mean = self.rest.mean_over(1.0 - self.gain) if self.gain else None
        return mean and Blend(mean, self.gain, 1.0 - self.gain)

    @cached_property
    def unblend(self) -> Blend | None:
        """The inverse of the stage in the same form: ``a = c / gain + (1 - 1 / gain) m``."""
        blend = self.blend
        return blend and Blend(blend.mean, 1.0 / self.gain, (self.gain - 1.0) / self.gain)

    @cached_property
    def rounds(self) -> tuple[tuple[int, ...], ...]:
        """The outputs, by number, that need nothing but outputs of earlier rounds; the first is 1."""
        depth = [0]
        for call in self.evaluations:
            depth.append(1 + max((depth[k] for k, _ in call.point), default=0))
        numbers = range(1, len(depth))
        return tuple(tuple(k for k in numbers if depth[k] == d) for d in range(1, max(depth) + 1))

    @cached_property
    def forgets(self) -> tuple[int, ...]:
        """The terms, of b and all outputs, that `rest` has not.

        A value that is not finite makes a state that is not finite, and so do all states after it,
        unless its coefficient is 0.
        """
        terms = range(STATE, len(self.evaluations) + 1)
        return () if self.exchanges else tuple(k for k in terms if self.rest[k] == 0.0)
