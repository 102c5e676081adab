"""How far the run of a scheduler is, and the check of the latents that it begins with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from ..state import State
from ..stepwise import Outputs
from ..trust import InversionWarning, StabilityWarning

NOISE: Final = (0.3, 3.0)
"""Bounds of the root mean square of latents that may be standard normal noise."""


@dataclass(frozen=True, eq=False)
class Place:
    """Progress of a run, before one evaluation of the network.

    Attributes:
        leg: the number of the leg on the route.
        call: the number of the evaluation.
        state: at the beginning of the leg.
        pair: the pair that the run began with, until the first leg is over; None without one.
        outputs: denoised states so far, see `Route.advance`.
        point: where the network is evaluated, in the dtype of the state.
        latents: the point as the pipeline has it.
        version: of `latents`, which a write to them changes.
    """

    leg: int
    call: int
    state: State
    pair: State | None
    outputs: Outputs
    point: Tensor
    latents: Tensor
    version: int


def warn_of_size(latents: Tensor) -> None:
    """Warns if the latents that a run down the grid begins with are too small or large for noise."""
    size = float(latents.float().square().mean().sqrt())
    if not NOISE[0] <= size <= NOISE[1]:
        warnings.warn(
            f"the run begins with latents of root mean square {size:.2g}, and noise has 1 under this "
            "scheduler at every first level: multiply standard normal noise by init_noise_sigma, 1, and "
            "by nothing else. Pipelines with a factor of their own are not supported",
            StabilityWarning,
            stacklevel=5,
        )


def warn_of_another_pair() -> None:
    """Warns that a run begins with other latents than those of the pair that the scheduler holds."""
    warnings.warn(
        "these latents are not of the pair that the scheduler holds: the run begins with them alone "
        "and does not retrace the one that made the pair; scheduler.start = None if that is meant",
        InversionWarning,
        stacklevel=6,
    )


def warn_of_added_noise() -> None:
    """Warns that the picture with which an inverted run begins gets noise."""
    warnings.warn(
        "noise is added to a picture under an inverted scheduler, whose runs begin with the picture "
        "itself: give its latents to a text-to-image pipeline, latents=..., and no picture to one of "
        "image to image or inpainting",
        InversionWarning,
        stacklevel=3,
    )
