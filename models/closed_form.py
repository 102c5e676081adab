"""Denoisers in closed form: of a Gaussian, of a Gaussian mixture and of a finite set of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import append_dims, check_device, values_readable


class Gaussian(nn.Module):
    """The denoiser of ``x0 ~ N(mean, diag(std²))``, whose flow is known exactly.

    ``D(x, σ) = (std² x + σ² mean) / (std² + σ²)``.

    Args:
        mean: a number, or a tensor that broadcasts against one state (without the batch dimension).
        std: a number or tensor likewise, 0 or more.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float64))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float64))
        if not bool((self.std >= 0).all()):
            raise ValueError("std must not be negative")

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean ``E[x0 | x]`` for `x` ``(B, ...)`` and `sigma` ``(B,)``."""
        check_device(x, self.mean, sigma=sigma)
        noise = append_dims(sigma.double(), x) ** 2
        denoised = (self.std**2 * x + noise * self.mean) / (self.std**2 + noise)
        return denoised.to(x.dtype)

    def flow(self, x: Tensor, sigma: float, target: float) -> Tensor:
        """The exact solution of the probability-flow ODE from `sigma` to `target`.

        ``x(τ) = mean + (x - mean) sqrt((std² + τ²) / (std² + σ²))``.
        """
        growth = torch.sqrt((self.std**2 + target**2) / (self.std**2 + sigma**2))
        return (self.mean + (x - self.mean) * growth).to(x.dtype)


class GaussianMixture(nn.Module):
    """The denoiser of a mixture of isotropic Gaussians.

    The posterior over components is computed in float64. The part that all exponents share is
    cancelled analytically, so that the result is as accurate at σ = 0.002 as at σ = 80.

    Args:
        means: floating point ``(K, ...)``, one mean for each component.
        stds: ``(K,)`` or a number, 0 or more.
        weights: ``(K,)``, positive; they are normalised. Uniform by default.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def __init__(
        self, means: Tensor, stds: Tensor | float = 0.0, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        if (
            means.ndim < 2
            or means.numel() == 0
            or not means.is_floating_point()
            or not bool(means.isfinite().all())
        ):
            raise ValueError(
                "means must be a finite floating point tensor of shape (K, ...), got "
                f"{means.dtype} {tuple(means.shape)}"
            )
        count = means.shape[0]
        stds = torch.as_tensor(stds, dtype=torch.float64).expand(count).clone()
        weights = torch.ones(count) if weights is None else torch.as_tensor(weights)
        if weights.shape != (count,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be {count} positive numbers, one for each mean")
        if not bool((stds >= 0).all()):
            raise ValueError("stds must not be negative")
        self.register_buffer("means", means.double())
        self.register_buffer("stds", stds)
        self.register_buffer("log_weights", torch.log(weights.double() / weights.double().sum()))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean ``E[x0 | x]`` for `x` ``(B, ...)`` and `sigma` ``(B,)``, above 0."""
        return self._denoise(x, sigma, self.log_weights)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw `n` samples of the mixture, float64 ``(n, ...)`` on the device of the means."""
        device = self.means.device
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        shape = (n, *self.means.shape[1:])
        noise = torch.randn(shape, dtype=torch.float64, device=device, generator=generator)
        return self.means[k] + append_dims(self.stds[k], noise) * noise

    def _denoise(self, x: Tensor, sigma: Tensor, log_prior: Tensor) -> Tensor:
        check_device(x, self.means, sigma=sigma)
        if x.shape[1:] != self.means.shape[1:]:
            sizes = ", ".join(map(str, self.means.shape[1:]))
            raise ValueError(
                f"this denoiser is for states of shape (B, {sizes}), got {tuple(x.shape)}"
            )
        points, means = x.flatten(1).double(), self.means.flatten(1).double()
        noise = sigma.double().unsqueeze(1) ** 2
        variances = self.stds**2 + noise  # (B, K)
        # The exponent -|x - m|² / 2v plus |x|² / 2σ², which is the same for all components: if all
        # stds are 0, no large terms remain that would have to cancel.
        fit = points @ means.T - means.square().sum(1) / 2
        excess = points.square().sum(1, keepdim=True) / 2 * (1 / noise - 1 / variances)
        log_norm = means.shape[1] / 2 * torch.log(variances / noise)
        posterior = torch.softmax(log_prior + fit / variances + excess - log_norm, dim=1)
        denoised = (posterior * noise / variances) @ means
        denoised += (posterior * self.stds**2 / variances).sum(1, keepdim=True) * points
        return denoised.reshape(x.shape).to(x.dtype)


class IdealDenoiser(GaussianMixture):
    """The best possible denoiser of a finite set of images (Karras et al. 2022, appendix B.3).

    ``D(x, σ) = Σ_k softmax_k(-|x - y_k|² / 2σ²) y_k`` is the function to which a network trained on
    these images alone would converge. Its samples are the images themselves.

    Args:
        images: floating point ``(K, ...)``.
        labels: integers from 0, ``(K,)``; they make the denoiser class-conditional.
    """

    labels: Tensor | None

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        super().__init__(images)
        if labels is not None and (
            labels.shape != images.shape[:1] or labels.is_floating_point() or labels.min() < 0
        ):
            raise ValueError(
                f"labels must be {images.shape[0]} integers from 0, one for each image, got "
                f"{labels.dtype} {tuple(labels.shape)}"
            )
        self.register_buffer("labels", labels)

    @property
    def images(self) -> Tensor:
        """The images, float64 ``(K, ...)``."""
        return self.means

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The posterior mean ``E[x0 | x, class]``.

        Args:
            x: noisy images ``(B, ...)``.
            sigma: their noise levels ``(B,)``, above 0.
            class_labels: int64 ``(B,)``, each the label of at least one image; None for all images.

        Returns:
            Denoised images with the shape and dtype of `x`. A label that no image has gives NaN where
            values cannot be checked, as on a GPU.

        Raises:
            ValueError: if a shape, dtype or device is wrong, or (on the CPU) if no image has a label.
        """
        if class_labels is None:
            return self._denoise(x, sigma, self.log_weights)
        if self.labels is None:
            raise ValueError("class_labels were given, but this IdealDenoiser was made without")
        if class_labels.shape != x.shape[:1] or class_labels.is_floating_point():
            raise ValueError(
                f"class_labels must be {x.shape[0]} integers, one for each state, got "
                f"{class_labels.dtype} {tuple(class_labels.shape)}"
            )
        check_device(x, self.means, class_labels=class_labels)
        match = class_labels.unsqueeze(1) == self.labels
        if values_readable(match) and not bool(match.any(1).all()):  # otherwise the output is NaN
            known = sorted(set(self.labels.tolist()))
            raise ValueError(f"class_labels must be among {known}, got {class_labels.tolist()}")
        return self._denoise(x, sigma, self.log_weights.masked_fill(~match, -math.inf))
