"""Networks of one's own as denoisers: discrete and continuous schedules, and EDM's preconditioning."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from odesolvers.grids import karras_sigmas, vp_sigmas
from odesolvers.values import count, number, row

from .base import check_floating_dtype, check_levels
from .formulas import Network, check_prediction_name, edm_denoise, evaluate, vp_denoise
from .schedules import DiscreteSchedule, Final, Spacing


class NetworkDenoiser(nn.Module, ABC):
    """A network and the formula that makes it a denoiser ``denoiser(x, sigma, **extra_args)``."""

    prediction: str
    """What the network predicts."""

    sigma_min: float
    """The lowest noise level that the network knows."""

    sigma_max: float
    """The highest noise level that the network knows."""

    learned_variance = False

    def __init__(self, network: Callable[..., Any], dtype: torch.dtype | None) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(f"network must be callable, got {type(network).__name__}")
        if dtype is not None:
            check_floating_dtype(dtype)
        self.network = network
        self.dtype = dtype

    @abstractmethod
    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean by a network that has its conditions, in the wider dtype."""

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The posterior mean ``E[x0 | x]``.

        Args:
            x: noisy states ``(B, ...)``.
            sigma: their noise levels ``(B,)``, from `sigma_min` to `sigma_max`. On a GPU they cannot be
                checked without a synchronisation: a level out of range gives NaN, which the solvers
                report with the level.
            extra_args: further arguments of the network.

        Returns:
            Denoised states with the shape and dtype of `x`.

        Raises:
            TypeError: if the network does not return a tensor.
            ValueError: if (on the CPU) a level is out of range, or if the output of the network does
                not have the shape of `x`.
        """
        inside = check_levels(sigma, self.sigma_min, self.sigma_max)
        dtype = self.dtype or x.dtype

        def network(z: Tensor, t: Tensor) -> Tensor:
            return evaluate(
                self.network, z, t, dtype, extra_args, learned_variance=self.learned_variance
            )

        return self.denoise(network, x, torch.where(inside, sigma, torch.nan)).to(x.dtype)


@final
class DiscreteDenoiser(NetworkDenoiser):
    """A network of discrete timesteps, as of DDPM, with its ᾱ, as a denoiser.

    The network sees ``z = x / sqrt(1 + σ²)`` and t, where ``σ_t = sqrt((1 - ᾱ_t) / ᾱ_t)``. Its output f
    gives ``D = x - σ f`` (epsilon), ``D = (z - σ f) / sqrt(1 + σ²)`` (v), ``D = f`` (sample), or
    ``D = x + σ² f / sqrt(1 + σ²)`` (score). At the training levels t is that integer as a floating point
    number; between them, where multi-stage methods evaluate, it is interpolated in log σ. These are the
    formulas of `StableDiffusion`, of k-diffusion's `DiscreteEpsDDPMDenoiser` and
    `DiscreteVDDPMDenoiser`, and with `learned_variance` of its `OpenAIDenoiser`::

        denoiser = DiscreteDenoiser(unet, scheduler.alphas_cumprod, "epsilon")
        sigmas = denoiser.sigmas(20)
        x = init_noise((4, 3, 32, 32), sigmas)
        solution = BDIA(DDIM()).sample(denoiser, x, sigmas)

    Args:
        network: ``network(z, t, **extra_args) -> f`` with `z` of shape ``(B, ...)`` and `t` of shape
            ``(B,)``. The models of diffusers can be given as they are.
        alphas_cumprod: ᾱ of every timestep, ``(T,)``, decreasing, from nearly 1 to nearly 0; 0 (zero
            terminal SNR, an infinite level) becomes 2^-40, the level 2^20.
        prediction: "epsilon", "v_prediction", "sample" or "score" (that of z).
        quantize: whether `t` is the nearest timestep, int64, at every level, for networks that look it
            up in a table. Use methods that evaluate at levels of the grid alone then (`DDIM`,
            `HeunEDM`), on `sigmas`.
        learned_variance: whether the network returns twice the channels, of which the second half, its
            variances, is left out.
        dtype: the dtype of `z` in calls of the network; by default that of the state. Floating point
            `t` is float64 beside float64 and float32 otherwise.

    Raises:
        TypeError: if `network` is not callable, `dtype` is not a floating point dtype, or
            `alphas_cumprod` is a scheduler.
        ValueError: if `prediction` is unknown, cannot be made of pure noise, or if `alphas_cumprod` is
            another row of numbers than that.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        alphas_cumprod: Tensor | Sequence[float],
        prediction: str = "epsilon",
        *,
        quantize: bool = False,
        learned_variance: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(network, dtype)
        self.prediction = check_prediction_name(prediction)
        if hasattr(alphas_cumprod, "alphas_cumprod") or isinstance(alphas_cumprod, Mapping):
            raise TypeError(
                f"alphas_cumprod must be a row of numbers, got a {type(alphas_cumprod).__name__}: pass "
                "scheduler.alphas_cumprod"
            )
        alphas = _check_alphas(row("alphas_cumprod", alphas_cumprod, torch.float64), prediction)
        self.schedule = DiscreteSchedule(
            alphas, prediction, spacing="trailing", offset=0, final="zero"
        )
        self.sigma_min, self.sigma_max = self.schedule.sigma_min, self.schedule.sigma_max
        self.quantize, self.learned_variance = quantize, learned_variance

    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        return vp_denoise(self.prediction, network, x, sigma, self.timestep(sigma))

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep that the network sees at each level, ``(B,)``."""
        t = self.schedule.timestep(sigma)
        return t.nan_to_num().round().long() if self.quantize else t

    def sigmas(self, n: int, *, spacing: Spacing = "trailing", final: Final = "zero") -> Tensor:
        """A grid of `n` steps on training levels, float64 on the CPU.

        Args:
            n: number of steps.
            spacing: of `ddim_timesteps`. "trailing" starts at the last timestep whatever `n`, where the
                network saw nearly pure noise, as Lin et al. 2023 (arXiv 2305.08891) recommend.
            final: the last level: 0 or, with "first", that of timestep 0.

        Raises:
            ValueError: if `n` or `spacing` does not fit the schedule.
        """
        return self.schedule.sigmas(n, spacing, final)


@final
class VPDenoiser(NetworkDenoiser):
    """A network of the continuous variance-preserving process of Song et al. 2021 as a denoiser.

    The process (arXiv 2011.13456, appendix C) has ``β(t) = β_min + t (β_max - β_min)`` for t in [0, 1],
    so that ``σ(t)² = exp(t² (β_max - β_min) / 2 + t β_min) - 1``. The network sees
    ``z = x / sqrt(1 + σ²)`` and t; predictions are those of `DiscreteDenoiser`. The networks of Song's
    score_sde see 999 t and predict the noise: ``VPDenoiser(lambda z, t: net(z, 999 * t))``. Its score
    functions, ``score(z, t)`` from `get_score_fn`, are ``VPDenoiser(score, "score")``.

    Args:
        network: ``network(z, t, **extra_args)`` with `t` of shape ``(B,)``.
        prediction: "epsilon", "v_prediction", "sample" or "score".
        beta_min, beta_max: β at t = 0 and t = 1.
        t_min: the lowest time, above 0; 1e-3 as in sampling by Song et al.
        dtype: see `DiscreteDenoiser`.

    Raises:
        TypeError, ValueError: if an argument is wrong.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        prediction: str = "epsilon",
        *,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        t_min: float = 1e-3,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(network, dtype)
        self.prediction = check_prediction_name(prediction)
        beta_min, beta_max = number("beta_min", beta_min), number("beta_max", beta_max)
        if not (0 < beta_min <= beta_max and 2 < beta_min + beta_max < 100):
            raise ValueError(
                "needs 0 < beta_min <= beta_max and a sum between 2 and 100, for a highest level of "
                f"noise, got beta_min = {beta_min} and beta_max = {beta_max}; the betas of discrete "
                "timesteps are for DiscreteDenoiser(network, torch.cumprod(1 - betas, 0))"
            )
        self.beta_min, self.beta_max, self.t_min = beta_min, beta_max, number("t_min", t_min)
        self.sigma_max, self.sigma_min = self.sigmas(2)[:2].tolist()
        _check_highest(prediction, self.sigma_max)

    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        return vp_denoise(self.prediction, network, x, sigma, self.time(sigma))

    def time(self, sigma: Tensor) -> Tensor:
        """The time t of noise levels."""
        growth = torch.log1p(sigma**2)
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * growth)
        return 2 * growth / (self.beta_min + root)  # the root of the quadratic without cancellation

    def sigmas(self, n: int) -> Tensor:
        """`vp_sigmas`: `n` levels evenly spaced in t from 1 to `t_min`, and 0."""
        return vp_sigmas(n, self.beta_max - self.beta_min, self.beta_min, self.t_min)


@final
class CosineDenoiser(NetworkDenoiser):
    """A network of the continuous cosine process ``z = cos(π t / 2) x0 + sin(π t / 2) ε`` as a denoiser.

    This is k-diffusion's `VDenoiser`, of the networks of v-diffusion-pytorch: ``σ = tan(π t / 2)``, and
    the network sees ``z = x / sqrt(1 + σ²)`` and t in (0, 1). Networks that see the logarithm of the
    signal-to-noise ratio instead, which is ``-2 log tan(π t / 2)`` here, convert t themselves.

    Args:
        network: ``network(z, t, **extra_args)`` with `t` of shape ``(B,)``.
        prediction: "epsilon", "v_prediction", "sample" or "score", as of `DiscreteDenoiser`.
        sigma_min, sigma_max: the range of levels.
        dtype: see `DiscreteDenoiser`.

    Raises:
        TypeError, ValueError: if an argument is wrong.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        prediction: str = "v_prediction",
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(network, dtype)
        self.prediction = check_prediction_name(prediction)
        self.sigma_min, self.sigma_max = _check_range(sigma_min, sigma_max)
        _check_highest(prediction, self.sigma_max)

    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        return vp_denoise(self.prediction, network, x, sigma, self.time(sigma))

    def time(self, sigma: Tensor) -> Tensor:
        """The time t of noise levels."""
        return sigma.atan() * (2 / math.pi)

    def sigmas(self, n: int) -> Tensor:
        """`n` levels evenly spaced in t from `sigma_max` to `sigma_min`, and 0."""
        return cosine_sigmas(n, self.sigma_min, self.sigma_max)


@final
class EDMDenoiser(NetworkDenoiser):
    """A raw network F under the preconditioning of Karras et al. 2022 (arXiv 2206.00364) as a denoiser.

    ``D(x, σ) = c_skip x + c_out F(c_in x, log(σ) / 4)`` with ``c_in = 1 / sqrt(σ² + σ_data²)``,
    ``c_skip = σ_data² c_in²`` and ``c_out = σ σ_data c_in``. k-diffusion's `layers.Denoiser` is the same
    but shows its network σ: ``EDMDenoiser(lambda z, c: net(z, (4 * c).exp()))``. NVlabs' own networks
    have their preconditioning inside and are denoisers as they are.

    Args:
        network: ``network(z, c_noise, **extra_args) -> F`` with `c_noise` of shape ``(B,)``.
        sigma_data: the standard deviation of the data.
        sigma_min, sigma_max: the range of levels.
        dtype: see `DiscreteDenoiser`.

    Raises:
        TypeError, ValueError: if an argument is wrong.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        sigma_data: float = 0.5,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(network, dtype)
        self.sigma_data = number("sigma_data", sigma_data)
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be above 0 and finite, got {sigma_data}")
        self.sigma_min, self.sigma_max = _check_range(sigma_min, sigma_max)

    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        return edm_denoise(network, x, sigma, sigma.log() / 4, sigma_data=self.sigma_data)

    def sigmas(self, n: int) -> Tensor:
        """`karras_sigmas` from `sigma_max` to `sigma_min`, and 0."""
        return karras_sigmas(n, self.sigma_min, self.sigma_max)


def cosine_sigmas(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    """`n` levels ``tan(π t / 2)`` evenly spaced in t from `sigma_max` to `sigma_min`, and 0."""
    n = count("n", n)
    low, high = _check_range(sigma_min, sigma_max)
    if n < 2:
        raise ValueError(f"needs n >= 2 noise levels above 0, got {n}")
    times = torch.linspace(math.atan(high), math.atan(low), n, dtype=torch.float64, device="cpu")
    return torch.cat([torch.tan(times), times.new_zeros(1)])


def _check_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The range as numbers of Python, or an error."""
    low, high = number("sigma_min", sigma_min), number("sigma_max", sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"needs 0 < sigma_min < sigma_max, got sigma_min = {low}, sigma_max = {high}"
        )
    return low, high


def _check_alphas(alphas: Tensor, prediction: str) -> Tensor:
    """ᾱ of every timestep, or an error that says what was given instead."""
    what = (
        "alphas_cumprod must be the cumulative products of 1 - β, falling from nearly 1 to nearly 0"
    )
    if alphas.ndim != 1 or len(alphas) < 2:
        raise ValueError(f"{what}, got shape {tuple(alphas.shape)}")
    first, last = alphas[0].item(), alphas[-1].item()
    if not bool(((alphas >= 0) & (alphas < 1)).all()) or not bool((alphas.diff() < 0).all()):
        raise ValueError(
            f"{what}, got {len(alphas)} numbers from {first:.6g} to {last:.6g}"
            + ("; of betas, give torch.cumprod(1 - betas, 0)" if first < last < 1 else "")
        )
    if last > 0.5:
        raise ValueError(
            f"{what}, got numbers that end at {last:.6g}, where most is signal: of alphas, give "
            "torch.cumprod(alphas, 0)"
        )
    if last < 2.0**-32:
        _check_first(prediction, f"alphas_cumprod ends at {last:.2g}", "the last timesteps")
    return alphas


def _check_first(prediction: str, found: str, excess: str) -> None:
    """A prediction that says something of pure noise, or an error."""
    if prediction in ("epsilon", "score"):
        raise ValueError(
            f"{found} (zero terminal SNR): there the noise is all that the network sees, and "
            f"{prediction!r} says nothing about the data. Such networks predict 'v_prediction' or "
            f"'sample'; if this one does not, leave out {excess}"
        )


def _check_highest(prediction: str, sigma_max: float) -> None:
    """`_check_first` of the highest level, by the limit of `_check_alphas`."""
    if sigma_max > 2.0**16:
        _check_first(prediction, f"the highest level is {sigma_max:.3g}", "such levels")
