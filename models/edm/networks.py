"""The U-Nets of "Elucidating the design space of diffusion-based generative models".

DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456, appendix H) are the two ends of `SongUNet`;
ADM (Dhariwal and Nichol 2021, arXiv 2105.05233) is `DhariwalUNet`. Parameters carry the names of the
checkpoints that Karras et al. 2022 (arXiv 2206.00364) published, so that their weights fit. They are
here to be loaded: a new network starts from torch's own initialisation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Direction: TypeAlias = Literal["up", "down"]


@dataclass(frozen=True)
class UNetConfig(ABC):
    """What both families are built from; the names are those of the published checkpoints.

    Args:
        img_resolution: height and width of the images.
        in_channels: channels of the input.
        out_channels: channels of the output.
        label_dim: number of classes; 0 for an unconditional network.
        augment_dim: size of the augmentation label that training supplied; 0 for none.
        model_channels: the width that `channel_mult` multiplies.
        channel_mult: one factor for each resolution, each half the one before.
        channel_mult_emb: width of the conditioning vector over `model_channels`.
        num_blocks: residual blocks at each resolution.
        attn_resolutions: the resolutions that have self-attention.
        dropout: of activations, in training.
        label_dropout: probability of training without the label.
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
            if default.type.startswith("tuple"):  # JSON and the checkpoints have lists
                value = tuple(value)
                object.__setattr__(self, name, value)
            numbers = value if isinstance(value, tuple) else (value,)
            if default.type in ("int", "tuple[int, ...]"):
                low = 0 if name in ("label_dim", "augment_dim") else 1
                if not all(type(n) is int and low <= n < 2**20 for n in numbers):
                    raise ValueError(f"{name} must be made of whole numbers, got {value!r}")
        halvings = len(self.channel_mult) - 1
        if halvings < 0 or self.img_resolution % 2**halvings:
            raise ValueError(
                f"img_resolution = {self.img_resolution} cannot be halved {halvings} times, as "
                f"channel_mult = {self.channel_mult} asks"
            )

    @property
    def sizes(self) -> list[str]:
        """The resolutions from fine to coarse, as they stand in parameter names."""
        levels = (self.img_resolution >> k for k in range(len(self.channel_mult)))
        return [f"{n}x{n}" for n in levels]


@final
@dataclass(frozen=True)
class SongConfig(UNetConfig):
    """DDPM++ by default; NCSN++ has "fourier", 2, "residual" and (1, 3, 3, 1) for what follows.

    Args:
        embedding_type: how the noise level is embedded.
        channel_mult_noise: width of that embedding over `model_channels`.
        encoder_type: "skip" and "residual" also feed the shrunken image into the encoder.
        decoder_type: "skip" sums images over all resolutions.
        resample_filter: the separable blur of every change of resolution.
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
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        taps = self.resample_filter
        if len(taps) % 2 or not all(isinstance(t, (int, float)) for t in taps) or sum(taps) <= 0:
            raise ValueError(f"resample_filter must be an even number of weights, got {taps}")


@final
@dataclass(frozen=True)
class DhariwalConfig(UNetConfig):
    """ADM, as it was trained on ImageNet at 64x64."""

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)


def _blur(taps: tuple[float, ...]) -> Tensor:
    """The separable filter with the given taps, shape (1, 1, n, n), of sum 1."""
    row = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(row, row)[None, None] / row.sum() ** 2


def _resample(x: Tensor, blur: Tensor, direction: Direction, *, pad: bool = True) -> Tensor:
    """Half or twice the resolution, each channel filtered by `blur`."""
    kernel = blur.to(x.dtype).expand(x.shape[1], 1, -1, -1)
    padding = (blur.shape[-1] - 1) // 2 if pad else 0
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
    # Three of four samples between which the filter interpolates are 0: 4 makes up for them.
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])


@final
class Resample(nn.Module):
    """A change of resolution with nothing to learn."""

    resample_filter: Tensor

    def __init__(self, direction: Direction, taps: tuple[float, ...]) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", _blur(taps))

    def forward(self, x: Tensor) -> Tensor:
        """`x` at the new resolution."""
        return _resample(x, self.resample_filter, self.direction)


@final
class ResampleConv(nn.Conv2d):
    """A convolution at the new resolution."""

    resample_filter: Tensor

    def __init__(
        self, cin: int, cout: int, kernel: int, direction: Direction, taps: tuple[float, ...]
    ) -> None:
        super().__init__(cin, cout, kernel, padding=kernel // 2)
        self.direction = direction
        self.register_buffer("resample_filter", _blur(taps))

    def forward(self, x: Tensor) -> Tensor:
        """`x` resampled, then convolved."""
        return super().forward(_resample(x, self.resample_filter, self.direction))


@final
class ConvDown(nn.Conv2d):
    """A convolution, then half the resolution: all padding goes to the convolution."""

    resample_filter: Tensor

    def __init__(self, cin: int, cout: int, kernel: int, taps: tuple[float, ...]) -> None:
        super().__init__(cin, cout, kernel, padding=kernel // 2 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", _blur(taps))

    def forward(self, x: Tensor) -> Tensor:
        """`x` convolved, then resampled."""
        return _resample(super().forward(x), self.resample_filter, "down", pad=False)


def _norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


def _attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention over all pixels: ``(B, 3 C, H, W)`` to ``(B, C, H, W)``."""
    batch, channels, height, width = qkv.shape
    # Channels are ordered (head, channel of the head, q / k / v).
    parts = qkv.reshape(batch, heads, -1, 3, height * width).permute(3, 0, 1, 4, 2).contiguous()
    q, k, v = parts.unbind()
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(2, 3).reshape(batch, channels // 3, height, width)


@final
class Block(nn.Module):
    """A residual block conditioned on `emb`, with self-attention after it where `heads` > 0.

    Args:
        cin: channels of the input.
        cout: channels of the output.
        emb: size of the conditioning vector.
        heads: attention heads.
        resample: change the resolution on the way.
        taps: the filter of that change.
        adaptive: condition by scale and shift of the second normalisation, else by a shift before
            it.
        learned_skip: convolve the shortcut wherever the resolution changes, else only where the
            width does.
        scale: factor of every residual sum.
        eps: of the normalisations.
        dropout: in training.
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

        self.norm0 = _norm(cin, eps)
        self.conv0 = conv(3)
        self.affine = nn.Linear(emb, 2 * cout if adaptive else cout)
        self.norm1 = _norm(cout, eps)
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip: nn.Module = nn.Identity()
        if cin != cout or (resample is not None and learned_skip):
            self.skip = conv(1)
        elif resample is not None:
            self.skip = Resample(resample, taps)
        if heads:
            self.norm2 = _norm(cout, eps)
            self.qkv = nn.Conv2d(cout, 3 * cout, 1)
            self.proj = nn.Conv2d(cout, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`x` ``(B, cin, H, W)`` to ``(B, cout, H', W')``; `emb` ``(B, emb)``."""
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
    """Cosines and sines of the noise label at frequencies from 1 down to about 1e-4."""

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.channels = channels
        self.endpoint = endpoint

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """For `noise` ``(B,)``, two tensors ``(B, channels / 2)``."""
        n = self.channels // 2
        k = torch.arange(n, dtype=noise.dtype, device=noise.device)
        phase = torch.outer(noise, (1 / 10000) ** (k / (n - 1 if self.endpoint else n)))
        return phase.cos(), phase.sin()


@final
class FourierEmbedding(nn.Module):
    """Cosines and sines of the noise label at random frequencies, part of the checkpoint."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """For `noise` ``(B,)``, two tensors ``(B, channels / 2)``."""
        if self.freqs.dtype.itemsize < 4:
            raise TypeError(
                f"the frequencies of the noise embedding were rounded to {self.freqs.dtype}; convert "
                "with load_edm(..., dtype=...), which keeps them, and not with .to() or .half()"
            )
        phase = torch.outer(noise, (2 * math.pi * self.freqs).to(noise.dtype))
        return phase.cos(), phase.sin()


class UNet(nn.Module, ABC):
    """The encoder and decoder that both families share; they differ in blocks and side branches.

    Encoder and decoder are flat dictionaries, ``"16x16_block0"`` and so on, because the checkpoints
    have them so; the passes below walk them by resolution.
    """

    attends_everywhere: bool
    """Whether all blocks of the decoder attend at an attention resolution, or only the last."""

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
        """A block of this family."""

    @abstractmethod
    def embed(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """The conditioning vector ``(B, emb)``."""

    def inject(self, size: str, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Feed the image into the encoder at `size`; the sum, and the image to carry on with."""
        return x, image

    @abstractmethod
    def emit(self, size: str, x: Tensor, image: Tensor | None) -> Tensor | None:
        """The output image as known when the decoder has finished `size`."""

    @property
    def dtype(self) -> torch.dtype:
        """What the images are computed in: that of the convolutions."""
        return next(self.enc.parameters()).dtype

    def compute_in(self, dtype: torch.dtype) -> None:
        """Compute images in `dtype`, and the noise embedding in float32 or better.

        Phases of the embedding reach 10³: half precision would leave nothing of them.
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
        """The raw output of the network.

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

    def _drop(self, labels: Tensor) -> Tensor:
        """Leave out labels at random, in training."""
        if not (self.training and self.label_dropout):
            return labels
        keep = torch.rand(labels.shape[0], 1, device=labels.device) >= self.label_dropout
        return labels * keep.to(labels.dtype)


@final
class SongUNet(UNet):
    """DDPM++ and NCSN++, and what lies between."""

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
            self.dec[f"{size}_aux_norm"] = _norm(widths[k], 1e-6)
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
        """Noise, label and augmentation are summed, then mapped."""
        cos, sin = self.map_noise(noise)
        emb = torch.cat([sin, cos], dim=1).to(self.map_layer0.weight.dtype)
        if self.map_label is not None and labels is not None:
            # One-hot vectors are brought to unit variance.
            emb = emb + self.map_label(
                self._drop(labels).to(emb.dtype) * math.sqrt(labels.shape[1])
            )
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))

    def inject(self, size: str, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing in DDPM++; in NCSN++ the convolved image, averaged into the features."""
        if f"{size}_aux_residual" in self.enc:
            x = (x + self.enc[f"{size}_aux_residual"](image)) * math.sqrt(0.5)
            return x, x
        if f"{size}_aux_skip" in self.enc:
            image = self.enc[f"{size}_aux_down"](image)
            return x + self.enc[f"{size}_aux_skip"](image), image
        return x, image

    def emit(self, size: str, x: Tensor, image: Tensor | None) -> Tensor | None:
        """The image at the finest resolution, or a running sum over all."""
        if f"{size}_aux_conv" not in self.dec:
            return None
        out: Tensor = self.dec[f"{size}_aux_conv"](F.silu(self.dec[f"{size}_aux_norm"](x)))
        return out if image is None else out + self.dec[f"{size}_aux_up"](image)


@final
class DhariwalUNet(UNet):
    """ADM."""

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
        self.out_norm = _norm(finest, 1e-5)
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
        """The label joins after the noise has been mapped."""
        emb = torch.cat(self.map_noise(noise), dim=1).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(self._drop(labels).to(emb.dtype))
        return F.silu(emb)

    def emit(self, size: str, x: Tensor, image: Tensor | None) -> Tensor | None:
        """The image, once the finest resolution is done."""
        if size != self.config.sizes[0]:
            return None
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return out
