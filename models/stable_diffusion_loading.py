"""Loading of Stable Diffusion from directories, the Hugging Face hub and single files."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .single_files import read_single_file, set_parts, set_scheduler
from .stable_diffusion import PIPELINES, StableDiffusion, import_diffusers


def load_stable_diffusion(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    autocast: torch.dtype | None = None,
    prediction_type: str | None = None,
    scheduler: Any = None,
    variant: str | None = None,
    config: str | Path | None = None,
) -> StableDiffusion:
    """Load Stable Diffusion 1.x, 2.x or XL from a directory, the Hugging Face hub or a single file.

    Args:
        path_or_id: a directory in diffusers' layout; a hub id such as
            ``"stabilityai/stable-diffusion-xl-base-1.0"``; or a ``.safetensors`` or ``.ckpt`` file in
            the original layout.
        dtype: dtype of the network and the text encoders. The VAE computes in float32, since that of
            XL overflows in half precision. Solver states are not converted.
        device: device of all models.
        channels_last: see `StableDiffusion`.
        autocast: see `StableDiffusion`.
        prediction_type: see `StableDiffusion`; a single file does not always specify it. What a file
            says by marker tensors (``v_pred``, ``ztsnr``, ``edm_mean``, ``edm_vpred.sigma_max``), by its
            metadata or by its own table of noise levels is used or, if it is not understood, refused.
        scheduler: scheduler of diffusers that describes how the network is trained, in place of the
            checkpoint's own.
        variant: variant of the weight files in a directory or on the hub, such as ``"fp16"``.
        config: directory or hub id with the configuration of a single file; by default diffusers
            recognises the model and downloads its configuration from the hub.

    Raises:
        ImportError: if diffusers or transformers is not installed.
        FileNotFoundError: if `path_or_id` is neither a local path nor on the hub.
        ValueError: if the checkpoint is damaged or incomplete, is not a text-to-image Stable Diffusion,
            or does not say how its network is trained.
    """
    diffusers = import_diffusers()
    path = Path(path_or_id)
    source = str(path_or_id)
    if path.suffix in (".safetensors", ".ckpt") and not path.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{source} holds no model_index.json, so it is no directory that a diffusers pipeline "
            "was saved to; give the directory above unet/ and vae/, or a single-file checkpoint"
        )
    try:
        if path.is_file():
            pipeline = _from_single_file(diffusers, path, config, prediction_type, scheduler)
        else:
            pipeline = _from_pretrained(diffusers, source, dtype, variant)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                _check_complete(name, [k for k, p in part.named_parameters() if p.is_meta])
                wanted = torch.float32 if name == "vae" else dtype
                if any(p.dtype != wanted for p in part.parameters()):
                    part.to(wanted)
        if scheduler is not None:
            pipeline.scheduler = scheduler
        model = StableDiffusion(
            pipeline,
            prediction_type=prediction_type,
            autocast=autocast,
            channels_last=channels_last,
        )
    except Exception as error:  # many types, from three libraries and the connection
        if path.exists() or type(error) is ValueError:  # the hub's own are of other classes
            raise ValueError(
                f"{source} could not be read as a Stable Diffusion checkpoint: {error}"
            ) from error
        raise FileNotFoundError(
            f"{source} is no local path, and the Hugging Face hub did not provide it: {error}"
        ) from error
    return model.to(device)


def _from_pretrained(diffusers: Any, source: str, dtype: torch.dtype, variant: str | None) -> Any:
    """Load a pipeline from a directory in diffusers' layout or from the hub."""
    import transformers

    index = diffusers.DiffusionPipeline.load_config(source)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(f"it is a {kind}; supported are {' and '.join(PIPELINES)}")
    encoders = ("text_encoder", "text_encoder_2")[: 1 + (kind == PIPELINES[1])]
    for name in ("unet", "vae", "scheduler", *encoders, *map(_tokenizer_of, encoders)):
        if not index.get(name) or index[name][1] is None:
            raise ValueError(
                f"its model_index.json names no {name}, so the pipeline was saved without it: save it "
                "with all parts, or give the parts to a pipeline and that to StableDiffusion"
            )
    parts: dict[str, Any] = {"variant": variant}
    if kind == PIPELINES[0]:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    with _torch_dtype_warning_ignored():
        for name in ("unet", "vae", *encoders):
            # The pipeline itself would initialise missing weights at random.
            library = transformers if name in encoders else diffusers
            found = getattr(library, index[name][1], None)
            if found is None:
                raise ValueError(
                    f"its {name} is a {index[name][1]}, no class of {library.__name__}"
                )
            parts[name], report = found.from_pretrained(
                source,
                subfolder=name,
                torch_dtype=torch.float32 if name == "vae" else dtype,
                variant=variant,
                output_loading_info=True,
            )
            _check_complete(name, report["missing_keys"])
            if name == "unet" and report["unexpected_keys"]:
                raise ValueError(
                    "its unet has weights for which its configuration has no place, such as "
                    f"{sorted(report['unexpected_keys'])[0]}: it is another network than its "
                    "config.json says"
                )
        return getattr(diffusers, kind).from_pretrained(source, torch_dtype=dtype, **parts)


def _tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _from_single_file(
    diffusers: Any,
    path: Path,
    config: str | Path | None,
    prediction_type: str | None,
    scheduler: Any,
) -> Any:
    """Load a pipeline from a single file in the original layout."""
    said = prediction_type is not None or scheduler is not None
    file = read_single_file(path, trust=said)
    if file.is_2 and not said and config is None and file.prediction_type is None:
        raise ValueError(
            "it is a Stable Diffusion 2, which was published with epsilon and with v prediction, and "
            "does not say which: pass prediction_type='v_prediction' (of 768 pixels) or 'epsilon' (512)"
        )
    options = {} if config is None else {"config": str(config)}
    kind = getattr(diffusers, PIPELINES[file.is_xl])
    try:
        pipeline = kind.from_single_file(str(path), **options)
    except NotImplementedError as error:  # of torch, which cannot move weights that are missing
        for name in ("unet", "vae"):
            if _lacks_weights(diffusers, name, path, options):
                raise ValueError(f"weights of the {name} are missing") from error
        raise
    set_parts(file, pipeline)
    if scheduler is None:
        set_scheduler(file, pipeline, diffusers)
    return pipeline


def _lacks_weights(diffusers: Any, name: str, path: Path, options: dict[str, str]) -> bool:
    """Whether loading this part of a single file ends in the error of missing weights."""
    kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[name]
    try:
        kind.from_single_file(str(path), subfolder=name, **options)
    except NotImplementedError:
        return True
    return False


def _check_complete(part: str, names: Iterable[str]) -> None:
    """Raise an error if `names`, the missing weights of a part, is not empty."""
    missing = sorted(names)
    if missing:
        raise ValueError(
            f"weights of the {part} are missing: {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )


@contextlib.contextmanager
def _torch_dtype_warning_ignored() -> Iterator[None]:
    """Suppress the deprecation warning of `torch_dtype`, the name that works in all versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        yield
