"""A check of what a network predicts, by its answer to noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from odesolvers.grids import Grid, Sigmas, level_dtype

from .flow import FlowDenoiser
from .formulas import vp_output
from .wrappers import CosineDenoiser, DiscreteDenoiser, VPDenoiser


class PredictionWarning(UserWarning):
    """A network does not answer noise as a network of its declared prediction does."""


@torch.no_grad()
def check_prediction(
    denoiser: DiscreteDenoiser | VPDenoiser | CosineDenoiser | FlowDenoiser,
    x: Tensor,
    sigmas: Sigmas,
    *,
    extra_args: Mapping[str, Any] | None = None,
) -> None:
    """Warns if the network of `denoiser` looks as if it predicts something else than declared.

    Call it once, with what `sample` gets. At the first level a trained network sees noise alone: one of
    "epsilon" returns that noise, one of "score" minus it, and one of "v_prediction" or "sample" next to
    none of it. These two are told apart at `sigma_min`, around what it returned before: there "sample"
    returns its input at most, and "v_prediction" the noise, which is 1 / σ times greater, or, of data
    without structure, a share that grows with σ. A flow network returns the noise at its first level;
    whether it counts time the other way shows at t = 1/2, if the data are not larger than the noise.
    Where the answer is not clear, as of data that are white noise themselves, nothing is said. A network
    that is not trained may get any answer.

    Costs two to six evaluations, and on a GPU synchronisations.

    Args:
        denoiser: made by one of the classes named.
        x: noise at the first level, as of `init_noise`, ``(B, ...)``. The more elements, the surer.
        sigmas: the grid; its first level must be at least 4.
        extra_args: the conditions of the network.

    Raises:
        TypeError: if `denoiser` is of another class, whose networks have no such choice.
        ValueError: if the grid starts below 4, where states are not noise.

    Warns:
        PredictionWarning: naming what is declared, what is likely, and the figure it is judged by.
    """
    sigma = Grid.of(sigmas).levels[0]
    if sigma < 4:
        raise ValueError(f"the first level must be at least 4 to be called noise, got {sigma:.6g}")
    noise = x / math.hypot(1, sigma)
    if isinstance(denoiser, FlowDenoiser):
        _check_flow(denoiser, noise, sigma, extra_args or {})
        return
    if not isinstance(denoiser, DiscreteDenoiser | VPDenoiser | CosineDenoiser):
        raise TypeError(
            "denoiser must be a DiscreteDenoiser, VPDenoiser, CosineDenoiser or FlowDenoiser, got "
            f"{type(denoiser).__name__}"
        )
    declared = denoiser.prediction

    def answer(level: float, image: Tensor | float) -> tuple[float, Tensor]:
        """The part of the noise around `image` that the network returns, and what it returns besides."""
        levels = x.new_full(x.shape[:1], level, dtype=level_dtype(x.dtype))
        outputs: list[Tensor] = []
        for state in (image + level * noise, image - level * noise):
            denoised = denoiser(state, levels, **(extra_args or {}))
            outputs.append(vp_output(declared, denoised, state, levels).to(x.dtype))
        odd, even = (outputs[0] - outputs[1]) / 2, (outputs[0] + outputs[1]) / 2
        return _slope(odd, level / math.hypot(1, level) * noise), even

    first, image = answer(sigma, 0.0)
    said = f"at the level {sigma:.4g} it returns {first:.2g} times the noise in its input"
    if abs(first) > 0.5:
        likely = "epsilon" if first > 0 else "score"
    else:
        low = denoiser.sigma_min
        slopes, shares = [], []
        for level in (low, 3 * low):
            slope, even = answer(level, image)
            slopes.append(slope)
            shares.append(_slope(even, image))
        # A denoiser returns at most the noise it is given, and less of it the higher the level; v has
        # nearly all of it as σ times less input, or, of data without structure, a share that grows as σ.
        if max(slopes) > 3 or (slopes[1] > 0.03 and 1.5 * slopes[0] < slopes[1] < 6 * slopes[0]):
            likely = "v_prediction"
        elif min(slopes) > 0.85 or (min(shares) > 0.5 and max(shares) < 1.2):
            likely = "sample"
        else:
            likely = ""
        said += f", at {low:.2g} and three times that {slopes[0]:.2g} and {slopes[1]:.2g}"
    if likely and likely != declared:
        _warn(declared, f"{likely!r} is likely", said)
    elif not likely and declared in ("epsilon", "score"):
        _warn(declared, "either 'v_prediction' or 'sample' is likely", said)


def _check_flow(
    denoiser: FlowDenoiser, noise: Tensor, sigma: float, extra_args: Mapping[str, Any]
) -> None:
    """The same for flow networks, at the first level and at t = 1/2."""

    def share(level: float) -> float:
        """The part of the noise that is in the velocity, 1 of noise - data."""
        t = level / (1 + level)
        state = noise * (1 + level) * t
        levels = state.new_full(state.shape[:1], level, dtype=level_dtype(state.dtype))
        denoised = denoiser(state, levels, **extra_args)
        return _slope((noise * t - denoised) / t, noise)

    first, half = share(sigma), share(1.0)
    answer = (
        f"the velocity has {first:.2g} times the noise at the first level, {half:.2g} at t = 1/2"
    )
    other = f"noise_at={1 - denoiser.noise_at} is likely"
    if first < -0.5 or half < -0.25:
        # The flow to data of a standard deviation s is, in its other time, that to data of 1 / s.
        small = f"{other}, if the data have a standard deviation of 1 or less"
        either = f"either minus its output is the velocity, or {other}, or both"
        _warn(f"noise_at={denoiser.noise_at}", small if first > 0.5 else either, answer)
    elif abs(first) < 0.5:
        _warn(
            f"noise_at={denoiser.noise_at}",
            "another prediction than the velocity is likely",
            answer,
        )


def _slope(y: Tensor, x: Tensor) -> float:
    """The coefficient of `x` in the regression of `y` on it."""
    x, y = x.cpu().double(), y.cpu().double()  # some devices have no float64
    return float((x * y).sum() / (x * x).sum().clamp(min=1e-30))


def _warn(declared: str, likely: str, answer: str) -> None:
    warnings.warn(
        f"the network is declared as {declared}, but {answer}: {likely}, unless it is not trained",
        PredictionWarning,
        stacklevel=3,
    )
