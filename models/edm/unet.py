"""The encoder and decoder shared by the U-Nets of Song et al. and of Dhariwal and Nichol.

Parameters have the names of the checkpoints of Karras et al. 2022 (arXiv 2206.00364), so that their
weights can be loaded. New networks have torch's default initialisation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checks import brief, check_numbers
from .layers import Block, Direction


@dataclass(frozen=True)
class UNetConfig(ABC):
    """Settings that both families share, named as in the published checkpoints.

    Args:
        img_resolution: height and width of the images.
        in_channels: channels of the input.
        out_channels: channels of the output.
        label_dim: number of classes; 0 for an unconditional network.
        augment_dim: size of the augmentation label used in training; 0 for none.
        model_channels: base number of channels.
        channel_mult: channels at each resolution, relative to `model_channels`; every resolution is
            half the previous one.
        channel_mult_emb: size of the conditioning vector, relative to `model_channels`.
        num_blocks: number of residual blocks at each resolution.
        attn_resolutions: resolutions with self-attention.
        dropout: dropout probability of activations in training.
        label_dropout: dropout probability of labels in training.

    Raises:
        ValueError: if a setting is not a number in its range, or if `img_resolution` cannot be
            halved for each entry of `channel_mult` but the first.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, default in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if default.type.startswith("tuple"):  # JSON and the checkpoints store lists
                value = tuple(value)
                object.__setattr__(self, name, value)
            numbers = value if isinstance(value, tuple) else (value,)
            if default.type in ("int", "tuple[int, ...]"):
                low = 0 if name in ("label_dim", "augment_dim") else 1
                if not all(type(n) is int and low <= n < 2**20 for n in numbers):
                    raise ValueError(f"{name} must be made of whole numbers, got {brief(value)}")
            elif default.type == "float":
                check_numbers(0, 1, **{name: value})
        halvings = len(self.channel_mult) - 1
        if halvings < 0 or self.img_resolution % 2**halvings:
            raise ValueError(
                f"img_resolution = {self.img_resolution} cannot be halved {halvings} times, as a "
                f"channel_mult of {halvings + 1} numbers asks"
            )

    @property
    def sizes(self) -> list[str]:
        """The resolutions from fine to coarse, as written in parameter names."""
        levels = (self.img_resolution >> k for k in range(len(self.channel_mult)))
        return [f"{n}x{n}" for n in levels]


class UNet(nn.Module, ABC):
    """The encoder and decoder of both families, which differ in blocks and auxiliary branches.

    As in the checkpoints, the encoder and the decoder are flat dictionaries with keys such as
    ``"16x16_block0"``.
    """

    attends_everywhere: bool
    """Whether all decoder blocks at an attention resolution have self-attention, or only the last."""

    def __init__(self, config: UNetConfig, first_width: int, taps: tuple[float, ...]) -> None:
        super().__init__()
        self.config = config
        self.label_dropout = config.label_dropout
        self._emb = config.model_channels * config.channel_mult_emb
        self._taps = taps
        sizes, blocks = config.sizes, range(config.num_blocks)
        widths = [config.model_channels * mult for mult in config.channel_mult]

        self.enc = nn.ModuleDict()
        width = first_width
        skips = [width]
        for k, (size, target) in enumerate(zip(sizes, widths, strict=True)):
            attend = config.img_resolution >> k in config.attn_resolutions
            if k == 0:
                self.enc[f"{size}_conv"] = nn.Conv2d(config.in_channels, width, 3, padding=1)
            else:
                self.enc[f"{size}_down"] = self._block(width, width, resample="down")
                skips.append(width)
            for b in blocks:
                self.enc[f"{size}_block{b}"] = self._block(width, target, attend=attend)
                width = target
                skips.append(width)

        self.dec = nn.ModuleDict()
        for k, (size, target) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            attend = config.img_resolution >> k in config.attn_resolutions
            if k == len(sizes) - 1:
                self.dec[f"{size}_in0"] = self._block(width, width, attend=True)
                self.dec[f"{size}_in1"] = self._block(width, width)
            else:
                self.dec[f"{size}_up"] = self._block(width, width, resample="up")
            for b in range(config.num_blocks + 1):
                here = attend and (b == config.num_blocks or self.attends_everywhere)
                cin = width + skips.pop()
                self.dec[f"{size}_block{b}"] = self._block(cin, target, attend=here)
                width = target

    @abstractmethod
    def _block(
        self, cin: int, cout: int, *, attend: bool = False, resample: Direction | None = None
    ) -> Block:
        """Make a residual block of this family."""

    @abstractmethod
    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Compute the conditioning vector ``(B, emb)``."""

    def inject(self, size: str, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Add the image to the features `x` at `size`; return them and the image for the next size."""
        return x, image

    @abstractmethod
    def emit(self, size: str, x: Tensor, image: Tensor | None) -> Tensor | None:
        """Update the output image from the decoder's features `x` at `size`; None before the first."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the convolutions, in which images are computed."""
        return next(self.enc.parameters()).dtype

    def compute_in(self, dtype: torch.dtype) -> None:
        """Convert the network to compute images in `dtype`, and embeddings in at least float32.

        The phases of the noise embedding reach 10³, too large for half precision.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
                module.to(dtype)
            elif isinstance(module, nn.Linear):
                module.to(torch.promote_types(dtype, torch.float32))

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Compute the raw output of the network.

        Args:
            x: ``(B, in_channels, R, R)`` in `dtype`.
            noise: noise labels ``(B,)``, float32 or float64.
            labels: one-hot ``(B, label_dim)`` if and only if the network is conditional.
            augment: ``(B, augment_dim)``; None outside training.

        Returns:
            ``(B, out_channels, R, R)`` in `dtype`.
        """
        emb = self.embed(noise, labels, augment)
        sizes, blocks = self.config.sizes, range(self.config.num_blocks)
        image, skips = x, []
        for k, size in enumerate(sizes):
            if k == 0:
                x = self.enc[f"{size}_conv"](x)
            else:
                x, image = self.inject(size, self.enc[f"{size}_down"](x, emb), image)
            skips.append(x)
            for b in blocks:
                x = self.enc[f"{size}_block{b}"](x, emb)
                skips.append(x)
        result: Tensor | None = None
        for k, size in enumerate(reversed(sizes)):
            if k == 0:
                x = self.dec[f"{size}_in1"](self.dec[f"{size}_in0"](x, emb), emb)
            else:
                x = self.dec[f"{size}_up"](x, emb)
            for b in range(self.config.num_blocks + 1):
                x = self.dec[f"{size}_block{b}"](torch.cat([x, skips.pop()], dim=1), emb)
            result = self.emit(size, x, result)
        assert result is not None
        return result

    def _drop_labels(self, labels: Tensor) -> Tensor:
        """Set labels to zero at random, in training only."""
        if not (self.training and self.label_dropout):
            return labels
        keep = torch.rand(labels.shape[0], 1, device=labels.device) >= self.label_dropout
        return labels * keep.to(labels.dtype)
