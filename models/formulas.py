"""How the output of a network becomes a denoised state, each formula once and its inverse beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from odesolvers.grids import level_dtype

from .base import append_dims

Network: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""The raw network ``network(z, noise_input) -> output`` under its conditions."""

PREDICTIONS = ("epsilon", "v_prediction", "sample", "score")
"""What a network of a variance-preserving process predicts."""

OTHER_NAMES = {
    "eps": "epsilon",
    "noise": "epsilon",
    "pred_noise": "epsilon",
    "v": "v_prediction",
    "velocity": "v_prediction",
    "pred_v": "v_prediction",
    "x0": "sample",
    "pred_x0": "sample",
    "x_start": "sample",
    "original_sample": "sample",
}
"""Names of the same predictions elsewhere, for the message that refuses them."""


def check_prediction_name(prediction: object) -> str:
    """Check that `prediction` is one of `PREDICTIONS`.

    Raises:
        ValueError: naming the right one, if the name is known from other packages.
    """
    if prediction not in PREDICTIONS:
        known = OTHER_NAMES.get(str(prediction))
        raise ValueError(
            f"prediction must be one of {', '.join(map(repr, PREDICTIONS))}, got {prediction!r}"
            + (f", which is {known!r} here" if known else "")
        )
    return str(prediction)


def vp_denoise(prediction: str, network: Network, x: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """The posterior mean by a network of a variance-preserving process, in the wider dtype.

    The network sees ``z = x / sqrt(1 + σ²) = α x0 + β ε`` and the noise input `t`, where
    ``α = 1 / sqrt(1 + σ²)`` and ``β = σ α``. From its output f,

    - "epsilon", f = ε: ``D = x - σ f`` (Ho et al. 2020, arXiv 2006.11239);
    - "v_prediction", f = α ε - β x0: ``D = α z - β f`` (Salimans and Ho 2022, arXiv 2202.00512);
    - "sample", f = x0: ``D = f``;
    - "score", f = ∇ log p(z) = -ε / β: ``D = x + σ β f`` (Song et al. 2021, arXiv 2011.13456).
    """
    s = append_dims(sigma, x)
    root = torch.sqrt(1 + s**2)
    z = x / root
    f = network(z, t)
    if prediction == "epsilon":
        return x - s * f
    if prediction == "v_prediction":
        return (z - s * f) / root
    if prediction == "score":
        return x + s * (s / root) * f
    return f


def vp_output(prediction: str, denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The output f from which `vp_denoise` makes `denoised`."""
    s = append_dims(sigma, x)
    root = torch.sqrt(1 + s**2)
    if prediction == "epsilon":
        return (x - denoised) / s
    if prediction == "v_prediction":
        return (x / root - denoised * root) / s
    if prediction == "score":
        return (denoised - x) * root / s**2
    return denoised


def edm_denoise(
    network: Network, x: Tensor, sigma: Tensor, t: Tensor, *, sigma_data: float, sign: int = 1
) -> Tensor:
    """The posterior mean by the preconditioning of Karras et al. 2022 (arXiv 2206.00364, table 1).

    ``D = c_skip x + c_out F(c_in x, t)`` with ``c_in = 1 / sqrt(σ² + s²)``, ``c_skip = s² / (σ² + s²)``
    and ``c_out = ± σ s / sqrt(σ² + s²)``, where s is the standard deviation of the data.
    """
    s = append_dims(sigma, x)
    root = torch.sqrt(s**2 + sigma_data**2)
    out = sign * s * sigma_data / root
    return (sigma_data / root) ** 2 * x + out * network(x / root, t)


def evaluate(
    network: Callable[..., Any],
    z: Tensor,
    t: Tensor,
    dtype: torch.dtype,
    extra_args: Mapping[str, Any],
    *,
    learned_variance: bool = False,
) -> Tensor:
    """The output of `network` at `z` in `dtype`, checked, in the dtype of `z`.

    Floating point `t` is given in float64 to networks in float64, and in float32 to all others.

    Raises:
        TypeError: if the output is neither a tensor nor an output of diffusers, or the weights of the
            network are of another dtype.
        ValueError: if its shape is not that of `z`, or twice the channels under `learned_variance`.
    """
    if t.is_floating_point():
        t = t.to(level_dtype(dtype))
    try:
        output = network(z.to(dtype), t, **extra_args)
    except RuntimeError as error:
        if "same dtype" not in str(error) and "should be the same" not in str(error):
            raise
        raise TypeError(
            f"the network met two dtypes ({error}): its input z is {dtype}, t {t.dtype}. Give the "
            "denoiser the dtype of the weights, such as dtype=torch.bfloat16, and the state keeps its "
            "own; if z has it already, convert t or the conditions inside the network"
        ) from error
    if not isinstance(output, Tensor):
        output = getattr(output, "sample", output)  # of the models of diffusers
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the network must return a tensor, got {type(output).__name__}; "
            "with diffusers, call it with return_dict=False and take the first"
        )
    twice = z.ndim > 1 and output.shape == (len(z), 2 * z.shape[1], *z.shape[2:])
    if learned_variance and twice:
        output = output[:, : z.shape[1]]
    elif output.shape != z.shape:
        raise ValueError(
            f"the output of the network must have the shape of the state, {tuple(z.shape)}, got "
            f"{tuple(output.shape)}"
            + (
                ": if the second half of the channels is a learned variance, learned_variance=True of "
                "DiscreteDenoiser leaves it out"
                if twice
                else ""
            )
        )
    elif learned_variance:
        raise ValueError(
            f"the network returns {tuple(output.shape)} for a state of that shape, without a learned "
            "variance: leave out learned_variance=True"
        )
    return output.to(z.dtype)
