"""ADM, the U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Block, Direction, PositionalEmbedding, group_norm
from .unet import UNet, UNetConfig


@final
@dataclass(frozen=True)
class DhariwalConfig(UNetConfig):
    """Settings of ADM; the defaults are those for ImageNet at 64x64. See `UNetConfig`."""

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)


@final
class DhariwalUNet(UNet):
    """ADM; see `DhariwalConfig`."""

    attends_everywhere = True

    def __init__(self, config: DhariwalConfig) -> None:
        width, finest = config.model_channels, config.model_channels * config.channel_mult[0]
        super().__init__(config, finest, (1, 1))
        emb = self._emb
        self.map_noise = PositionalEmbedding(width, endpoint=False)
        self.map_augment = (
            nn.Linear(config.augment_dim, width, bias=False) if config.augment_dim else None
        )
        self.map_layer0 = nn.Linear(width, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.map_label = nn.Linear(config.label_dim, emb, bias=False) if config.label_dim else None
        self.out_norm = group_norm(finest, 1e-5)
        self.out_conv = nn.Conv2d(finest, config.out_channels, 3, padding=1)

    def _block(
        self, cin: int, cout: int, *, attend: bool = False, resample: Direction | None = None
    ) -> Block:
        return Block(
            cin,
            cout,
            self._emb,
            heads=cout // 64 if attend else 0,
            resample=resample,
            taps=self._taps,
            adaptive=True,
            learned_skip=False,
            scale=1.0,
            eps=1e-5,
            dropout=self.config.dropout,
        )

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Map the embedding of noise and augmentation, then add that of the label."""
        emb = torch.cat(self.map_noise(noise), dim=1).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(self._drop_labels(labels).to(emb.dtype))
        return F.silu(emb)

    def emit(self, size: str, x: Tensor, image: Tensor | None) -> Tensor | None:
        """Compute the image at the finest resolution."""
        if size != self.config.sizes[0]:
            return None
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return out
