"""The noise that sampling starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from odesolvers.grids import Grid, Sigmas
from odesolvers.values import number

from .base import check_floating_dtype


def init_noise(
    shape: Sequence[int],
    sigmas: Sigmas,
    *,
    data_std: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise at the first level of a grid, ``x = sqrt(σ² + data_std²) n`` with standard normal n.

    It has the variance of ``x0 + σ n``, so that the network sees the same variance as in training,
    whatever its family:

    - variance-preserving networks see ``x / sqrt(1 + σ²) = n``, as in DDPM, `DDIMScheduler`, and
      `EulerDiscreteScheduler` under "leading" spacing;
    - flow-matching networks see n at t = 1, to within 2^-20, as `FLOW_SIGMA_MAX` stands for infinity;
    - networks under the preconditioning of Karras et al. 2022, with ``data_std=sigma_data``, see n.

    k-diffusion, NVlabs' EDM, and `EulerDiscreteScheduler` under the other spacings start from ``σ n``,
    which is ``data_std=0``. At σ = 14.6, the last level of Stable Diffusion, the two differ by 0.2 %, at
    80 by 0.008 %.

    Args:
        shape: that of the state, ``(B, ...)``.
        sigmas: the grid; see `Solver.sample`.
        data_std: standard deviation of the data.
        generator: draws n on its own device, whatever `device`, as diffusers does: the same noise on
            every device from one seed.
        dtype: that of the state.
        device: that of the state; by default that of the generator, or else torch's default.

    Raises:
        TypeError: if `dtype` is not a floating point dtype.
        ValueError: if the grid is not one, or `data_std` is negative or not finite.
    """
    data_std = number("data_std", data_std)
    if not (0 <= data_std < math.inf):
        raise ValueError(f"data_std must be 0 or more and finite, got {data_std}")
    check_floating_dtype(dtype)
    own = device if generator is None else generator.device
    noise = torch.randn(tuple(shape), generator=generator, dtype=dtype, device=own)
    return noise.to(own if device is None else device) * math.hypot(
        Grid.of(sigmas).levels[0], data_std
    )
