"""Models and solvers by name."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import odesolvers as ode

from .bundled import BUNDLED as BUNDLED, STEPS, Model as Model, classes_of
from .extend import Solver
from .models import load_edm, load_stable_diffusion

SHORT: Final[Mapping[str, tuple[str, str]]] = {
    "damped": ("BDIA({}, gamma=DampedStepRatio())", "both ways: samples and their codes"),
    "codes": ("BDIA({}, gamma=StepRatio(1))", "codes of pictures before samples"),
    "exact": (
        "BDIA({}, DampedStepRatio(), FixedPoint({}))",
        "as damped, and back to the bit",
    ),
    "paper": ("BDIA(DDIM(), gamma=1.0)", "as published (Zhang et al. 2024)"),
    "belm": ("BELM()", "O-BELM (Wang et al. 2024)"),
    "edict": ("EDICT()", "EDICT (Wallace et al. 2023)"),
    "ddim": ("DDIMInversion()", "DDIM inversion, which is not exact"),
}
"""Short names of solvers: expression, in which {} is the model's one-step method, and summary."""


def open_model(
    name: str,
    device: torch.device,
    network: torch.dtype | None,
    size: Any,
    place: torch.device | None = None,
) -> Model:
    """The model that `--model` names.

    Args:
        name: a bundled name; ``package.module:function``; a ``.pkl`` or ``.safetensors`` file or URL of
            EDM; a folder, a single file or a hub id of a pipeline of diffusers.
        device: of the network.
        network: its dtype; by default float16 of pipelines on a GPU, and float32.
        size: height and width of the pictures of a pipeline, or None for its own.
        place: where the network is put; by default `device`, for which defaults are chosen.

    Raises:
        ValueError: if it is none of these, or cannot be read.
    """
    path = Path(name)
    if name in BUNDLED:
        model = BUNDLED[name][0]()
    elif ":" in name and "/" not in name:
        model = _own(name)
    elif path.suffix == ".pkl" or _is_edm(path) or (name.startswith("https://") and path.suffix):
        denoiser = load_edm(name, dtype=network or torch.float32)
        width, side = denoiser.label_dim, denoiser.img_resolution
        classes = classes_of({str(k): k for k in range(width)}, None, one_hot=width)
        model = Model(denoiser, (denoiser.img_channels, side, side), classes)
    else:
        half = torch.float16 if device.type == "cuda" else torch.float32
        return _pipeline(name, place or device, network or half, size)
    if size is not None:
        raise ValueError(f"--size is for pipelines; pictures of {name} are {model.shape}")
    if network is not None and (name in BUNDLED or ":" in name):
        raise ValueError(f"--network is for EDM files and pipelines, not for {name}")
    if isinstance(model.denoiser, torch.nn.Module):
        model.denoiser.to(place or device)
    model.device = place or device
    return model


def solver_of(name: str, method: str, sigmas: Tensor) -> Solver:
    """The solver of a short name or of an expression, in which ``load('FILE')`` is a calibration."""
    if name in SHORT:
        bits = 40 if float(sigmas[0]) < 8192 else 32  # room above the levels of flow matching
        name = SHORT[name][0].format(method, "" if bits == 40 else bits)
    try:
        found = ode.parse(name, {"load": ode.Calibrated.load})
    except (TypeError, ValueError) as error:
        raise ValueError(f"--solver: {error}; or {', '.join(SHORT)}") from error
    if isinstance(found, ode.Calibrated):
        found = ode.BDIA(ode.parse(found.base), found)
    if not isinstance(found, Solver):
        raise ValueError(
            f"--solver must name a solver such as 'BDIA(Euler(), gamma=1.0)' or "
            f"{', '.join(SHORT)}, got {name!r:.80}; see `odesolvers list`"
        )
    return found


def solver_and_grid(
    model: Model, name: str, steps: int | None, grid: str | None, levels: Mapping[str, float]
) -> tuple[Solver, Tensor]:
    """The solver of a name, and the grid of some steps: a calibration's own unless another is given.

    Args:
        model: the model.
        name: see `solver_of`.
        steps: their number, or None for the default.
        grid: the kind of grid, a name in `GRIDS`, or None for the model's own.
        levels: its options, such as ``sigma_min``.
    """
    sigmas = model.sigmas(steps or model.steps, grid, levels)
    solver = solver_of(name, model.method, sigmas)
    rule = getattr(solver, "gamma", None)
    if isinstance(rule, ode.Calibrated):
        if grid is None and not levels and (steps is None or rule.levels_learned):
            sigmas = rule.sigmas if steps is None else rule.sigmas_in(steps)
        try:
            solver.plan(ode.Grid.of(sigmas))
        except ValueError as error:
            own = "leave out --steps, --grid, --sigma-min and --sigma-max for its own levels"
            raise ValueError(f"--solver: {error}; or {own}") from error
    return solver, sigmas


def _own(name: str) -> Model:
    """The model of a function of the user, see docs/command_line.md."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` does
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {name} cannot be imported: {error}") from error
    finally:
        sys.path.remove("")
    denoiser = make()
    shape = getattr(denoiser, "shape", None)
    if not callable(denoiser) or shape is None or len(shape) != 3:
        raise ValueError(
            f"{name}() must return a denoiser with an attribute `shape`, (C, H, W) of its pictures"
        )

    def condition(prompts: Sequence[str | None]) -> dict[str, Any]:
        if hasattr(denoiser, "condition"):
            found: dict[str, Any] = denoiser.condition(list(prompts))
            return found
        if any(prompt is not None for prompt in prompts):
            raise ValueError(f"{name} takes no prompts: its denoiser has no method `condition`")
        return {}

    grid = {
        k: float(getattr(denoiser, k)) for k in ("sigma_min", "sigma_max") if hasattr(denoiser, k)
    }
    given = {k: getattr(denoiser, k) for k in ("encode", "decode") if hasattr(denoiser, k)}
    return Model(denoiser, tuple(shape), condition, grid=grid, **given)


def _is_edm(path: Path) -> bool:
    """Whether a file is one of `save_edm`, by its header."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, 2**24))
    try:
        return "odesolvers.edm" in json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError):
        return False


def _pipeline(name: str, device: torch.device, dtype: torch.dtype, size: Any) -> Model:
    """A pipeline of diffusers: Stable Diffusion by our loader, others by diffusers' own."""
    from .models.stable_diffusion import import_diffusers
    from .pipelines import PipelineDenoiser

    path = Path(name)
    local = path.exists() or path.suffix in (".safetensors", ".ckpt")
    if not local and name.count("/") != 1:
        raise ValueError(
            f"--model {name}: there is no such file or folder, and it is no hub id (owner/name), no "
            f"package.module:function and none of {', '.join(BUNDLED)}"
        )
    diffusers = import_diffusers()
    kind = ""
    if path.is_dir() or not local:
        try:
            index: Any = diffusers.DiffusionPipeline.load_config(name)
        except OSError as error:  # of the hub, of the connection, and of folders without an index
            where = (
                "holds no pipeline"
                if path.is_dir()
                else "was not found on the Hugging Face hub, or that cannot be reached"
            )
            raise FileNotFoundError(f"--model {name} {where}: {error}") from error
        kind = index["_class_name"] if isinstance(index["_class_name"], str) else "a custom one"
        if not hasattr(diffusers, kind):
            raise ValueError(
                f"{name} is a pipeline of another library ({kind}), which is not loaded"
            )
    if kind in ("", "StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        pipeline = load_stable_diffusion(name, dtype=dtype).pipeline
    else:
        made = getattr(diffusers, kind)
        parts = inspect.signature(made.__init__).parameters.values()
        absent = [
            part.name
            for part in list(parts)[1:]
            if part.default in (part.empty, None) and index.get(part.name) in (None, [None, None])
        ]
        with warnings.catch_warnings():  # of `torch_dtype`, the name that works in all versions
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
            pipeline = made.from_pretrained(
                name,
                torch_dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                **dict.fromkeys(absent),
            )
    pipeline.set_progress_bar_config(disable=True)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < _bytes(pipeline):
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if hasattr(pipeline.vae, "enable_tiling"):
        pipeline.vae.enable_tiling()  # of pictures above its own size alone
    denoiser = PipelineDenoiser(pipeline, size)

    def condition(prompts: Sequence[str | None]) -> dict[str, Any]:
        return {"prompt": [prompt or "" for prompt in prompts]}

    signature = inspect.signature(type(pipeline).__call__).parameters
    flow = type(denoiser.schedule).__name__ == "FlowSchedule"
    return Model(
        denoiser,
        (3, *denoiser.size),
        condition,
        guidance=float(signature["guidance_scale"].default),
        steps=STEPS["pipelines"],
        method="FlowEuler()" if flow else "DDIM()",
        grid=denoiser.sigmas,
        encode=denoiser.encode,
        decode=denoiser.decode,
        noise=denoiser.noise,
        dtype=torch.float32 if device.type == "mps" else torch.float64,
        device=device,
    )


def _bytes(pipeline: Any) -> int:
    """Memory that the networks of a pipeline and a run need, roughly."""
    parts = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    return int(1.3 * weights)
