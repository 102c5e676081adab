"""Classifier-free guidance of any conditional denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import DenoiserFunction
from .batching import join


class ClassifierFreeGuidance(nn.Module):
    """Classifier-free guidance ``D(x, σ) = D₋ + scale (D₊ - D₋)``, in one call of twice the batch.

    This is the guidance of Ho and Salimans 2022 (arXiv 2207.12598), written for the denoised image.
    Noise, velocity and data predictions are affine functions of one another. Their coefficients depend
    only on σ and x, not on the branch, so guiding any of them is equivalent.

    Each branch is given by the keyword arguments of a call of the denoiser for that branch alone::

        guided = ClassifierFreeGuidance(denoiser, scale=4.0)
        extra_args = {
            "positive": {"class_labels": labels},
            "negative": {"class_labels": torch.full_like(labels, no_class)},
        }
        solver.sample(guided, x, sigmas, extra_args=extra_args)

    Tensors of the two branches are concatenated along their first dimension, also inside mappings and
    lists. That dimension is the batch size of x, or 1 for a condition shared by all images. Anything
    else must be equal in both branches.

    Args:
        denoiser: a conditional denoiser, called once as ``denoiser(x, sigma, **arguments)``, with the
            negative branch in the first half of the batch and the positive one in the second.
        scale: the guidance scale, 0 for the negative prediction and 1 for the positive one. At 1 the
            negative branch has no effect and is not evaluated.

    Raises:
        TypeError: if `denoiser` is not callable or is guided already: guiding a guided prediction is
            not guidance with any scale.
        ValueError: if `scale` is not a finite number.
    """

    def __init__(self, denoiser: DenoiserFunction, scale: float) -> None:
        super().__init__()
        if isinstance(denoiser, ClassifierFreeGuidance):
            raise TypeError(
                "the denoiser is guided already: guide its inner denoiser once, with one scale"
            )
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable, got {type(denoiser).__name__}")
        if (
            isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not math.isfinite(scale)
        ):
            raise ValueError(f"scale must be a finite number, got {scale!r}")
        self.denoiser = denoiser
        self.scale = float(scale)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        positive: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        **shared: Any,
    ) -> Tensor:
        """The guided denoised states.

        Args:
            x: noisy states ``(B, ...)``.
            sigma: their noise levels ``(B,)``.
            positive: keyword arguments of the branch to guide towards.
            negative: keyword arguments of the branch to guide away from; optional at scale 1.
            shared: keyword arguments of both branches.

        Raises:
            TypeError, ValueError: if a branch is missing, or if the two cannot be evaluated together.
        """
        for name, branch in (("positive", positive), ("negative", negative)):
            if branch is None and (name == "positive" or self.scale != 1.0):
                raise ValueError(
                    f"guidance of scale {self.scale:g} needs the {name} branch: pass "
                    "extra_args={'positive': {...}, 'negative': {...}}, each the keyword arguments "
                    "of one branch"
                )
            if branch is not None and not isinstance(branch, Mapping):
                raise TypeError(
                    f"{name} must be a mapping of keyword arguments for the denoiser, got "
                    f"{type(branch).__name__}"
                )
        assert positive is not None
        n = x.shape[0]
        if self.scale == 1.0:
            arguments = join([{**shared, **positive}], n, "")
            return self.denoiser(x, sigma, **arguments)
        assert negative is not None
        arguments = join([{**shared, **negative}, {**shared, **positive}], n, "")
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), **arguments)
        away, towards = both.chunk(2)
        return away + self.scale * (towards - away)
