"""Nodes for ComfyUI: a sampler, an exact inversion, and sampling from the pair that it returns.

Imported by ComfyUI alone, from a file in its folder `custom_nodes`::

    from odesolvers.interop.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

The nodes are classes in ComfyUI's first form, which every version loads; its second form needs a
version of August 2025 or later and offers these nodes nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..extend import Solver
from ..grids import Grid
from ..models import InDtype
from ..parsing import parse
from ..run import Callback
from ..state import Solution, State
from .k_diffusion import as_sampler

SOLVERS: Final = {
    "BDIA: edits of images": "BDIA(Euler(), gamma=StepRatio(1))",
    "BDIA: closer samples": "BDIA(Euler(), gamma=DampedStepRatio())",
    "BDIA: as published": "BDIA(DDIM(), gamma=1.0)",
    "BDIA: edits, exact to the bit": "BDIA(Euler(), gamma=StepRatio(1), arithmetic=FixedPoint())",
    "BDIA over Heun: samples only": "BDIA(HeunEDM(), gamma=HeunStepRatio())",
    "EDICT": "EDICT()",
}
"""The menu of the node: short names of solvers, see the page on choosing one."""

KEY: Final = "odesolvers_pair"
"""The key of a latent under which its `Pair` travels; nodes that copy a latent copy it too."""

Latent: TypeAlias = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Pair:
    """What travels beside an inverted latent.

    Attributes:
        state: the pair of states, on the CPU, in the space and the scaling of the model.
        samples: the latent that it belongs to.
        image: the latent that was inverted, shown to models that look at it, kept outside of a mask.
        noise: the noise that leads from `image` to the noisy end, in the model's own noise scaling.
    """

    state: State
    samples: Tensor
    image: Tensor
    noise: Tensor

    @classmethod
    def of(cls, latent: Latent) -> Pair | None:
        """The pair of a latent; None if it has none, or was changed by another node since."""
        pair: Pair | None = latent.get(KEY)
        return pair if pair is not None and torch.equal(pair.samples, latent["samples"]) else None


class ODESampler(comfy.samplers.KSAMPLER):  # type: ignore[misc]
    """A solver as an object of ComfyUI's type SAMPLER."""

    def __init__(self, solver: Solver) -> None:
        super().__init__(as_sampler(solver))
        self.solver = solver


class SamplerNode:
    """A solver as a SAMPLER, for SamplerCustom, SamplerCustomAdvanced and `InvertNode`."""

    RETURN_TYPES: ClassVar = ("SAMPLER",)
    FUNCTION: ClassVar = "make"
    CATEGORY: ClassVar = "sampling/custom_sampling/samplers"
    DESCRIPTION: ClassVar = "An ODE solver that can be run backwards, exactly."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tip = "Any other solver, such as BDIA(RK4(), gamma=StepRatio(1)). Leave empty to use the menu."
        return {
            "required": {"solver": (list(SOLVERS),)},
            "optional": {"expression": ("STRING", {"default": "", "tooltip": tip})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, expression: str = "") -> bool | str:
        """True, or the message that ComfyUI shows at the node before it runs anything."""
        try:
            _solver(expression.strip() or next(iter(SOLVERS.values())))
        except ValueError as error:
            return str(error)
        return True

    def make(self, solver: str, expression: str = "") -> tuple[ODESampler]:
        return (ODESampler(_solver(expression.strip() or SOLVERS[solver])),)


class InvertNode:
    """An image's latent to noise: exactly, if it comes with its pair; else from one approximate step."""

    RETURN_TYPES: ClassVar = ("LATENT",)
    RETURN_NAMES: ClassVar = ("noise",)
    FUNCTION: ClassVar = "invert"
    CATEGORY: ClassVar = "sampling/custom_sampling"
    DESCRIPTION: ClassVar = (
        "Goes up the sigmas, from an image to noise, under the prompt of the guider. "
        "Connect the noise to Sample from Pair, which leads back to the image."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tip = "As for sampling: falling, from noise to the image."
        return {
            "required": {
                "guider": ("GUIDER",),
                "sampler": ("SAMPLER", {"tooltip": "From the node ODE Solver."}),
                "sigmas": ("SIGMAS", {"tooltip": tip}),
                "latent_image": ("LATENT",),
            }
        }

    def invert(
        self, guider: Any, sampler: Any, sigmas: Tensor, latent_image: Latent
    ) -> tuple[Latent]:
        if not isinstance(sampler, ODESampler):
            raise TypeError(
                "only the samplers of the node 'ODE Solver (exact inversion)' can be inverted, got "
                f"{type(sampler).__name__}: connect that node"
            )
        if not isinstance(samples := latent_image["samples"], Tensor):
            raise TypeError(
                f"only latents of one tensor can be inverted, got {type(samples).__name__}, as models "
                "of sound and video use"
            )
        pair = Pair.of(latent_image)
        return (_run(guider, sampler.solver, sigmas.float(), latent_image, pair, upward=True),)


class SampleNode:
    """Noise with its pair to an image, by the solver and the sigmas of the inversion."""

    RETURN_TYPES: ClassVar = ("LATENT",)
    RETURN_NAMES: ClassVar = ("image",)
    FUNCTION: ClassVar = "sample"
    CATEGORY: ClassVar = "sampling/custom_sampling"
    DESCRIPTION: ClassVar = (
        "Goes back down, from the noise of Invert, with its solver and sigmas. Under the same prompt "
        "this leads back to the image; under another it edits the image."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"guider": ("GUIDER",), "noise": ("LATENT",)}}

    def sample(self, guider: Any, noise: Latent) -> tuple[Latent]:
        pair = Pair.of(noise)
        if pair is None:
            raise ValueError(
                "this latent has no pair, or was changed since it had one: connect the output of the "
                "node 'Invert (exact)' itself, or use SamplerCustomAdvanced, which needs no pair"
            )
        if pair.state.index > 1:
            raise ValueError(
                "this latent is an image already, nothing to sample: connect the output of the node "
                "'Invert (exact)'"
            )
        solver = _solver(pair.state.solver)
        sigmas = torch.tensor(pair.state.sigmas, dtype=torch.float32)
        return (_run(guider, solver, sigmas, noise, pair, upward=False),)


def _run(
    guider: Any, solver: Solver, sigmas: Tensor, latent: Latent, pair: Pair | None, upward: bool
) -> Latent:
    """`latent` with the samples and the pair of the other end, by a run inside of ComfyUI's own.

    ComfyUI loads the model, prepares the prompts and shows the previews. It is handed sigmas that fall
    both ways, for patches of models may look at them, and latents that are the same both ways.
    """
    if pair is None:  # a mask is for sampling afterwards: the whole image is inverted
        image, noise, mask = latent["samples"], torch.zeros_like(latent["samples"]), None
    else:
        image, noise, mask = pair.image, pair.noise, latent.get("noise_mask")
    solutions: list[Solution] = []
    noises: list[Tensor] = []

    def solve(
        model: Any,
        x: Tensor,  # scaled for sampling from noise: only its dtype and its device count
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callback,
        disable: bool,
    ) -> Tensor:
        Grid.of(sigmas)  # rising ones would turn the run around
        scaling = model.inner_model.inner_model.model_sampling.noise_scaling

        def shown(step: dict[str, Any]) -> None:
            callback({**step, "x": step["x"].to(x.dtype), "denoised": step["denoised"].to(x.dtype)})

        as_sampler(solver, on_end=solutions.append)(
            InDtype(model, x.dtype),
            _start(model, x, sigmas, scaling, pair, upward, extra_args["denoise_mask"]),
            sigmas.flip(0) if upward else sigmas,
            extra_args=extra_args,
            callback=shown,
            disable=disable,
        )
        end = solutions[0].x.to(x.dtype)
        if pair is None:
            nothing, one = torch.zeros_like(x), torch.ones_like(x)
            rest = end - scaling(sigmas[0], nothing, model.latent_image)
            noises.append(rest / scaling(sigmas[0], one, nothing))
        return end

    samples = guider.sample(
        noise,
        image,
        comfy.samplers.KSAMPLER(solve),
        sigmas,
        denoise_mask=mask,
        callback=latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,  # of what a model itself draws: the same both ways
    )
    [solution] = solutions
    if upward:  # ComfyUI has undone the scaling of the other end
        samples = guider.model_patcher.model.process_latent_out(solution.x.float())
    home = comfy.model_management.intermediate_device()
    samples = samples.to(home)
    found = Pair(solution.state.to("cpu"), samples, image, (noises or [noise])[0].to(home))
    return {**latent, "samples": samples, KEY: found}


def _start(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    scaling: Callable[..., Tensor],
    pair: Pair | None,
    upward: bool,
    mask: Tensor | None,
) -> Tensor | State:
    """The state of `pair`; a tensor in float64 where there is none, or where a mask forbids it.

    Networks in half precision round their input: equal roundings on the way back need a state that
    comes back closer than float32. Not every device other than these two has float64.
    """
    dtype = torch.float64 if x.device.type in ("cpu", "cuda") else x.dtype
    if pair is None:
        return scaling(sigmas[-1], torch.zeros_like(x), model.latent_image).to(dtype)
    if upward:
        return pair.state.to(x.device)
    if mask is None:  # an edit is a run of its own, which an exact arithmetic must be told
        return pair.state.fork().to(x.device)
    # Outside of the mask the states must lie on the line from the image to its noise; the second
    # state of the pair does not.
    return scaling(sigmas[0], model.noise, model.latent_image).to(dtype)


def _solver(expression: str) -> Solver:
    """The solver that an expression names, or a ValueError."""
    solver = parse(expression)
    if not isinstance(solver, Solver):
        raise ValueError(f"{expression!r} names no solver: write one such as BDIA(Euler())")
    return solver


NODE_CLASS_MAPPINGS: Final = {
    "ODESolversSampler": SamplerNode,
    "ODESolversInvert": InvertNode,
    "ODESolversSample": SampleNode,
}
NODE_DISPLAY_NAME_MAPPINGS: Final = {
    "ODESolversSampler": "ODE Solver (exact inversion)",
    "ODESolversInvert": "Invert (exact)",
    "ODESolversSample": "Sample from Pair",
}
