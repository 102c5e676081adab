"""The trained network of letters as a denoiser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odesolvers.values import printable_cause

from ..base import append_dims, check_device, check_floating_dtype, values_readable
from ..edm.stored import CheckpointError, read_weights
from .data import LETTERS, SIZE
from .unet import LettersUNet

WEIGHTS = Path(__file__).parent / "letters.safetensors"
LOG = Path(__file__).parent / "letters.json"

SIGMA_DATA = 0.67
"""Root mean square of the pixel values in the training set."""

UNCONDITIONAL = -1
"""The label that represents no label; it replaced one in ten labels in training."""


class LettersDenoiser(nn.Module):
    """The denoiser ``D(x, σ) = c_skip x + c_out F(c_in x, σ, label)`` of images of letters.

    This is the preconditioner of Karras et al. 2022 (equation 7, the last column of table 1). The
    network F computes in the dtype of its weights, the preconditioner in that of the state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = LettersUNet(len(LETTERS) + 1)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The posterior mean ``E[x0 | x, label]``.

        Args:
            x: noisy images, floating point ``(B, 3, 32, 32)``.
            sigma: their noise levels, ``(B,)``, above 0.
            class_labels: int64 ``(B,)``, k for the letter ``LETTERS[k]`` and -1 for no label. None is
                -1 for all images.

        Returns:
            Denoised images with the shape and dtype of `x`. On a GPU labels cannot be checked without
            a synchronisation: a label out of range gives NaN, which the solvers report.

        Raises:
            TypeError: if `x` is not floating point or `class_labels` are not integers.
            ValueError: if a shape or device is wrong, or (on the CPU) if a value is out of range.
        """
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
        if x.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(
                f"the letters are pictures of shape (B, 3, {SIZE}, {SIZE}), got {tuple(x.shape)}"
            )
        check_device(x, next(self.parameters()), sigma=sigma, class_labels=class_labels)
        if sigma.shape != x.shape[:1]:
            raise ValueError(
                f"sigma must have shape ({x.shape[0]},), one for each picture, got "
                f"{tuple(sigma.shape)}"
            )
        if values_readable(sigma) and not bool((sigma > 0).all()):
            raise ValueError(f"sigma must be above 0, got {sigma.min().item()}")
        c_skip, c_out, c_in = _coefficients(sigma, x)
        raw = self._raw(c_in * x, sigma, class_labels)
        return (c_skip * x + c_out * raw).to(x.dtype)

    def loss(self, x: Tensor, noise: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        """Mean squared error of F for each image, ``(B,)``; about 1 for F = 0."""
        c_skip, c_out, c_in = _coefficients(sigma, x)
        noisy = x + append_dims(sigma, x) * noise
        raw = self._raw(c_in * noisy, sigma, class_labels)
        return ((raw - (x - c_skip * noisy) / c_out) ** 2).flatten(1).mean(1)

    def _raw(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        dtype = self.network.proj_in.weight.dtype
        condition = self._condition(x, class_labels)
        out: Tensor = self.network(x.to(dtype), sigma.to(dtype), condition.to(dtype))
        return out.to(x.dtype)

    def _condition(self, x: Tensor, class_labels: Tensor | None) -> Tensor:
        if class_labels is None:
            class_labels = torch.full(x.shape[:1], UNCONDITIONAL, device=x.device)
        if class_labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"class_labels must be integers (int64), got {class_labels.dtype}")
        if class_labels.shape != x.shape[:1]:
            raise ValueError(
                f"class_labels must have shape ({x.shape[0]},), one for each picture, got "
                f"{tuple(class_labels.shape)}"
            )
        # One-hot rows by comparison: indexing with an invalid label would read out of bounds.
        known = torch.arange(UNCONDITIONAL, len(LETTERS), device=x.device)
        rows = class_labels.unsqueeze(1) == known
        known_labels = rows.any(1, keepdim=True)
        if values_readable(class_labels) and not bool(known_labels.all()):
            raise ValueError(
                f"class_labels must be 0 to {len(LETTERS) - 1}, or -1 for no label, got "
                f"{class_labels.tolist()}"
            )
        return torch.where(known_labels, rows.to(torch.float32), torch.nan)


def _coefficients(sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in, each ``(B, 1, 1, 1)``."""
    sigma = append_dims(sigma, x)
    variance = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / variance.sqrt(), 1 / variance.sqrt()


def load_letters(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    path: str | Path | None = None,
) -> LettersDenoiser:
    """Load the trained network of letters, frozen and in evaluation mode.

    Args:
        device: the device of the network.
        dtype: the dtype that the network computes in, independent of that of the solver's state.
        path: a file of weights written by ``python -m odesolvers.models.letters.train``; by default
            the weights in the package.

    Raises:
        OSError: if the file at `path` cannot be read.
        TypeError: if `dtype` is not a floating point dtype.
        ValueError: if it does not contain the weights of this network, floating point and finite.
    """
    check_floating_dtype(dtype)
    path = WEIGHTS if path is None else Path(path)
    model = LettersDenoiser()
    try:
        weights = read_weights(path, model.network.state_dict())
    except CheckpointError as error:
        raise ValueError(
            f"{path} does not hold the weights of the letters network: {error}"
        ) from printable_cause(error)
    model.network.load_state_dict(weights)
    return model.eval().requires_grad_(False).to(device, dtype)


def training_log() -> dict[str, Any]:
    """The training log of the weights in the package: settings, loss history and losses by σ."""
    log: dict[str, Any] = json.loads(LOG.read_text())
    return log
