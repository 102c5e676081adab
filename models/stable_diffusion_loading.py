"""Loading of Stable Diffusion from directories, the Hugging Face hub and single files."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odesolvers.values import printable_cause, shown

from .archives import read_archive
from .folders import (
    PIPELINES,
    clean_index,
    copy_folder,
    inside,
    parts_of,
    weight_patterns,
    write_tensors,
)
from .markers import SPEAKS, check_buffers, scheduler_of, set_statistics
from .networks import check_replacement
from .reading import read_header, read_json
from .single_files import check_guidance, check_used, read_single_file
from .stable_diffusion import StableDiffusion, import_diffusers
from .weights import check_finite, check_report

MESSAGE = 600
"""The most characters of the reason in a message, which the libraries make as long as a file asks."""


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
        ValueError: if the checkpoint is damaged or incomplete, has weights for which there is no place,
            that are not finite or of no floating point, has parts of different models, is not a
            text-to-image Stable Diffusion, or does not say how its network is trained.
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
    if not path.exists():
        path = _download(source, variant)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _quiet():
            clean = Path(folder)
            if path.is_file():
                pipeline = _from_single_file(
                    diffusers, path, clean, config, prediction_type, scheduler
                )
            else:
                pipeline = _from_folder(diffusers, path, clean, dtype, variant)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                wanted = torch.float32 if name == "vae" else dtype
                if any(p.dtype != wanted for p in part.parameters()):
                    part.to(wanted)
                check_finite(name, part)
        if scheduler is not None:
            check_replacement(scheduler, pipeline.scheduler, prediction_type)
            pipeline.scheduler = scheduler
        model = StableDiffusion(
            pipeline,
            prediction_type=prediction_type,
            autocast=autocast,
            channels_last=channels_last,
        )
    except Exception as error:  # many types, from three libraries
        raise ValueError(
            f"{source} could not be read as a Stable Diffusion checkpoint: "
            f"{shown(str(error), MESSAGE)}"
        ) from printable_cause(error)
    return model.to(device)


def _download(source: str, variant: str | None, *, weights: bool = True) -> Path:
    """The snapshot of a repository on the hub, with what is read of it alone.

    Raises:
        FileNotFoundError: if the hub does not provide it.
        ValueError: if it is no pipeline that is supported.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    offline = constants.HF_HUB_OFFLINE  # older versions would list the files of the hub then
    try:
        folder = Path(hf_hub_download(source, "model_index.json")).parent
        parts = parts_of(clean_index(read_json(inside(folder, "model_index.json"))))
        wanted = [f"{part}/{name}" for part in parts for name in ("*.json", "merges.txt")]
        # The folder of a snapshot has the name of its commit: all files are of that of the index.
        snapshot_download(
            source, revision=folder.name, allow_patterns=wanted, local_files_only=offline
        )
        for ending in ("safetensors", "bin") if weights else ():
            names = weight_patterns(folder, parts, variant, ending)
            if names:
                snapshot_download(
                    source, revision=folder.name, allow_patterns=names, local_files_only=offline
                )
    except Exception as error:  # many types, of the hub and of the connection
        if type(error) is ValueError:  # ours: those of the hub are of other classes
            raise ValueError(
                f"{source} could not be read as a Stable Diffusion checkpoint: "
                f"{shown(str(error), MESSAGE)}"
            ) from printable_cause(error)
        raise FileNotFoundError(
            f"{source} is no local path, and the Hugging Face hub did not provide it: "
            f"{shown(str(error), MESSAGE)}"
        ) from printable_cause(error)
    return folder


def _from_folder(
    diffusers: Any, path: Path, clean: Path, dtype: torch.dtype, variant: str | None
) -> Any:
    """Load a pipeline from a folder in diffusers' layout, by way of a clean copy."""
    import transformers

    index = copy_folder(path, clean, variant=variant)
    parts: dict[str, Any] = {}
    with _torch_dtype_warning_ignored():
        for name in parts_of(index):
            library, kind = index[name]
            options: dict[str, Any] = {"local_files_only": True}
            if library == "transformers":
                options["trust_remote_code"] = False
            found = getattr(diffusers if library == "diffusers" else transformers, kind)
            if name == "scheduler" or name.startswith("tokenizer"):
                parts[name] = found.from_pretrained(clean / name, **options)
                continue
            # The pipeline itself would initialise missing weights at random. transformers reports those
            # of another shape if it is told to go on.
            if library == "transformers":
                options["ignore_mismatched_sizes"] = True
            parts[name], report = found.from_pretrained(
                clean / name,
                torch_dtype=torch.float32 if name == "vae" else dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            files = (clean / name).glob("*.safetensors")
            check_report(name, parts[name], report, [n for f in files for n in read_header(f)[1]])
    if index["_class_name"] == PIPELINES[1]:
        parts["force_zeros_for_empty_prompt"] = index["force_zeros_for_empty_prompt"]
    else:
        parts |= dict.fromkeys(("safety_checker", "feature_extractor"))
        parts["requires_safety_checker"] = False
    return getattr(diffusers, index["_class_name"])(**parts)


def _from_single_file(
    diffusers: Any,
    path: Path,
    clean: Path,
    config: str | Path | None,
    prediction_type: str | None,
    scheduler: Any,
) -> Any:
    """Load a pipeline from a single file in the original layout."""
    if path.suffix != ".safetensors":
        archive = read_archive(path)
        path = clean / "model.safetensors"
        notes = {key: value for key, value in archive.notes.items() if SPEAKS.search(key)}
        write_tensors(archive.tensors, path, **notes)
        del archive
    file = read_single_file(path)
    training = file.training
    stated = {"prediction": prediction_type is not None, "scheduler": scheduler is not None}
    training.check_understood(**stated)
    said = any(stated.values()) or training.prediction_type is not None
    if file.is_2 and not said and config is None:
        raise ValueError(
            "it is a Stable Diffusion 2, which was published with epsilon and with v prediction, and "
            "does not say which: pass prediction_type='v_prediction' (of 768 pixels) or 'epsilon' (512)"
        )
    options = {}
    if config is not None:
        folder = (
            Path(config) if Path(config).is_dir() else _download(str(config), None, weights=False)
        )
        (clean / "config").mkdir()
        copy_folder(folder, clean / "config", held=file.sizes)
        options["config"] = str(clean / "config")
    kind = getattr(diffusers, PIPELINES[file.is_xl])
    try:
        pipeline = kind.from_single_file(str(path), **options)
    except NotImplementedError as error:  # of torch, which cannot move weights that are missing
        for name in ("unet", "vae"):
            if _lacks_weights(diffusers, name, path, options):
                raise ValueError(f"weights of the {name} are missing") from error
        raise
    check_guidance(file, pipeline.unet)
    check_used(file, pipeline)
    set_statistics(training, pipeline.vae)
    try:
        pipeline.scheduler = scheduler_of(training, pipeline.scheduler, diffusers)
    except ValueError:
        if scheduler is None:
            raise
        pipeline.scheduler = None  # which the one given must not leave to be guessed
    check_buffers(training, scheduler or pipeline.scheduler, pipeline.vae)
    return pipeline


def _lacks_weights(diffusers: Any, name: str, path: Path, options: dict[str, str]) -> bool:
    """Whether loading this part of a single file ends in the error of missing weights."""
    kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[name]
    try:
        kind.from_single_file(str(path), subfolder=name, **options)
    except NotImplementedError:
        return True
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the libraries log, which has names from the file, control characters included.

    Whatever is wrong with the weights is an error here.
    """
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _torch_dtype_warning_ignored() -> Iterator[None]:
    """Suppress the deprecation warning of `torch_dtype`, the name that works in all versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        yield
