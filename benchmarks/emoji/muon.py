"""Muon: momentum whose steps are made orthogonal, for the inner weights of a network.

For the weights of convolutions and linear layers between the first and the last, the momentum G is
replaced by the nearest matrix with singular values of about 1 before a step is taken (Jordan 2024,
https://kellerjordan.github.io/posts/muon/), scaled so that the learning rate of AdamW serves
(Liu et al. 2025, arXiv 2502.16982, section 2.2). All others are AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

from odesolvers.models.edm.layers import Block

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that drives singular values towards 1, as published."""


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix with the singular vectors of `matrix` and singular values between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(iterations):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal steps, for weights of shape ``(out, in, ...)``."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take a step along the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                mean = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(mean, group["momentum"]).flatten(1)
                update = orthogonal(ahead).mul_(0.2 * max(ahead.shape) ** 0.5)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(group["lr"] * update.view(weight.shape))


def split(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights inside the blocks of a UNet, which Muon steps, and all other parameters."""
    blocks = [part for part in network.modules() if isinstance(part, Block)]
    inner = [weight for block in blocks for weight in block.parameters() if weight.ndim >= 2]
    chosen = {id(weight) for weight in inner}
    return inner, [weight for weight in network.parameters() if id(weight) not in chosen]
