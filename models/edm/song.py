"""DDPM++ and NCSN++, the U-Nets of Song et al. 2021 (arXiv 2011.13456, appendix H)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import brief
from .layers import (
    Block,
    ConvDown,
    Direction,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    group_norm,
)
from .unet import UNet, UNetConfig


@final
@dataclass(frozen=True)
class SongConfig(UNetConfig):
    """Settings of DDPM++ (the defaults) and NCSN++.

    NCSN++ has `embedding_type` "fourier", `channel_mult_noise` 2, `encoder_type` "residual" and
    `resample_filter` (1, 3, 3, 1). The other settings are those of `UNetConfig`.

    Args:
        embedding_type: type of the noise level embedding.
        channel_mult_noise: size of that embedding, relative to `model_channels`.
        encoder_type: with "skip" and "residual", the downsampled image is also an input at each
            resolution of the encoder.
        decoder_type: with "skip", the output is a sum of images from all resolutions.
        resample_filter: taps of the separable filter used in every change of resolution.

    Raises:
        ValueError: if a setting is out of range.
    """

    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: tuple[float, ...] = (1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("embedding_type", ("positional", "fourier")),
            ("encoder_type", ("standard", "skip", "residual")),
            ("decoder_type", ("standard", "skip")),
        ):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {brief(getattr(self, name))}")
        taps = self.resample_filter
        numbers = all(type(t) in (int, float) and abs(t) < 1e6 for t in taps)
        if len(taps) % 2 or not numbers or not sum(taps) > 0:
            raise ValueError(
                "resample_filter must be an even number of weights with a sum above 0, got "
                f"{', '.join(brief(t) for t in taps[:4])}{', ...' if len(taps) > 4 else ''}"
            )


@final
class SongUNet(UNet):
    """DDPM++, NCSN++ and combinations of their parts; see `SongConfig`."""

    attends_everywhere = False

    def __init__(self, config: SongConfig) -> None:
        super().__init__(config, config.model_channels, config.resample_filter)
        noise = config.model_channels * config.channel_mult_noise
        self.map_noise: nn.Module = (
            FourierEmbedding(noise)
            if config.embedding_type == "fourier"
            else PositionalEmbedding(noise, endpoint=True)
        )
        self.map_label = nn.Linear(config.label_dim, noise) if config.label_dim else None
        self.map_augment = (
            nn.Linear(config.augment_dim, noise, bias=False) if config.augment_dim else None
        )
        self.map_layer0 = nn.Linear(noise, self._emb)
        self.map_layer1 = nn.Linear(self._emb, self._emb)

        widths = [config.model_channels * mult for mult in config.channel_mult]
        image = config.in_channels
        for k, size in enumerate(config.sizes[1:]):
            if config.encoder_type == "residual":
                down = ConvDown(image, widths[k], 3, self._taps)
                self.enc[f"{size}_aux_residual"] = down
                image = widths[k]
            elif config.encoder_type == "skip":
                self.enc[f"{size}_aux_down"] = Resample("down", self._taps)
                self.enc[f"{size}_aux_skip"] = nn.Conv2d(image, widths[k], 1)
        coarsest = len(widths) - 1 if config.decoder_type == "skip" else 0
        for k, size in enumerate(config.sizes[: coarsest + 1]):
            self.dec[f"{size}_aux_norm"] = group_norm(widths[k], 1e-6)
            self.dec[f"{size}_aux_conv"] = nn.Conv2d(widths[k], config.out_channels, 3, padding=1)
            if k < coarsest:
                self.dec[f"{size}_aux_up"] = Resample("up", self._taps)

    def _block(
        self, cin: int, cout: int, *, attend: bool = False, resample: Direction | None = None
    ) -> Block:
        return Block(
            cin,
            cout,
            self._emb,
            heads=int(attend),
            resample=resample,
            taps=self._taps,
            adaptive=False,
            learned_skip=True,
            scale=math.sqrt(0.5),
            eps=1e-6,
            dropout=self.config.dropout,
        )

    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Sum the embeddings of noise, label and augmentation, then map the sum."""
        cos, sin = self.map_noise(noise)
        emb = torch.cat([sin, cos], dim=1).to(self.map_layer0.weight.dtype)
        if self.map_label is not None and labels is not None:
            # One-hot vectors are scaled to unit variance.
            emb = emb + self.map_label(
                self._drop_labels(labels).to(emb.dtype) * math.sqrt(labels.shape[1])
            )
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))

    def inject(self, size: str, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Add the downsampled image to the features, in NCSN++ after a convolution; none in DDPM++."""
        if f"{size}_aux_residual" in self.enc:
            x = (x + self.enc[f"{size}_aux_residual"](image)) * math.sqrt(0.5)
            return x, x
        if f"{size}_aux_skip" in self.enc:
            image = self.enc[f"{size}_aux_down"](image)
            return x + self.enc[f"{size}_aux_skip"](image), image
        return x, image

    def emit(self, size: str, x: Tensor, image: Tensor | None) -> Tensor | None:
        """Compute the image at the finest resolution, or with "skip" a running sum over all."""
        if f"{size}_aux_conv" not in self.dec:
            return None
        out: Tensor = self.dec[f"{size}_aux_conv"](F.silu(self.dec[f"{size}_aux_norm"](x)))
        return out if image is None else out + self.dec[f"{size}_aux_up"](image)
