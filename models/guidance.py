"""Classifier-free guidance of any conditional denoiser."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from odesolvers.values import number

from .base import DenoiserFunction, append_dims, values_readable
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
    else must be equal in both branches. Tensors without a batch, such as the position ids of FLUX, are
    named by `shared` and passed on as they are::

        ClassifierFreeGuidance(denoiser, scale=4.0, shared=["img_ids", "txt_ids"])

    The scale of a call, ``extra_args={"scale": ..., "positive": ..., "negative": ...}``, takes the place
    of that of the object: a number, or a tensor, which may require a gradient, for all states or with a
    scale for each.

    Args:
        denoiser: a conditional denoiser, called once as ``denoiser(x, sigma, **arguments)``, with the
            negative branch in the first half of the batch and the positive one in the second.
        scale: the guidance scale, 0 for the negative prediction and 1 for the positive one. At 1 the
            negative branch has no effect and is not evaluated. (Pipelines of diffusers do not guide
            below 1: their ``guidance_scale=0.0`` is 1 here.) A tensor is read as a number.
        shared: names of conditions without a batch, which must be the same in both branches; inside
            mappings with dots, such as ``"added_cond_kwargs.ids"``.

    Raises:
        TypeError: if `denoiser` is not callable or is guided already: guiding a guided prediction is
            not guidance with any scale; or if `shared` is not a collection of names.
        ValueError: if `scale` is not a finite number, or requires a gradient: give it to the call.
    """

    def __init__(
        self, denoiser: DenoiserFunction, scale: float, *, shared: Collection[str] = ()
    ) -> None:
        super().__init__()
        if isinstance(denoiser, ClassifierFreeGuidance):
            raise TypeError(
                "the denoiser is guided already: guide its inner denoiser once, with one scale"
            )
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable, got {type(denoiser).__name__}")
        self.denoiser = denoiser
        if isinstance(shared, str) or not all(isinstance(name, str) for name in shared):
            raise TypeError(f"shared must be a list of names of conditions, got {shared!r}")
        self.scale = _finite(scale)
        self.shared = frozenset(shared)

    @property
    def sigma_min(self) -> float:
        """The lowest noise level of the denoiser; 0 if it has none."""
        return float(getattr(self.denoiser, "sigma_min", 0.0))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        positive: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        scale: Tensor | float | None = None,
        **both: Any,
    ) -> Tensor:
        """The guided denoised states.

        Args:
            x: noisy states ``(B, ...)``.
            sigma: their noise levels ``(B,)``.
            positive: keyword arguments of the branch to guide towards.
            negative: keyword arguments of the branch to guide away from; optional where the scale is the
                number 1.
            scale: in place of that of the object; a number, or a tensor ``()``, or ``(B,)`` for a scale
                of each state. A condition of the denoiser with this name stands in the branches.
            both: keyword arguments of both branches.

        Raises:
            TypeError, ValueError: if a branch is missing, if the two cannot be evaluated together, or if
                `scale` has another form.
        """
        n = x.shape[0]
        weight = self.scale if scale is None else _weight(scale, x)
        lone = isinstance(weight, float) and weight == 1.0
        for name, branch in (("positive", positive), ("negative", negative)):
            if branch is None and not (name == "negative" and lone):
                size = f"of scale {weight:g}" if isinstance(weight, float) else "by a tensor"
                raise ValueError(
                    f"guidance {size} needs the {name} branch: pass "
                    "extra_args={'positive': {...}, 'negative': {...}}, each the keyword arguments "
                    "of one branch"
                )
            if branch is not None and not isinstance(branch, Mapping):
                raise TypeError(
                    f"{name} must be a mapping of keyword arguments for the denoiser, got "
                    f"{type(branch).__name__}"
                )
        assert positive is not None
        if lone:
            arguments = join([{**both, **positive}], n, "", self.shared)
            return self.denoiser(x, sigma, **arguments)
        assert negative is not None
        arguments = join([{**both, **negative}, {**both, **positive}], n, "", self.shared)
        denoised = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), **arguments)
        away, towards = denoised.chunk(2)
        return away + weight * (towards - away)


def _finite(scale: object) -> float:
    value = number("scale", scale)
    if not math.isfinite(value):
        raise ValueError(f"scale must be a finite number, got {value!r}")
    return value


def _weight(scale: Tensor | float, x: Tensor) -> Tensor | float:
    """A finite number, or a tensor that broadcasts against `x` and has its dtype."""
    if not isinstance(scale, Tensor):
        return _finite(scale)
    if scale.shape not in ((), x.shape[:1]) or scale.is_complex() or scale.dtype is torch.bool:
        raise ValueError(
            f"scale must be a number, or a tensor () or ({x.shape[0]},), one for each state, got "
            f"{scale.dtype} {tuple(scale.shape)}"
        )
    if values_readable(scale) and not bool(scale.isfinite().all()):
        raise ValueError(f"scale must be finite, got {scale.tolist()}")
    return append_dims(scale, x).to(x) if scale.ndim else scale.to(x)
