"""Any text-to-image pipeline of diffusers as a denoiser on its latents.

`InvertibleScheduler` lets a pipeline run a solver. This is the other way round: the solver runs, and has
the pipeline evaluate its network, with its guidance, adapters and offloading. So solvers, arithmetics,
masks and everything else that takes a denoiser take the pipeline as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .checks import check_is
from .models import autoencoder
from .models.schedules import FlowSchedule, schedule_of
from .schedulers.levels import grid_of


class PipelineDenoiser:
    """``denoiser(x, sigma, prompt="a cat", ...) -> D``: one evaluation of the network of a pipeline.

    The arguments are those of a call of the pipeline: `prompt`, `negative_prompt`, `guidance_scale` and
    others. Guidance is off, scale 1, unless it is given. The scheduler that the pipeline has at
    construction says how its network is trained, as for `StableDiffusion`. The state is ``x = z / s(σ)``
    in any dtype, with z the latents in the dtype of the pipeline.

    Prompts are encoded once and kept, so make another denoiser after a change of a text encoder or an
    adapter. Models that the pipeline offloads to the CPU stay on their device during a run, and are sent
    back by `decode`.

    Args:
        pipeline: such as a `StableDiffusionXLPipeline`, `StableDiffusion3Pipeline` or `FluxPipeline`.
            It is not changed.
        size: height and width of pictures in pixels; by default the pipeline's own.

    Raises:
        TypeError: for anything but a pipeline.
        ValueError: if the scheduler does not say how the network is trained, or the size does not fit.
    """

    def __init__(self, pipeline: Any, size: tuple[int, int] | None = None) -> None:
        if not hasattr(pipeline, "scheduler") or not hasattr(pipeline, "vae"):
            raise TypeError(
                f"pipeline must be one of diffusers with a VAE, got {type(pipeline).__name__}"
            )
        self.pipeline = pipeline
        self.schedule = schedule_of(pipeline.scheduler)
        self.network = getattr(pipeline, "transformer", None) or pipeline.unet
        self.factor = int(pipeline.vae_scale_factor)
        self.packed = hasattr(pipeline, "_pack_latents")
        own = self.factor * int(
            getattr(pipeline, "default_sample_size", None) or self.network.config.sample_size
        )
        self.size = (own, own) if size is None else size
        self.unit = self.factor * (2 if self.packed else 1)
        if any(n < 1 or n % self.unit for n in self.size):
            raise ValueError(
                f"sides of pictures of this pipeline are multiples of {self.unit} pixels, got "
                f"{self.size[0]} x {self.size[1]}"
            )
        self._prompts: dict[str, Any] = {}

    def __call__(self, x: Tensor, sigma: Tensor, /, **call: Any) -> Tensor:
        """The denoised latents at one level `sigma` (B,), in the dtype of `x` (B, ...)."""

        def network(z: Tensor, t: Tensor) -> Tensor:
            once = _OneEvaluation(self.pipeline.scheduler, float(t[0]))
            self._run(once, z.to(self.network.dtype), call)
            assert once.output is not None
            return once.output.to(torch.promote_types(x.dtype, sigma.dtype))

        denoised: Tensor = self.schedule.denoise(network, x, sigma)
        return denoised.to(x.dtype)

    def sigmas(self, n: int, **call: Any) -> Tensor:
        """The levels of `n` steps of the pipeline's scheduler, float64 ``(n + 1,)``.

        Flow matching may place them by the size of the picture, which the pipeline computes.
        """
        given: dict[str, Any] = {}
        if isinstance(self.schedule, FlowSchedule):
            asked = _Asked(self.pipeline.scheduler)
            try:
                self._run(asked, None, {**call, "num_inference_steps": n})
            except _Answered as answer:
                given = {k: answer.levels.get(k) for k in ("timesteps", "sigmas", "mu")}
        grid, _ = grid_of(
            copy.deepcopy(self.pipeline.scheduler),
            self.schedule,
            None if given.get("sigmas") is not None else n,
            given.get("timesteps"),
            given.get("sigmas"),
            given.get("mu"),
        )
        return torch.tensor(grid.levels, dtype=torch.float64)

    def noise(self, n: int, sigma: float, generator: torch.Generator) -> Tensor:
        """States of `n` pictures at the first level of a grid: float64, ``z / s(σ)`` of normal z."""
        channels = self.pipeline.vae.config.latent_channels
        sides = [side // self.factor for side in self.size]
        z = torch.randn(n, channels, *sides, generator=generator, dtype=torch.float64)
        scale = 1 + sigma if isinstance(self.schedule, FlowSchedule) else (1 + sigma**2) ** 0.5
        return self._pack(z) * scale

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures ``(B, 3, H, W)`` in [-1, 1], of the size, as latents: the mode of the VAE."""
        if tuple(pictures.shape[2:]) != tuple(self.size):
            raise ValueError(
                f"pictures must have the size {self.size[0]} x {self.size[1]} of this denoiser, got "
                f"{tuple(pictures.shape)}"
            )
        with torch.no_grad():
            latents = autoencoder.encode(self.pipeline.vae, pictures, self.factor)
        return self._pack(latents - self._shift())

    def decode(self, latents: Tensor) -> Tensor:
        """The pictures of latents, ``(B, 3, H, W)``, about [-1, 1]."""
        if self.packed:
            latents = self.pipeline._unpack_latents(latents, *self.size, self.factor)
        with torch.no_grad():
            pictures: Tensor = autoencoder.decode(self.pipeline.vae, latents + self._shift())
        self.pipeline.maybe_free_model_hooks()
        return pictures

    def mask(self, pixels: Tensor) -> Tensor:
        """A mask (H, W) of pixels as one of latents: 1 for all that an edited pixel touches."""
        sides = [side // self.factor for side in pixels.shape]
        small = torch.nn.functional.adaptive_max_pool2d(pixels[None, None], sides)
        return self._pack(small.expand(1, self.pipeline.vae.config.latent_channels, -1, -1))

    def guided(self, scale: float, target: Any, negative: Any) -> dict[str, Any]:
        """The arguments `target` under guidance, away from the prompt of `negative`."""
        call = {**(target or {}), "guidance_scale": scale}
        away = dict(negative or {})
        for name in ("prompt", "prompt_embeds", "pooled_prompt_embeds"):
            if name in away and f"negative_{name}" not in call:
                call[f"negative_{name}"] = away[name]
        return call

    def _shift(self) -> float:
        config = self.pipeline.vae.config
        return float(getattr(config, "shift_factor", None) or 0.0) * float(config.scaling_factor)

    def _pack(self, latents: Tensor) -> Tensor:
        if not self.packed:
            return latents
        packed: Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return packed

    def forget_prompts(self) -> None:
        """Frees the memory of encoded prompts; those that come again are encoded again."""
        self._prompts.clear()

    def _run(self, scheduler: Any, latents: Tensor | None, call: Mapping[str, Any]) -> None:
        """Calls the pipeline with a scheduler that answers for ours."""
        check_is(call, Mapping, "the arguments are those of a call of the pipeline")
        arguments: dict[str, Any] = {"guidance_scale": 1.0, **call}
        if not {"prompt", "prompt_embeds"} & arguments.keys():
            arguments["prompt"] = ""
        batch = 1 if latents is None else len(latents)
        for name in ("prompt", "negative_prompt", "prompt_2"):
            if isinstance(arguments.get(name), str):
                arguments[name] = [arguments[name]] * batch
        for name, value in arguments.items():
            if name.endswith("prompt_embeds") and isinstance(value, Tensor) and len(value) == 1:
                arguments[name] = value.expand(batch, *value.shape[1:])
        height, width = self.size
        options: dict[str, Any] = {"num_inference_steps": 1, "height": height, "width": width}
        options |= {"latents": latents, "output_type": "latent", **arguments}
        with self._lent(scheduler):
            self.pipeline(**options)

    @contextmanager
    def _lent(self, scheduler: Any) -> Iterator[None]:
        """The pipeline with another scheduler, prompts that are kept, and models that stay."""
        own, before = vars(self.pipeline), dict(vars(self.pipeline))
        encode = self.pipeline.encode_prompt

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
                return encode(*args, **kwargs)
            key = repr((args, sorted(kwargs.items())))
            if key not in self._prompts:
                self._prompts[key] = encode(*args, **kwargs)
            return self._prompts[key]

        lent = {
            "scheduler": scheduler,
            "encode_prompt": remembered,
            "maybe_free_model_hooks": lambda: None,
            "_progress_bar_config": {"disable": True},
        }
        own |= lent
        try:
            yield
        finally:
            for name in lent.keys() - before.keys():
                own.pop(name)
            own |= {name: before[name] for name in lent.keys() & before.keys()}


class _Answered(Exception):
    """Ends a call of a pipeline as soon as it has said which levels it wants."""

    def __init__(self, levels: dict[str, Any]) -> None:
        self.levels = levels


class _Asked:
    """Stands for the scheduler of a pipeline, and asks for its levels."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self.config = scheduler, scheduler.config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """A run has one evaluation."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Reports what the pipeline asks for."""
        raise _Answered({"timesteps": timesteps, "sigmas": sigmas, "mu": mu})


class _OneEvaluation(_Asked):
    """Stands for the scheduler of a pipeline, and has it evaluate its network once.

    `output` is that of the network, or None before the evaluation.
    """

    def __init__(self, scheduler: Any, timestep: float) -> None:
        super().__init__(scheduler)
        whole = timestep.is_integer() and not hasattr(scheduler, "sigmas")
        self.timesteps = torch.tensor([int(timestep) if whole else timestep])
        self.num_inference_steps = 1
        self.output: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Keeps the one timestep."""
        del num_inference_steps, timesteps, sigmas, mu
        self.timesteps = self.timesteps.to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The latents are the input of the network already."""
        del timestep
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        """Keeps the output of the network, and changes nothing."""
        del timestep
        self.output = model_output
        return (sample,)
