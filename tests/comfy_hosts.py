"""ComfyUI as the nodes see it: a stand-in of a few lines, or ComfyUI itself.

The tests of `odesolvers.interop.comfyui` run on the stand-in. With ``COMFYUI=FOLDER``, the folder of an
installed ComfyUI, the same tests run on ComfyUI's own guiders, samplers and models.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FOLDER = os.environ.get("COMFYUI")
SCALE = 0.18215  # of the latents of Stable Diffusion: model space over latent space
KINDS = ("eps", "flow") if FOLDER is None else ("eps", "v", "edm", "flow", "flux", "cosmos")


class Network(nn.Module):
    """A small convolution that depends on the time and on a prompt ``(B, T, 8)``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.prompt, self.dtype = nn.Linear(8, 16), dtype
        self.to(dtype)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, **_: Any) -> Tensor:
        told = self.prompt(context.to(self.dtype)).mean(1) + torch.cos(t / 100)[:, None]
        hidden = self.first(x.to(self.dtype)) + told[:, :, None, None].to(self.dtype)
        return self.last(torch.nn.functional.silu(hidden)).float()


def prompt(seed: int) -> Tensor:
    return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed))


# The stand-in: what a sampler meets, in ComfyUI's names and with its formulas.


class Eps:
    sigma_max = 14.6

    def denoised(self, network: Network, x: Tensor, sigma: Tensor, told: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        return x - s * network(x / (s**2 + 1).sqrt(), 100 * sigma.log(), told)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, image: Tensor, full: bool = False) -> Any:
        return image + noise * ((1 + sigma**2).sqrt() if full else sigma)

    def inverse_noise_scaling(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x


class Flow:
    """``x`` is (1 - t) image + t noise, and sigma is t."""

    sigma_max = 1.0

    def denoised(self, network: Network, x: Tensor, sigma: Tensor, told: Tensor) -> Tensor:
        return x - sigma.reshape(-1, 1, 1, 1) * network(x, 1000 * sigma, told)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, image: Tensor, full: bool = False) -> Any:
        return (1 - sigma) * image + sigma * noise

    def inverse_noise_scaling(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (1 - sigma)


class Inpaint:
    def __init__(self, guider: Guider, image: Tensor, noise: Tensor) -> None:
        self.inner_model, self.latent_image, self.noise = guider, image, noise

    def __call__(self, x: Tensor, sigma: Tensor, denoise_mask: Any, **_: Any) -> Tensor:
        guider, mask = self.inner_model, denoise_mask
        if mask is None:
            return guider.denoised(x, sigma)
        level = sigma.reshape(-1, 1, 1, 1)
        kept = guider.inner_model.model_sampling.noise_scaling(level, self.noise, self.latent_image)
        out = guider.denoised(x * mask + kept * (1 - mask), sigma)
        return out * mask + self.latent_image * (1 - mask)


class KSAMPLER:
    def __init__(self, sampler_function: Any) -> None:
        self.sampler_function = sampler_function

    def sample(
        self, guider: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, *more: Any
    ) -> Any:
        image, mask, disable = more
        model, scaling = Inpaint(guider, image, noise), guider.inner_model.model_sampling
        x = scaling.noise_scaling(sigmas[0], noise, image, float(sigmas[0]) >= scaling.sigma_max)
        steps = len(sigmas) - 1
        x = self.sampler_function(
            model,
            x,
            sigmas,
            extra_args={**extra_args, "denoise_mask": mask},
            callback=lambda shown: callback(shown["i"], shown["denoised"], shown["x"], steps),
            disable=disable,
        )
        return scaling.inverse_noise_scaling(sigmas[-1], x)


class Guider:
    def __init__(self, kind: str, dtype: torch.dtype, seed: int, cfg: float) -> None:
        self.network, self.told, self.cfg = Network(dtype), prompt(seed), cfg
        self.inner_model = SimpleNamespace(
            model_sampling={"eps": Eps, "flow": Flow}[kind](),
            process_latent_out=lambda latent: latent / SCALE,
        )
        self.model_patcher = SimpleNamespace(model=self.inner_model)

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        space = self.inner_model.model_sampling
        outs = [space.denoised(self.network, x, sigma, told) for told in (self.told, prompt(0))]
        return outs[1] + self.cfg * (outs[0] - outs[1])

    def sample(
        self,
        noise: Any,
        latent_image: Any,
        sampler: Any,
        sigmas: Any,
        denoise_mask: Any = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Any:
        image = latent_image * SCALE
        args = {"model_options": {}, "seed": seed}
        with torch.no_grad():  # of ComfyUI's execution of a workflow
            x = sampler.sample(
                self, sigmas, args, callback, noise, image, denoise_mask, disable_pbar
            )
        return self.inner_model.process_latent_out(x.float())


def euler(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: bool
) -> Tensor:
    for sigma, target in pairwise(sigmas):
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        x = x + (target - sigma) * (x - denoised) / sigma
    return x


class StandIn:
    modules: ClassVar = {
        "comfy": {},
        "comfy.samplers": {"KSAMPLER": KSAMPLER},
        "comfy.model_management": {"intermediate_device": lambda: torch.device("cpu")},
        "comfy.utils": {"PROGRESS_BAR_ENABLED": False},
        "latent_preview": {"prepare_callback": lambda model, steps: lambda *shown: None},
    }

    def install(self) -> dict[str, ModuleType]:
        made = {}
        for name, content in self.modules.items():
            made[name] = ModuleType(name)
            vars(made[name]).update(content)
        for name, module in made.items():
            if name.startswith("comfy."):
                setattr(made["comfy"], name.removeprefix("comfy."), module)
        return made

    def guider(
        self, kind: str, seed: int = 1, cfg: float = 3.0, dtype: torch.dtype = torch.float32
    ) -> Any:
        return Guider(kind, dtype, seed, cfg)

    def sigmas(self, kind: str, steps: int) -> Tensor:
        if kind == "flow":
            t = torch.linspace(1, 0, steps + 1)
            return 3 * t / (1 + 2 * t)
        return torch.cat([torch.linspace(14.6**0.2, 0.03**0.2, steps) ** 5, torch.zeros(1)])

    def euler(self) -> Any:
        return KSAMPLER(euler)


class ComfyUI:
    """ComfyUI itself, from the folder `FOLDER`, on the CPU."""

    def install(self) -> dict[str, ModuleType]:
        sys.path.insert(0, FOLDER or "")
        before, sys.argv = sys.argv, ["ComfyUI", "--cpu"]
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("comfy.options").enable_args_parsing()
            names = [*StandIn.modules, "comfy.model_base", "comfy.supported_models_base"]
            names += ["comfy.latent_formats", "comfy.model_patcher", "nodes"]
            found = {name: importlib.import_module(name) for name in names}
        sys.argv = before
        found["comfy.utils"].PROGRESS_BAR_ENABLED = False  # type: ignore[attr-defined]
        self.comfy: Any = found["comfy"]
        return found

    def guider(
        self, kind: str, seed: int = 1, cfg: float = 3.0, dtype: torch.dtype = torch.float32
    ) -> Any:
        comfy = self.comfy
        names = {"v": "V_PREDICTION", "cosmos": "FLOW_COSMOS"}
        config = type("Config", (comfy.supported_models_base.BASE,), {})
        config.latent_format = comfy.latent_formats.SD15
        config.unet_config = {"disable_unet_model_creation": True}
        config.sampling_settings = {"shift": 3.0} if kind == "flow" else {}
        model_type = comfy.model_base.ModelType[names.get(kind, kind.upper())]
        model = comfy.model_base.BaseModel(config(dict(config.unet_config)), model_type)
        model.diffusion_model = Network(dtype)
        cpu = torch.device("cpu")
        guider = comfy.samplers.CFGGuider(comfy.model_patcher.ModelPatcher(model, cpu, cpu))
        guider.set_conds([[prompt(seed), {}]], [[prompt(0), {}]])
        guider.set_cfg(cfg)
        own = guider.sample

        def sample(*args: Any, **options: Any) -> Any:
            with torch.inference_mode():  # of ComfyUI's execution of a workflow
                return own(*args, **options)

        guider.sample = sample
        return guider

    def sigmas(self, kind: str, steps: int) -> Tensor:
        scaling = self.guider(kind).model_patcher.get_model_object("model_sampling")
        found: Tensor = self.comfy.samplers.calculate_sigmas(scaling, "normal", steps)
        return found

    def euler(self) -> Any:
        return self.comfy.samplers.sampler_object("euler")


Host = StandIn | ComfyUI
