"""The four preconditioners of Karras et al. 2022, which convert raw networks to denoisers.

All have the form of equation 7 of arXiv 2206.00364,

    D(x, σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x, c_noise(σ)),

with the coefficients of its table 1.
"""

from __future__ import annotations

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from odesolvers.grids import karras_sigmas

from ..base import append_dims, values_readable
from .checks import HUGE, TINY, brief, check_numbers
from .unet import UNet


class Coefficients(NamedTuple):
    """The coefficients c_skip, c_out, c_in and c_noise, each of shape (B,)."""

    skip: Tensor
    out: Tensor
    scale: Tensor
    noise: Tensor


class Preconditioner(nn.Module, ABC):
    """Converts a network of Karras et al. 2022 to a denoiser; see `odesolvers.Denoiser`.

    Args:
        model: the raw network.
        use_fp16: whether its authors ran it in float16; stored in checkpoints, but without effect.
    """

    def __init__(self, model: UNet, *, use_fp16: bool = False) -> None:
        super().__init__()
        if not isinstance(use_fp16, bool):
            raise ValueError(f"use_fp16 must be True or False, got {brief(use_fp16)}")
        self.model = model
        self.use_fp16 = use_fp16
        self.img_resolution = model.config.img_resolution
        self.img_channels = model.config.in_channels
        self.label_dim = model.config.label_dim

    sigma_min: float
    """The lowest noise level in the training of the network."""

    sigma_max: float
    """The highest noise level in the training of the network."""

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Compute the coefficients at noise levels `sigma` (B,)."""

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Round to the nearest noise levels that the network distinguishes, in the dtype of `sigma`."""
        return sigma

    @final
    def get_sigmas(self, n: int, rho: float = 7.0) -> Tensor:
        """The sampling grid of Karras et al.: `karras_sigmas` from 80 to 0.002, followed by 0.

        It is restricted to the range of the network and rounded to its noise levels.

        Args:
            n: number of noise levels above 0, which is the number of steps.
            rho: see `karras_sigmas`.

        Returns:
            float64 tensor ``(n + 1,)`` on the CPU.

        Raises:
            ValueError: if the network does not distinguish so many levels.
        """
        low, high = max(0.002, self.sigma_min), min(80.0, self.sigma_max)
        levels = self.round_sigma(karras_sigmas(n, low, high, rho, append_zero=False))
        if not bool((levels.diff() < 0).all()):
            raise ValueError(
                f"the network does not tell {n} levels on this grid apart: ask for fewer"
            )
        return torch.cat([levels, levels.new_zeros(1)])

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The posterior mean ``E[x0 | x]``.

        On the CPU invalid values of `sigma` and `class_labels` raise an error. On a GPU they cannot be
        checked without a synchronisation: the images concerned become NaN, which the solvers report
        with the step and the noise level.

        Levels outside `sigma_min` to `sigma_max` are evaluated, as in the published code, whose
        samplers restrict their grids instead. On the CPU, Python shows one UserWarning of them.

        Args:
            x: noisy images ``(B, C, R, R)``. The coefficients are applied in the dtype of `x` or, if
                that is less precise, in float32, independent of the dtype of the network.
            sigma: their noise levels ``(B,)``, above 0; see `sigma_min` and `sigma_max`.
            class_labels: int64 ``(B,)``, each at least 0 and below `label_dim`; or floating point
                ``(B, label_dim)``, one-hot or a mixture of classes. None is equivalent to zeros, which
                represent no label if the network was trained with label dropout.
            augment_labels: ``(B, augment_dim)``, for training with augmentation.

        Returns:
            Denoised images with the shape, dtype and device of `x`.

        Raises:
            ValueError: if a shape, a device or (on the CPU) a value is wrong.
            TypeError: if a dtype is wrong.
        """
        self._check(x, sigma)
        labels = self._labels(x, class_labels)
        wide = torch.promote_types(x.dtype, torch.float32)
        state, levels = x.to(wide), sigma.to(wide)
        c = self.coefficients(levels)
        out = torch.where(_levels(levels), c.out, math.nan)
        raw: Tensor = self.model(
            (append_dims(c.scale, x) * state).to(self.model.dtype), c.noise, labels, augment_labels
        )[:, : self.img_channels]
        return (append_dims(c.skip, x) * state + append_dims(out, x) * raw.to(wide)).to(x.dtype)

    @final
    def arguments(self) -> dict[str, Any]:
        """The constructor arguments other than `model`."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if name != "model"}

    def _in_range(self, sigma: Tensor) -> Tensor:
        slack = 1e-5  # some levels are stored in float32
        low, high = self.sigma_min * (1 - slack), self.sigma_max * (1 + slack)
        return (sigma >= low) & (sigma <= high)

    def _check(self, x: Tensor, sigma: Tensor) -> None:
        form = (self.img_channels, self.img_resolution, self.img_resolution)
        if x.ndim != 4 or x.shape[1:] != form or len(x) == 0:
            raise ValueError(
                f"this network is for images of shape (B, {', '.join(map(str, form))}), got "
                f"{tuple(x.shape)}"
            )
        if not x.is_floating_point() or not sigma.is_floating_point():
            raise TypeError(f"x and sigma must be floating point, got {x.dtype} and {sigma.dtype}")
        if sigma.shape != x.shape[:1]:
            raise ValueError(
                f"sigma must have one level for each image, shape ({len(x)},), got "
                f"{tuple(sigma.shape)}"
            )
        device = next(self.parameters()).device
        if x.device != device or sigma.device != device:
            raise ValueError(
                f"the network is on {device}, x on {x.device} and sigma on {sigma.device}: move "
                "them together, e.g. denoiser.to(x.device)"
            )
        if not values_readable(sigma):
            return
        if not bool(_levels(sigma).all()):
            raise ValueError(
                f"sigma must be above 0 and finite, got {sigma[~_levels(sigma)][0]:.6g}"
            )
        if not bool(self._in_range(sigma).all()):
            # Without the levels of the call: Python shows one text only once.
            warnings.warn(
                f"this network was trained on sigma from {self.sigma_min:.6g} to {self.sigma_max:.6g} "
                "and is evaluated outside of them; denoiser.get_sigmas(n) gives a grid within",
                UserWarning,
                stacklevel=3,
            )

    def _labels(self, x: Tensor, labels: Tensor | None) -> Tensor | None:
        """Check class labels and convert them to one-hot rows ``(B, label_dim)``."""
        batch, classes = len(x), self.label_dim
        if not classes:
            if labels is not None:
                raise ValueError("class_labels were given, but this network is unconditional")
            return None
        if labels is None:
            return torch.zeros(batch, classes, device=x.device)
        if labels.device != x.device:
            raise ValueError(f"class_labels are on {labels.device}, x on {x.device}")
        if labels.is_floating_point():
            if labels.shape != (batch, classes):
                raise ValueError(
                    f"floating point class_labels must be one-hot, shape ({batch}, {classes}), got "
                    f"{tuple(labels.shape)}; class numbers are int64"
                )
            if values_readable(labels) and not bool(labels.isfinite().all()):
                raise ValueError("class_labels are not finite")
            return labels
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"class_labels must be int64 or floating point, got {labels.dtype}")
        if labels.shape != (batch,):
            raise ValueError(
                f"class_labels must be one whole number for each image, shape ({batch},), got "
                f"{tuple(labels.shape)}"
            )
        known = (labels >= 0) & (labels < classes)
        if values_readable(labels) and not bool(known.all()):
            raise ValueError(
                f"class_labels must lie between 0 and {classes - 1}, got {labels.tolist()}"
            )
        hot = labels[:, None] == torch.arange(classes, device=labels.device)
        return hot.float().masked_fill(~known[:, None], math.nan)


def _levels(sigma: Tensor) -> Tensor:
    """Which of the values are noise levels at all."""
    return (sigma > 0) & (sigma < math.inf)


@final
class VPPrecond(Preconditioner):
    """Preconditioner of variance-preserving networks: ``σ(t)² = exp(β_d t² / 2 + β_min t) - 1``.

    The schedule is that of Song et al. 2021 (arXiv 2011.13456).

    Args:
        model: the raw network, which predicts the noise at timestep ``(M - 1) t``.
        use_fp16: see `Preconditioner`.
        beta_d: β_d.
        beta_min: β_min.
        M: the number of timesteps.
        epsilon_t: the lowest t in training.
    """

    def __init__(
        self,
        model: UNet,
        *,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
    ) -> None:
        super().__init__(model, use_fp16=use_fp16)
        check_numbers(TINY, 100, beta_d=beta_d)
        check_numbers(0, 100, beta_min=beta_min)
        check_numbers(TINY, 1, epsilon_t=epsilon_t)
        check_numbers(2, 2**20, M=M)
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t
        self.sigma_min, self.sigma_max = self._sigma(epsilon_t), self._sigma(1.0)

    def _sigma(self, t: float) -> float:
        return math.sqrt(math.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Compute 1, -σ, 1 / √(σ² + 1) and (M - 1) t(σ)."""
        variance = sigma**2 + 1
        # Not log1p: the weights were trained with the t that results from rounding 1 + σ² to float32.
        root = (self.beta_min**2 + 2 * self.beta_d * variance.log()).sqrt()
        t = (root - self.beta_min) / self.beta_d
        return Coefficients(torch.ones_like(sigma), -sigma, variance.rsqrt(), (self.M - 1) * t)


@final
class VEPrecond(Preconditioner):
    """Preconditioner of variance-exploding networks (Song et al. 2021, arXiv 2011.13456).

    Args:
        model: the raw network, which predicts the noise with the sign of the score.
        use_fp16: see `Preconditioner`.
        sigma_min: the lowest noise level in training.
        sigma_max: the highest noise level in training.
    """

    def __init__(
        self,
        model: UNet,
        *,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
    ) -> None:
        super().__init__(model, use_fp16=use_fp16)
        check_numbers(sigma_min=sigma_min)
        check_numbers(sigma_min, sigma_max=sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Compute 1, σ, 1 and log(σ / 2)."""
        one = torch.ones_like(sigma)
        return Coefficients(one, sigma, one, (0.5 * sigma).log())


@final
class IDDPMPrecond(Preconditioner):
    """Preconditioner of improved DDPM (Nichol and Dhariwal 2021), with `M` noise levels.

    The levels are u_M = 0 < u_{M-1} < ... < u_0 with
    ``u_{j-1}² = (u_j² + 1) / max(ᾱ_{j-1} / ᾱ_j, C_1) - 1`` and ``ᾱ_j = sin²(π j / (2 M (C_2 + 1)))``.

    Args:
        model: the raw network; the second half of its output channels, predicted variances, is not
            used.
        use_fp16: see `Preconditioner`.
        C_1: lower bound of the ratio.
        C_2: offset of the cosine schedule.
        M: the number of levels.
    """

    u: Tensor

    def __init__(
        self,
        model: UNet,
        *,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
    ) -> None:
        super().__init__(model, use_fp16=use_fp16)
        check_numbers(TINY, 1, C_1=C_1)
        check_numbers(0, HUGE, C_2=C_2)
        check_numbers(2, 100_000, M=M)
        self.C_1, self.C_2, self.M = C_1, C_2, M
        levels = [0.0]
        for j in range(M, 0, -1):
            ratio = (self._root_alpha(j - 1) / self._root_alpha(j)) ** 2
            levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(ratio, C_1) - 1))
        self.register_buffer("u", torch.tensor(levels[::-1], dtype=torch.float32))
        self.sigma_min, self.sigma_max = levels[1], levels[-1]
        self.register_load_state_dict_post_hook(_update_range)  # type: ignore[no-untyped-call]

    def _root_alpha(self, j: int) -> float:
        return math.sin(math.pi / 2 * j / (self.M * (self.C_2 + 1)))

    def _index(self, sigma: Tensor) -> Tensor:
        return (sigma.reshape(-1, 1) - self.u.to(sigma.device)).abs().argmin(1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """Round to the nearest of the levels u."""
        nearest = self.u.to(sigma.device)[self._index(sigma)]
        return nearest.to(sigma.dtype).reshape(sigma.shape)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Compute 1, -σ, 1 / √(σ² + 1), and M - 1 minus the index of the nearest level."""
        noise = (self.M - 1 - self._index(sigma)).to(sigma.dtype)
        return Coefficients(torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), noise)


def _update_range(module: nn.Module, _: object) -> None:
    """Set the range to that of the loaded levels, which were computed in float32."""
    assert isinstance(module, IDDPMPrecond)
    module.sigma_min, module.sigma_max = module.u[-2].item(), module.u[0].item()


@final
class EDMPrecond(Preconditioner):
    """Preconditioner of Karras et al. 2022: network inputs and targets of unit variance at all levels.

    Args:
        model: the raw network.
        use_fp16: see `Preconditioner`.
        sigma_min: the lowest noise level supported.
        sigma_max: the highest noise level supported.
        sigma_data: standard deviation of the data.
    """

    def __init__(
        self,
        model: UNet,
        *,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__(model, use_fp16=use_fp16)
        check_numbers(sigma_min=sigma_min)
        check_numbers(sigma_min, sigma_max=sigma_max)
        check_numbers(TINY, HUGE, sigma_data=sigma_data)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Compute σ_d² / s², σ σ_d / s, 1 / s and log(σ) / 4, where s² = σ² + σ_d²."""
        variance = sigma**2 + self.sigma_data**2
        skip = self.sigma_data**2 / variance
        inverse = variance.rsqrt()
        return Coefficients(skip, sigma * self.sigma_data * inverse, inverse, sigma.log() / 4)
