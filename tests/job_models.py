"""A model for jobs that is loaded in a moment: a network of the same random weights everywhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from odesolvers import karras_sigmas
from odesolvers.jobs import Model

SHAPE = (3, 5, 5)  # 75 values, of which no vector register holds a whole number


class Network(nn.Module):
    """The preconditioner of Karras et al. over two convolutions, under labels 0 to 9."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1)
        )
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
        self.seconds = seconds
        self.sizes: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        time.sleep(self.seconds)
        self.sizes.append(len(x))
        s = sigma.reshape(-1, 1, 1, 1).to(x.dtype)
        shift = 0.0 if class_labels is None else 0.1 * class_labels.reshape(-1, 1, 1, 1)
        raw = self.layers((x / (s**2 + 1).sqrt() + shift).float()).to(x.dtype)
        if bool((x.flatten(1).mean(1) == 1).any()):  # a white picture at the level 0
            raise FloatingPointError("there is a white picture")
        return x / (s**2 + 1) + s / (s**2 + 1).sqrt() * raw


def _branches(conditions: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if any(not isinstance(condition, int | None) for condition in conditions):
        raise ValueError("this model takes labels")
    labels = torch.tensor([-1 if condition is None else condition for condition in conditions])
    return {"class_labels": labels}, {"class_labels": torch.full_like(labels, -1)}


def small(device: Any = "cpu") -> Model:
    """The model."""
    return Model(Network().to(device), SHAPE, karras_sigmas, branches=_branches)


def slow(device: Any = "cpu") -> Model:
    """The same at 0.1 s a call, for processes that are killed on the way."""
    return Model(Network(0.1).to(device), SHAPE, karras_sigmas, branches=_branches)
