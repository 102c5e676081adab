"""Loading of Stable Diffusion from directories, the Hugging Face hub and single files."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .stable_diffusion import PIPELINES, StableDiffusion, import_diffusers


def load_stable_diffusion(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    autocast: torch.dtype | None = None,
    prediction_type: str | None = None,
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
        prediction_type: see `StableDiffusion`; a single file does not always specify it.
        variant: variant of the weight files in a directory or on the hub, such as ``"fp16"``.
        config: directory or hub id with the configuration of a single file; by default diffusers
            recognises the model and downloads its configuration from the hub.

    Raises:
        ImportError: if diffusers or transformers is not installed.
        FileNotFoundError: if `path_or_id` is neither a local path nor on the hub.
        ValueError: if the checkpoint is damaged or is not a text-to-image Stable Diffusion.
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
            pipeline = _from_single_file(diffusers, path, dtype, config)
        else:
            pipeline = _from_pretrained(diffusers, source, dtype, variant)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                _check_complete(name, [k for k, p in part.named_parameters() if p.is_meta])
    except Exception as error:  # many types, from three libraries and the connection
        if path.exists():
            raise ValueError(
                f"{source} could not be read as a Stable Diffusion checkpoint: {error}"
            ) from error
        raise FileNotFoundError(
            f"{source} is no local path, and the Hugging Face hub did not provide it: {error}"
        ) from error
    pipeline.vae.float()
    model = StableDiffusion(
        pipeline, prediction_type=prediction_type, autocast=autocast, channels_last=channels_last
    )
    return model.to(device)


def _from_pretrained(diffusers: Any, source: str, dtype: torch.dtype, variant: str | None) -> Any:
    """Load a pipeline from a directory in diffusers' layout or from the hub."""
    import transformers

    index = diffusers.DiffusionPipeline.load_config(source)
    kind = index["_class_name"]
    if kind not in PIPELINES:
        raise ValueError(f"it is a {kind}; supported are {' and '.join(PIPELINES)}")
    parts: dict[str, Any] = {"variant": variant}
    if kind == PIPELINES[0]:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    with _torch_dtype_warning_ignored():
        for name in ("text_encoder", "text_encoder_2"):
            if name in index:
                # The pipeline itself would initialise missing weights at random.
                parts[name], report = getattr(transformers, index[name][1]).from_pretrained(
                    source,
                    subfolder=name,
                    torch_dtype=dtype,
                    variant=variant,
                    output_loading_info=True,
                )
                _check_complete(name, report["missing_keys"])
        return getattr(diffusers, kind).from_pretrained(source, torch_dtype=dtype, **parts)


def _from_single_file(
    diffusers: Any, path: Path, dtype: torch.dtype, config: str | Path | None
) -> Any:
    """Load a pipeline from a single file in the original layout."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    else:
        content = torch.load(path, map_location="meta", weights_only=True)
        keys = list(content.get("state_dict", content))
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise ValueError("it has no model.diffusion_model, so no network in the original layout")
    is_xl = any(key.startswith("conditioner.") for key in keys)
    options = {} if config is None else {"config": str(config)}
    with _torch_dtype_warning_ignored():
        return getattr(diffusers, PIPELINES[is_xl]).from_single_file(
            str(path), torch_dtype=dtype, **options
        )


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
