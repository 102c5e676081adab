"""Layers of the U-Nets: resampling, residual blocks and embeddings of the noise level."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Direction: TypeAlias = Literal["up", "down"]
"""Direction of a change of resolution."""


def _blur(taps: tuple[float, ...]) -> Tensor:
    """The normalised separable filter with the given taps, shape (1, 1, n, n)."""
    row = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(row, row)[None, None] / row.sum() ** 2


def _resample(x: Tensor, blur: Tensor, direction: Direction, *, pad: bool = True) -> Tensor:
    """Halve or double the resolution of `x`, filtering each channel with `blur`."""
    kernel = blur.to(x.dtype).expand(x.shape[1], 1, -1, -1)
    padding = (blur.shape[-1] - 1) // 2 if pad else 0
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
    # The factor 4 compensates for the zeros, three in four samples, that upsampling inserts.
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])


@final
class Resample(nn.Module):
    """A change of resolution without learned parameters."""

    resample_filter: Tensor

    def __init__(self, direction: Direction, taps: tuple[float, ...]) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", _blur(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Resample `x`."""
        return _resample(x, self.resample_filter, self.direction)


@final
class ResampleConv(nn.Conv2d):
    """A change of resolution followed by a convolution."""

    resample_filter: Tensor

    def __init__(
        self, cin: int, cout: int, kernel: int, direction: Direction, taps: tuple[float, ...]
    ) -> None:
        super().__init__(cin, cout, kernel, padding=kernel // 2)
        self.direction = direction
        self.register_buffer("resample_filter", _blur(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Resample `x`, then convolve it."""
        return super().forward(_resample(x, self.resample_filter, self.direction))


@final
class ConvDown(nn.Conv2d):
    """A convolution followed by downsampling, with all padding in the convolution."""

    resample_filter: Tensor

    def __init__(self, cin: int, cout: int, kernel: int, taps: tuple[float, ...]) -> None:
        super().__init__(cin, cout, kernel, padding=kernel // 2 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", _blur(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`, then downsample it."""
        return _resample(super().forward(x), self.resample_filter, "down", pad=False)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with at most 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


def _attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention over all pixels: ``(B, 3 C, H, W)`` to ``(B, C, H, W)``."""
    batch, channels, height, width = qkv.shape
    # The channels are ordered as (head, channel of the head, q / k / v).
    parts = qkv.reshape(batch, heads, -1, 3, height * width).permute(3, 0, 1, 4, 2).contiguous()
    q, k, v = parts.unbind()
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(2, 3).reshape(batch, channels // 3, height, width)


@final
class Block(nn.Module):
    """A residual block with a conditioning vector, followed by self-attention if `heads` > 0.

    Args:
        cin: channels of the input.
        cout: channels of the output.
        emb: size of the conditioning vector.
        heads: number of attention heads; 0 for no attention.
        resample: direction of a change of resolution in the block, or None.
        taps: filter taps of the change of resolution.
        adaptive: whether conditioning scales and shifts the output of the second normalisation;
            otherwise it shifts the input.
        learned_skip: whether the skip connection has a convolution if the resolution changes;
            otherwise only if the number of channels changes.
        scale: factor of every residual sum.
        eps: epsilon of the normalisations.
        dropout: dropout probability in training.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        emb: int,
        *,
        heads: int,
        resample: Direction | None,
        taps: tuple[float, ...],
        adaptive: bool,
        learned_skip: bool,
        scale: float,
        eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.adaptive_scale, self.skip_scale, self.dropout = adaptive, scale, dropout
        self.num_heads = heads

        def conv(kernel: int) -> nn.Module:
            if resample is None:
                return nn.Conv2d(cin, cout, kernel, padding=kernel // 2)
            return ResampleConv(cin, cout, kernel, resample, taps)

        self.norm0 = group_norm(cin, eps)
        self.conv0 = conv(3)
        self.affine = nn.Linear(emb, 2 * cout if adaptive else cout)
        self.norm1 = group_norm(cout, eps)
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip: nn.Module = nn.Identity()
        if cin != cout or (resample is not None and learned_skip):
            self.skip = conv(1)
        elif resample is not None:
            self.skip = Resample(resample, taps)
        if heads:
            self.norm2 = group_norm(cout, eps)
            self.qkv = nn.Conv2d(cout, 3 * cout, 1)
            self.proj = nn.Conv2d(cout, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map `x` ``(B, cin, H, W)`` and `emb` ``(B, emb)`` to ``(B, cout, H', W')``."""
        h = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + condition)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = (self.skip(x) + h) * self.skip_scale
        if self.num_heads:
            x = (x + self.proj(_attend(self.qkv(self.norm2(x)), self.num_heads))) * self.skip_scale
        return x


@final
class PositionalEmbedding(nn.Module):
    """Cosines and sines of the noise label at frequencies from 1 to about 1e-4."""

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.channels = channels
        self.endpoint = endpoint

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Embed `noise` ``(B,)`` as cosines and sines, each ``(B, channels / 2)``."""
        n = self.channels // 2
        k = torch.arange(n, dtype=noise.dtype, device=noise.device)
        phase = torch.outer(noise, (1 / 10000) ** (k / (n - 1 if self.endpoint else n)))
        return phase.cos(), phase.sin()


@final
class FourierEmbedding(nn.Module):
    """Cosines and sines of the noise label at random frequencies, which checkpoints store."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Embed `noise` ``(B,)`` as cosines and sines, each ``(B, channels / 2)``."""
        if self.freqs.dtype.itemsize < 4:
            raise TypeError(
                f"the frequencies of the noise embedding were rounded to {self.freqs.dtype}; convert "
                "with load_edm(..., dtype=...), which keeps them, and not with .to() or .half()"
            )
        phase = torch.outer(noise, (2 * math.pi * self.freqs).to(noise.dtype))
        return phase.cos(), phase.sin()
