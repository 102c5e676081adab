"""The U-Net of the letters: `ImageDenoiserModelV1` of k-diffusion, in the one size that is needed.

Parameters have k-diffusion's names, so that weights load into either; a test compares the two.
"""

from __future__ import annotations

import math
from typing import TypeVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (64, 96, 128)
"""Channels at 16, 8 and 4 pixels."""

EMBEDDING = 128
"""Size of the embedding of noise level and label."""

PATCH = 2
"""Side of the squares of pixels that become channels."""

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


@final
class LettersUNet(nn.Module):
    """The raw network F(x, σ, label), which is 0 before training.

    Args:
        labels: length of the rows that represent labels.
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        pixels = 3 * PATCH**2
        self.timestep_embed = _Fourier()
        self.mapping_cond = nn.Linear(labels, EMBEDDING, bias=False)
        self.mapping = nn.Sequential(
            _orthogonal(nn.Linear(EMBEDDING, EMBEDDING)),
            nn.GELU(),
            _orthogonal(nn.Linear(EMBEDDING, EMBEDDING)),
            nn.GELU(),
        )
        self.proj_in = nn.Conv2d(pixels, CHANNELS[0], 1)
        self.u_net = _UNet()
        self.proj_out = _zero(nn.Conv2d(CHANNELS[0], pixels, 1))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Map images ``(B, 3, 32, 32)``, levels ``(B,)`` and rows ``(B, labels)`` to images."""
        level = self.timestep_embed(sigma.log() / 4)
        emb = self.mapping(level + self.mapping_cond(labels))
        x = self.proj_in(F.pixel_unshuffle(x, PATCH))
        return F.pixel_shuffle(self.proj_out(self.u_net(x, emb)), PATCH)


@final
class _UNet(nn.Module):
    """Down through the resolutions and up again, with attention at the lower two."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = CHANNELS
        self.d_blocks = nn.ModuleList(
            [
                _Stage(nn.Identity(), _Residual(a, a, a)),
                _Stage(_Resample(up=False), _Residual(a, b, b), _Attention(b)),
                _Stage(_Resample(up=False), _Residual(b, c, c), _Attention(c)),
            ]
        )
        self.u_blocks = nn.ModuleList(
            [
                _Stage(_Residual(c, c, b), _Attention(b), _Resample(up=True)),
                _Stage(_Residual(2 * b, b, a), _Attention(a), _Resample(up=True)),
                _Stage(_Residual(2 * a, a, a)),
            ]
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        outputs = []
        for stage in self.d_blocks:
            x = stage(x, emb)
            outputs.append(x)
        x = self.u_blocks[0](x, emb)
        for stage, output in zip(self.u_blocks[1:], outputs[-2::-1], strict=True):
            x = stage(torch.cat([x, output], dim=1), emb)
        return x


@final
class _Stage(nn.ModuleList):
    """Layers of one resolution; those that have a condition get the embedding."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, _Residual | _Attention) else layer(x)
        return x


@final
class _AdaptiveNorm(nn.Module):
    """Group normalisation; scale and shift are linear in the embedding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = channels // 32
        self.mapper = _zero(nn.Linear(EMBEDDING, 2 * channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.mapper(emb)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, F.group_norm(x, self.groups), 1 + scale)


@final
class _Residual(nn.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self, cin: int, middle: int, cout: int) -> None:
        super().__init__()
        layers = {  # the numbers between these are k-diffusion's activations and dropout
            "0": _AdaptiveNorm(cin),
            "2": nn.Conv2d(cin, middle, 3, padding=1),
            "4": _AdaptiveNorm(middle),
            "6": _zero(nn.Conv2d(middle, cout, 3, padding=1)),
        }
        self.main = nn.ModuleDict(layers)
        self.skip: nn.Module = nn.Identity()
        if cin != cout:
            self.skip = _orthogonal(nn.Conv2d(cin, cout, 1, bias=False))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.main["2"](F.gelu(self.main["0"](x, emb)))
        h = self.main["6"](F.gelu(self.main["4"](h, emb)))
        return torch.add(h, self.skip(x))


@final
class _Attention(nn.Module):
    """Self-attention over all pixels, with one head for every 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // 64
        self.norm_in = _AdaptiveNorm(channels)
        self.qkv_proj = nn.Conv2d(channels, 3 * channels, 1)
        self.out_proj = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.norm_in(x, emb)).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.flatten(4).transpose(3, 4).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return torch.add(x, self.out_proj(out.transpose(2, 3).reshape(x.shape)))


@final
class _Resample(nn.Module):
    """Half or twice the resolution, by the taps (1, 3, 3, 1) in each channel."""

    kernel: Tensor

    def __init__(self, *, up: bool) -> None:
        super().__init__()
        self.up = up
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / (
            4 if up else 8
        )  # up, half of the samples are 0
        self.register_buffer("kernel", torch.outer(taps, taps))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        x = F.pad(x, (1, 1, 1, 1), "reflect")
        if self.up:
            return F.conv_transpose2d(x, weight, stride=2, padding=3, groups=x.shape[1])
        return F.conv2d(x, weight, stride=2, groups=x.shape[1])


@final
class _Fourier(nn.Module):
    """Cosines and sines of the noise level at random frequencies, which the weights store."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(EMBEDDING // 2, 1))

    def forward(self, level: Tensor) -> Tensor:
        phase = 2 * math.pi * level[:, None] @ self.weight.T
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


def _orthogonal(layer: Layer) -> Layer:
    nn.init.orthogonal_(layer.weight)
    return layer


def _zero(layer: Layer) -> Layer:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
