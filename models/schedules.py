"""Denoisers of the networks of diffusers, by the formulas that a pipeline's scheduler implies."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from odesolvers.grids import Grid, ddim_timesteps, sigmas_from_alphas_cumprod

from .base import check_levels
from .flow import FLOW_SIGMA_MAX, FlowDenoiser, flow_sigmas, flow_times_of
from .formulas import Network, edm_denoise, vp_denoise

Spacing: TypeAlias = Literal["leading", "trailing", "linspace"]
Final: TypeAlias = Literal["zero", "first"]

DISCRETE = (
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers of networks trained at discrete timesteps of a variance-preserving process."""

DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Those of `DISCRETE` whose networks know the timesteps of their distillation alone."""

EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
"""Schedulers of networks under the preconditioning of Karras et al. 2022."""

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Schedulers of flow-matching networks, beside those of `DISCRETE` with ``use_flow_sigmas``."""


class Schedule(ABC):
    """The noise levels of a network, and the formulas that make it a denoiser."""

    prediction_type: str
    """What the network predicts."""

    sigma_min: float
    """The lowest noise level."""

    sigma_max: float
    """The highest noise level."""

    @abstractmethod
    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        """The posterior mean of states `x` (B, ...) at levels `sigma` (B,), in the wider dtype."""

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """The noise input of the network at levels `sigma` (B,)."""

    @abstractmethod
    def sigmas(self, n: int, spacing: Spacing | None, final: Final | None) -> Tensor:
        """The grid of the scheduler for `n` steps, float64 on the CPU."""

    def check(self, sigma: Tensor) -> Tensor:
        """Whether each level is within the range of the network, (B,).

        Raises:
            ValueError: on the CPU, if one is not.
        """
        return check_levels(sigma, self.sigma_min, self.sigma_max)


@final
class DiscreteSchedule(Schedule):
    """Discrete timesteps t of a variance-preserving process, ``σ_t = sqrt((1 - ᾱ_t) / ᾱ_t)``.

    The network sees ``z = x / sqrt(1 + σ²)`` and t, see `vp_denoise`. At the training levels t is that
    integer; between them it is interpolated in log σ, as in k-diffusion.

    Args:
        alphas_cumprod: ᾱ of every timestep. 0 (zero terminal SNR, an infinite level) becomes 2^-40, the
            level 2^20.
        prediction_type: "epsilon", "v_prediction", "sample" or "score".
        spacing, offset, final: of the grid of `sigmas`.
        distilled: the timesteps of `n` steps, of a network that was distilled at these alone.

    Raises:
        ValueError: for epsilon prediction of pure noise.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str,
        *,
        spacing: Spacing,
        offset: int,
        final: Final,
        distilled: Callable[[int], Tensor] | None = None,
    ) -> None:
        alphas = alphas_cumprod.detach().double().cpu()
        if prediction_type == "epsilon" and alphas[-1] < 2.0**-32:
            raise ValueError(
                "the scheduler has zero terminal SNR (rescale_betas_zero_snr) and epsilon prediction: "
                "at its first level the noise is all that the network sees, so that its prediction "
                "says nothing about the image. Such networks are trained for v prediction: pass "
                "prediction_type='v_prediction' if this one is, or else load it with a scheduler "
                "without rescale_betas_zero_snr"
            )
        self.alphas_cumprod = alphas.clamp(min=2.0**-40)
        self.prediction_type = prediction_type
        self.spacing, self.offset, self.final = spacing, offset, final
        self.distilled = distilled
        levels = torch.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        self.sigma_min, self.sigma_max = float(levels[0]), float(levels[-1])
        self.log_sigmas = levels.log()
        self._tables = {torch.device("cpu"): self.log_sigmas}

    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        return vp_denoise(self.prediction_type, network, x, sigma, self.timestep(sigma))

    def timestep(self, sigma: Tensor) -> Tensor:
        inside = self.check(sigma)
        table = self._table(sigma.device)
        log = torch.where(inside, sigma.to(table.dtype).log(), table[0])
        above = torch.searchsorted(table, log).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        t = above - 1 + ((log - low) / (high - low)).clamp(0, 1)
        whole = t.round()
        # Distances between levels are at least 1e-3 in log σ.
        rounding = 1e-6 if table.dtype == torch.float64 else 5e-6
        t = torch.where((table[whole.long()] - log).abs() < rounding, whole, t)
        return torch.where(inside, t, torch.nan).to(sigma.dtype)

    def sigmas(self, n: int, spacing: Spacing | None, final: Final | None) -> Tensor:
        end, count = final or self.final, len(self.alphas_cumprod)
        if self.distilled is not None and spacing is None:
            steps = self.distilled(n)
        else:
            steps = ddim_timesteps(n, count, spacing=spacing or self.spacing, offset=self.offset)
            warn_of_first(n, int(steps[0]), count)
        if end == "first" and steps[-1] == 0:
            steps = steps[:-1]  # the scheduler steps from the first training level to itself
            if len(steps) == 0:
                raise ValueError(
                    "one step from timestep 0 to the level of timestep 0 leads nowhere: ask for more "
                    "steps, spacing='trailing' or final='zero'"
                )
        return sigmas_from_alphas_cumprod(self.alphas_cumprod, steps, final=end)

    def _table(self, device: torch.device) -> Tensor:
        """Logarithms of the levels on `device`, in float64 where it has it."""
        if device not in self._tables:
            wide = torch.float32 if device.type == "mps" else torch.float64
            self._tables[device] = self.log_sigmas.to(wide).to(device)
        return self._tables[device]


class SampledSchedule(Schedule):
    """Continuous levels; grids are those of the scheduler itself."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = copy.deepcopy(scheduler)  # set_timesteps changes it

    @final
    def sigmas(self, n: int, spacing: Spacing | None, final: Final | None) -> Tensor:
        if spacing is not None:
            raise ValueError(
                f"the levels of {type(self.scheduler).__name__} are continuous and have no spacing of "
                f"timesteps, got spacing={spacing!r}: leave it out"
            )
        if n < 1:
            raise ValueError(f"needs n >= 1 steps, got {n}")
        if getattr(self.scheduler.config, "use_dynamic_shifting", False):
            raise ValueError(
                "the times of this scheduler depend on the size of the image (use_dynamic_shifting): "
                "pass flow_sigmas(scheduler.sigmas) after scheduler.set_timesteps(n, mu=...)"
            )
        self.scheduler.set_timesteps(n)
        visited = self.levels(levels_visited(self.scheduler.sigmas)[0])
        if final == "first" and visited[-1] == 0:
            visited = visited[:-1]
        elif final == "zero" and visited[-1] > 0:
            visited = torch.cat([visited, visited.new_zeros(1)])
        Grid.of(visited)
        return visited

    @abstractmethod
    def levels(self, sigmas: Tensor) -> Tensor:
        """The noise levels of the scheduler's own `sigmas`."""


@final
class EDMSchedule(SampledSchedule):
    """The preconditioning of Karras et al. 2022, `edm_denoise`, with the noise input ``log(σ) / 4``.

    The sign of c_out is minus for networks that predict v.
    """

    def __init__(
        self,
        scheduler: Any,
        prediction_type: str,
        *,
        sigma_data: float,
        sigma_min: float,
        sigma_max: float,
    ) -> None:
        super().__init__(scheduler)
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type must be 'epsilon' or 'v_prediction' under {type(scheduler).__name__}, "
                f"got {prediction_type!r}"
            )
        self.prediction_type, self.sigma_data = prediction_type, sigma_data
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        sign = -1 if self.prediction_type == "v_prediction" else 1
        t = self.timestep(sigma)
        return edm_denoise(network, x, sigma, t, sigma_data=self.sigma_data, sign=sign)

    def timestep(self, sigma: Tensor) -> Tensor:
        inside = self.check(sigma)
        return torch.where(inside, sigma, torch.nan).log() / 4

    def levels(self, sigmas: Tensor) -> Tensor:
        return sigmas


@final
class FlowSchedule(SampledSchedule):
    """Flow matching: `FlowDenoiser` with times up to the number of training steps."""

    prediction_type = "flow_prediction"

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.steps = int(scheduler.config.num_train_timesteps)
        self.sigma_min, self.sigma_max = 0.0, FLOW_SIGMA_MAX

    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        denoised: Tensor = FlowDenoiser(lambda z, t: network(z, self.steps * t))(x, sigma)
        return denoised

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.steps * flow_times_of(sigma)

    def levels(self, sigmas: Tensor) -> Tensor:
        return flow_sigmas(sigmas)


def schedule_of(scheduler: Any, prediction_type: str | None = None) -> Schedule:
    """The schedule that a scheduler of diffusers describes.

    Args:
        scheduler: the scheduler of a pipeline.
        prediction_type: what the network predicts; by default what the scheduler says.

    Raises:
        ValueError: if the scheduler is not known to describe its network completely.
    """
    name = type(scheduler).__name__
    config = scheduler.config
    kind = prediction_type or getattr(config, "prediction_type", None)
    kind = "sample" if kind == "original_sample" else kind  # EulerDiscreteScheduler's other name
    if name in EDM:
        return EDMSchedule(
            scheduler,
            str(kind),
            sigma_data=config.sigma_data,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
        )
    if name in FLOW or (name in DISCRETE and getattr(config, "use_flow_sigmas", False)):
        _check_flow(name, config, kind)
        return FlowSchedule(scheduler)
    if name not in DISCRETE:
        raise ValueError(
            f"the scheduler of the pipeline is a {name}, which is not known to say how its network is "
            f"trained. Known are {', '.join((*DISCRETE, *EDM, *FLOW))}. Give the pipeline one that "
            "describes its network: pipeline.scheduler = ..., or load_stable_diffusion(..., "
            "scheduler=...)"
        )
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"prediction_type must be 'epsilon', 'v_prediction' or 'sample' under {name}, got {kind!r}"
            + (" without use_flow_sigmas=True" if kind == "flow_prediction" else "")
        )
    alphas = scheduler.alphas_cumprod.double()
    if getattr(config, "timestep_type", "discrete") == "continuous" and kind == "v_prediction":
        levels = torch.sqrt((1 - alphas) / alphas)
        limits = [level for level in (config.sigma_min, config.sigma_max) if level is not None]
        limits += [float(levels[0]), float(levels[-1])]
        return EDMSchedule(
            scheduler, kind, sigma_data=1.0, sigma_min=min(limits), sigma_max=max(limits)
        )
    if getattr(config, "rescale_betas_zero_snr", False):
        alphas = torch.cat([alphas[:-1], alphas.new_zeros(1)])  # some schedulers store 2^-24
    ends_first = (
        not getattr(config, "set_alpha_to_one", True)
        or getattr(config, "final_sigmas_type", "zero") == "sigma_min"
    )
    return DiscreteSchedule(
        alphas,
        kind,
        spacing=getattr(config, "timestep_spacing", "leading"),  # a few have neither setting
        offset=getattr(config, "steps_offset", 0),
        final="first" if ends_first else "zero",
        distilled=partial(_visited, scheduler) if name in DISTILLED else None,
    )


def levels_visited(sigmas: Tensor) -> tuple[Tensor, bool]:
    """The different levels in the `sigmas` of a scheduler, and whether the last one is repeated.

    Schedulers of two stages list levels twice, and a final sigma_min repeats the last, to rounding.
    """
    levels = sigmas.double()
    repeated = bool((levels[-1] - levels[-2]).abs() <= 1e-6 * levels[-2])
    return torch.unique_consecutive(levels[:-1] if repeated else levels), repeated


def warn_of_first(n: int, timestep: int, count: int) -> None:
    """Warns if `timestep`, of `count`, where a run of `n` steps begins, is far from noise."""
    if timestep < 0.7 * count:
        warnings.warn(
            f"{n} steps begin at timestep {timestep} of {count}, where a state is far from noise: "
            "spacing='trailing', of a scheduler timestep_spacing='trailing', begins at the last",
            UserWarning,
            stacklevel=4,
        )


def _visited(scheduler: Any, n: int) -> Tensor:
    """The timesteps of a scheduler for `n` steps."""
    own = copy.deepcopy(scheduler)  # set_timesteps changes it
    own.set_timesteps(n)
    timesteps: Tensor = own.timesteps
    return timesteps.long()


def _check_flow(name: str, config: Any, prediction_type: str | None) -> None:
    """Raise an error if a flow scheduler describes another network than one of velocity."""
    if (name not in FLOW or prediction_type is not None) and prediction_type != "flow_prediction":
        raise ValueError(
            f"the scheduler, {name}, is one of flow matching, where the network predicts the velocity: "
            f"prediction_type must be 'flow_prediction', got {prediction_type!r}"
        )
    if getattr(config, "invert_sigmas", False):
        raise ValueError(
            f"{name} has invert_sigmas=True: its network counts time from noise to data, which is not "
            "supported"
        )
