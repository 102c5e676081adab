"""What a Stable Diffusion checkpoint in a single file says about itself beside its weights.

Checkpoints in the original layout name no scheduler. Those that are not trained like the published base
models say so by small tensors under names of their own, which ComfyUI and its relatives write and read,
by the metadata of the file, or by buffers of the training schedule.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odesolvers.values import shown

from .folders import TENSORS
from .reading import read_header
from .schedules import DISCRETE
from .weights import check_complete, check_dtypes, is_unused

PARTS = (
    "cond_stage_model.",
    "conditioner.",
    "denoiser.",
    "embedding_manager.",
    "first_stage_model.",
    "model.diffusion_model.",
    "model_ema.",
)
"""Beginnings of the names of weights."""

BUFFERS = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "scale_factor",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)
"""Names of the buffers of training, of which the schedule and the scale of latents are compared."""

MARKERS = (
    "edm_mean",
    "edm_std",
    "edm_vpred.sigma_max",
    "edm_vpred.sigma_min",
    "v_pred",
    "ztsnr",
)
"""Names of the markers that are understood."""

ROOTS = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.",),
}
"""The parts of a pipeline by the beginnings of their weights; where two fit, the first counts."""

ASIDE = ("first_stage_model.loss.", "first_stage_model.model_ema.")
"""Beginnings of weights that a VAE has for its own training alone."""

CHILDREN = 100
"""The most names that continue another one by a word; blocks and layers have at most 33."""

KNOWN = {*BUFFERS, *MARKERS, "denoiser.sigmas"}

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""Prediction types by their names in metadata."""

METADATA: Mapping[str, Mapping[str, str | None]] = {
    "modelspec.predict_key": PREDICTIONS,
    "modelspec.prediction_type": PREDICTIONS,
    "prediction_type": PREDICTIONS,
    "ss_v_parameterization": {"True": "v_prediction", "False": None},
    "ss_zero_terminal_snr": {"True": "ztsnr", "False": None},
}
"""Entries of the metadata of safetensors files, and what their values mean."""

WIDTH_OF_2 = ("model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", 1024)
"""The weight, and the width of its input, by which Stable Diffusion 2 is recognised."""


@dataclass(frozen=True)
class SingleFile:
    """The names and shapes of a single file's tensors, and what it says about itself.

    Attributes:
        shapes: shape of every tensor by its name.
        values: the small tensors that are no weights.
        prediction_type: "epsilon" or "v_prediction", if the file says so.
        zero_snr: whether it says that the schedule has zero terminal SNR.
    """

    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Tensor]
    prediction_type: str | None
    zero_snr: bool

    def names_of(self, part: str) -> list[str]:
        """The names of the weights of a part of the pipeline."""
        return self._names.get(part, [])

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            part = next((part for part, roots in ROOTS.items() if name.startswith(roots)), None)
            if part is not None and not name.startswith(ASIDE):
                found.setdefault(part, []).append(name)
        return found

    @property
    def sizes(self) -> dict[str, list[int]]:
        """The sizes of the weights of each part."""
        return {part: list(self.sized(self.names_of(part))) for part in ROOTS}

    def sized(self, names: Iterable[str]) -> Iterator[int]:
        """The sizes of weights, as networks of diffusers have them."""
        for name in names:
            size = math.prod(self.shapes[name])
            # OpenCLIP keeps the weights of queries, keys and values in one tensor.
            yield from (size // 3,) * 3 if ".in_proj_" in name else (size,)

    @property
    def is_xl(self) -> bool:
        """Whether it is Stable Diffusion XL."""
        return any(key.startswith("conditioner.") for key in self.shapes)

    @property
    def is_2(self) -> bool:
        """Whether it is Stable Diffusion 2, which was published with both predictions."""
        key, width = WIDTH_OF_2
        return self.shapes.get(key, ())[-1:] == (width,)


def read_single_file(path: Path, *, trust: bool) -> SingleFile:
    """Read what a checkpoint says about itself, without its weights.

    Args:
        path: a safetensors file.
        trust: whether the caller knows what the network predicts, so that unknown names are no reason
            to refuse the file.

    Raises:
        ValueError: if the file is damaged, is no checkpoint in the original layout, or says something
            that is not understood.
    """
    from safetensors import safe_open

    metadata, entries = read_header(path)
    shapes = {key: entry.shape for key, entry in entries.items()}
    _check_names(shapes)
    known = [key for key in shapes if key in KNOWN]
    for key in known:
        if entries[key].numel > 100_000:
            raise ValueError(f"its {key} has {entries[key].numel} numbers")
    with safe_open(path, framework="pt") as file:
        values = {key: file.get_tensor(key) for key in known}
    if not any(key.startswith("model.diffusion_model.") for key in shapes):
        raise ValueError("it has no model.diffusion_model, so no network in the original layout")
    unknown = [key for key in shapes if not key.startswith(PARTS) and key not in KNOWN]
    if unknown and not trust:
        raise ValueError(
            f"it holds {', '.join(sorted(unknown)[:3])}"
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            + ", which may say how its network is trained but is not understood: pass prediction_type= "
            "or scheduler= if you know it"
        )
    said = _metadata(metadata, trust)
    if "v_pred" in shapes:
        said.add("v_prediction")
    if "ztsnr" in shapes:
        said.add("ztsnr")
    predictions = said - {"ztsnr"}
    if len(predictions) > 1 and not trust:
        raise ValueError(
            "its markers and its metadata contradict each other: it says both epsilon and v prediction; "
            "pass prediction_type="
        )
    kind = predictions.pop() if len(predictions) == 1 else None
    file = SingleFile(shapes, values, kind, "ztsnr" in said)
    for part in ROOTS:
        check_dtypes(part, {name: entries[name] for name in file.names_of(part)})
    return file


def _check_names(names: Iterable[str]) -> None:
    """Check that a file has no more blocks and layers than networks have.

    The converters of diffusers compare every name with every block.
    """
    known: set[str] = set()
    children: Counter[str] = Counter()
    for name in names:
        if len(known) > 10 * TENSORS or len(name) > 1000 or name.count(".") > 30:
            raise ValueError("its tensors have more or longer names than those of any network")
        start = name
        while start not in known:
            known.add(start)
            parent, _, _ = start.rpartition(".")
            children[parent] += bool(parent)
            start = parent
    for parent, count in children.items():
        if count > CHILDREN and parent != "model_ema":  # which numbers its weights in one word
            raise ValueError(
                f"it has {count} parts of {shown(parent, 60)}, more than any network: at most "
                f"{CHILDREN} are read"
            )


def check_used(file: SingleFile, pipeline: Any) -> None:
    """Check that a pipeline has all weights of its file, and no others.

    The converters of diffusers rename weights, and leave out those for which they know no name. What
    they took is seen from the sizes.

    Raises:
        ValueError: naming the part.
    """
    for part in ROOTS:
        model = getattr(pipeline, part, None)
        weights = {} if model is None else dict(model.named_parameters())
        check_complete(part, [name for name, weight in weights.items() if weight.is_meta])
        names = file.names_of(part)
        if part.startswith("text_encoder"):
            names = [name for name in names if not _is_passed_over(name, model)]
        left, odd = Counter(weight.numel() for weight in weights.values()), []
        for name in names:
            sizes = list(file.sized([name]))
            left.subtract(sizes)
            if any(left[size] < 0 for size in sizes):
                odd.append(file.shapes[name])
        if odd:
            raise ValueError(
                f"its {part} has weights for which its configuration has no place, {len(odd)} of them, "
                f"as one of shape {odd[0]}: it is another network than its configuration says"
            )
        check_complete(part, [f"one of {size} numbers" for size in left if left[size] > 0])


def _is_passed_over(name: str, encoder: Any) -> bool:
    """Whether a text encoder is complete without a weight."""
    # Stable Diffusion 2 takes the last layer but one, and its configuration has no other after it.
    last = f"cond_stage_model.model.transformer.resblocks.{encoder.config.num_hidden_layers}."
    return name.startswith(last) or is_unused(name, projects=hasattr(encoder, "text_projection"))


def set_scheduler(file: SingleFile, pipeline: Any, diffusers: Any) -> None:
    """Give a pipeline the scheduler that its file describes.

    Raises:
        ValueError: if the file contradicts itself or the configuration of the pipeline.
    """
    edm = [key for key in MARKERS if key.startswith("edm_") and key in file.shapes]
    if edm:
        kind = "v_prediction" if "edm_vpred.sigma_max" in edm else "epsilon"
        if file.prediction_type not in (None, kind) or file.zero_snr:
            what = "ztsnr" if file.zero_snr else file.prediction_type
            raise ValueError(f"it holds {edm[0]} and says {what}: only one can be right")
        pipeline.scheduler = _edm_scheduler(file.values, edm, diffusers)
        return
    if file.prediction_type is not None or file.zero_snr:
        pipeline.scheduler = _discrete_scheduler(file, pipeline.scheduler, diffusers)
    _check_buffers(file, pipeline)


def set_parts(file: SingleFile, pipeline: Any) -> None:
    """Give the VAE of a pipeline the statistics of latents that its file holds.

    Raises:
        ValueError: if the network has weights for which its configuration has no place.
    """
    if "edm_mean" in file.values and "edm_std" in file.values:
        pipeline.vae.register_to_config(
            latents_mean=file.values["edm_mean"].float().flatten().tolist(),
            latents_std=file.values["edm_std"].float().flatten().tolist(),
            scaling_factor=0.5,  # of Playground v2.5
        )
    guided = "model.diffusion_model.time_embed.cond_proj.weight"
    if guided in file.shapes and pipeline.unet.config.time_cond_proj_dim is None:
        raise ValueError(
            f"it holds {guided}, the embedding of the guidance scale of a distilled network (LCM), and "
            "the configuration of its UNet has none: pass config= with "
            f"time_cond_proj_dim={file.shapes[guided][1]}"
        )


def _edm_scheduler(values: Mapping[str, Tensor], edm: list[str], diffusers: Any) -> Any:
    """The scheduler of Playground v2.5 or of CosXL, as ComfyUI reads their markers."""
    if edm == ["edm_mean", "edm_std"]:
        return diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    if "edm_vpred.sigma_max" not in edm or "edm_mean" in edm or "edm_std" in edm:
        raise ValueError(
            f"it holds {' and '.join(edm)}, which is neither edm_mean with edm_std (Playground v2.5) "
            "nor edm_vpred.sigma_max (CosXL): pass scheduler= if you know how its network is trained"
        )
    low = values["edm_vpred.sigma_min"].item() if "edm_vpred.sigma_min" in edm else 0.002
    return diffusers.EDMEulerScheduler(
        sigma_min=low,
        sigma_max=values["edm_vpred.sigma_max"].item(),
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
    )


def _discrete_scheduler(file: SingleFile, scheduler: Any, diffusers: Any) -> Any:
    """The pipeline's schedule under the prediction type of its file."""
    name, config = type(scheduler).__name__, scheduler.config
    if name not in DISCRETE or getattr(config, "use_flow_sigmas", False):
        what = file.prediction_type or "ztsnr"
        raise ValueError(f"it says {what}, and its configuration has a {name}: pass scheduler=")
    shared = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "timestep_spacing",
        "steps_offset",
        "set_alpha_to_one",
    )
    options = {key: config[key] for key in shared if key in config}
    if file.zero_snr:
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    kind = file.prediction_type or config.prediction_type
    return diffusers.DDIMScheduler(**options, prediction_type=kind, clip_sample=False)


def _check_buffers(file: SingleFile, pipeline: Any) -> None:
    """Raise an error if the file holds another schedule or scale of latents than the pipeline."""
    values = file.values
    alphas = getattr(pipeline.scheduler, "alphas_cumprod", None)
    tables = {}
    if "alphas_cumprod" in values:
        tables["alphas_cumprod"] = values["alphas_cumprod"].double()
    if "betas" in values:
        tables["betas"] = (1 - values["betas"].double()).cumprod(0)
    if "denoiser.sigmas" in values:
        tables["denoiser.sigmas"] = 1 / (1 + values["denoiser.sigmas"].double() ** 2)
    for name, table in tables.items():
        if alphas is None or len(table) != len(alphas):
            same = False
        else:  # they may be stored in half precision, the first of XL's from the top
            table = torch.sort(table, descending=True).values
            same = bool(torch.isclose(table, alphas.double(), rtol=0.03, atol=1e-5).all())
        if not same:
            raise ValueError(
                f"its {name} is another noise schedule than that of its configuration's "
                f"{type(pipeline.scheduler).__name__}: pass config= or scheduler= with its own"
            )
    scale = pipeline.vae.config.scaling_factor
    if "scale_factor" in values and abs(values["scale_factor"].item() - scale) > 0.01 * scale:
        raise ValueError(
            f"its scale_factor of latents is {values['scale_factor'].item():.6g}, that of its "
            f"configuration {scale:.6g}: pass config= with its own"
        )


def _metadata(metadata: Mapping[str, str], trust: bool) -> set[str]:
    said = set()
    for key, meanings in METADATA.items():
        if key in metadata:
            if metadata[key] not in meanings:
                if trust:
                    continue
                raise ValueError(
                    f"its metadata says {key} = {metadata[key]!r}, which is not understood: pass "
                    "prediction_type= or scheduler= if you know how its network is trained"
                )
            said.add(meanings[metadata[key]])
    return {meaning for meaning in said if meaning is not None}
