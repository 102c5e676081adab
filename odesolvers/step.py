"""What a solver hands to the loops: denoiser calls, and one linear map of the states."""

from __future__ import annotations

from dataclasses import dataclass

from .combination import Combination


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser: at the state `point` (of earlier outputs alone), at level `sigma`."""

    point: Combination
    sigma: float


@dataclass(frozen=True)
class Step:
    """``newer = gain · older + rest``, all of one step and, read backwards, its inverse.

    `rest` combines the current state, which stands between `older` and `newer`, with the outputs
    of `evaluations`. Since it does not depend on `older`, the step is invertible wherever
    ``gain != 0``: ``older = (newer - rest) / gain``. A one-step method has ``gain = 0``.
    """

    evaluations: tuple[Evaluation, ...]
    rest: Combination
    gain: float = 0.0


def stages_of(step: Step | tuple[Step, ...]) -> tuple[Step, ...]:
    """The stages of a step, each a linear map of a pair; a `Step` alone is its own only stage."""
    return (step,) if isinstance(step, Step) else step
