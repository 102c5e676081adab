"""A model for jobs that is loaded in a moment: a network of the same random weights everywhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odesolvers.opening import Model, open_model

SHAPE = (3, 5, 5)  # 75 values, of which no vector register holds a whole number


class Network(nn.Module):
    """The preconditioner of Karras et al. over two convolutions; prompts are numbers."""

    shape = SHAPE

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
        self.faults = False

    def condition(self, prompts: Sequence[str | None]) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([int(prompt or -1) for prompt in prompts])}

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        time.sleep(self.seconds)
        self.sizes.append(len(x))
        s = sigma.reshape(-1, 1, 1, 1).to(x.dtype)
        shift = 0.1 * class_labels.reshape(-1, 1, 1, 1)
        raw = self.layers((x / (s**2 + 1).sqrt() + shift).float()).to(x.dtype)
        if self.faults:
            raise FloatingPointError("nothing is white")
        if bool((x.flatten(1).mean(1) == 1).any()):  # a white picture at the level 0
            raise FloatingPointError("there is a white picture")
        return x / (s**2 + 1) + s / (s**2 + 1).sqrt() * raw


def small() -> Network:
    return Network()


def slow() -> Network:
    """The same at 0.1 s a call, for processes that are killed on the way."""
    return Network(0.1)


def broken() -> Network:
    """The same, which fails in every call."""
    network = Network()
    network.faults = True
    return network


def opened() -> Model:
    """The model as jobs open it."""
    return open_model("tests.job_models:small", torch.device("cpu"), None, None)
