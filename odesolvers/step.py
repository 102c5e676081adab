"""What a solver hands to the loop: denoiser calls, and linear maps of a pair of states."""

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

    @property
    def nearer_to_the_mean(self) -> bool:
        """From which end it is formed.

        ``1 - kept``, rounded to the precision of a state, would not know a small share from none.
        """
        return -0.5 < self.kept < 0.5


class Move(NamedTuple):
    """A stage that calls the denoiser once, at the state b, as two operations on tensors.

    The first makes a term of b and the output D, the second moves the other state, a, by it. So are all
    steps but the first of `BDIA` over methods of one evaluation, such as `DDIM`.

    Attributes:
        levels: the noise levels of the call.
        turned: whether b and D change places in what follows.
        adds: whether the term is a sum, ``b + weight · D``, and the new state ``a + share · term``. Else
            it is a mean, ``b + weight · (D - b)``.
        weight: see `adds`.
        back: whether, of a mean, the new state is ``term + share · (a - term)``; else it is
            ``a + share · (term - a)``.
        share: see `adds` and `back`.
    """

    levels: Levels
    turned: bool
    adds: bool
    weight: float
    back: bool
    share: float


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
    def move(self) -> Move | None:
        """The stage in two operations, where it is one of a state and of the output at it."""
        return self._move(self.blend, 1.0)

    @cached_property
    def unmove(self) -> Move | None:
        """Its inverse in two operations."""
        return self._move(self.unblend, -1.0)

    def _move(self, blend: Blend | None, sign: float) -> Move | None:
        if len(self.evaluations) != 1 or not self.evaluations[0].here or self.forgets:
            return None
        levels = self.evaluations[0].levels
        if blend is not None:
            ((k, weight),) = blend.mean.moves
            share = blend.kept if blend.nearer_to_the_mean else blend.moved
            return Move(levels, k == STATE, False, weight, blend.nearer_to_the_mean, share)
        sum_ = self.rest.factored
        if self.gain != 1.0 or sum_ is None:
            return None
        ((k, ratio),) = sum_.others
        return Move(levels, k == STATE, True, ratio, False, sign * sum_.factor)

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
