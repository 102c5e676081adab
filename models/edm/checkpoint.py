"""Reading of published pickles, and reading and writing of safetensors files."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor

from ..base import check_floating_dtype
from .dhariwal import DhariwalConfig, DhariwalUNet
from .pickles import CheckpointError, Record, module_states, module_tensors, read_pickle
from .preconditioning import EDMPrecond, IDDPMPrecond, Preconditioner, VEPrecond, VPPrecond
from .song import SongConfig, SongUNet
from .unet import UNet

# The class names in the files, each with its default network.
_PRECONDITIONERS: dict[str, tuple[type[Preconditioner], str]] = {
    "VPPrecond": (VPPrecond, "SongUNet"),
    "VEPrecond": (VEPrecond, "SongUNet"),
    "iDDPMPrecond": (IDDPMPrecond, "DhariwalUNet"),
    "EDMPrecond": (EDMPrecond, "DhariwalUNet"),
}
_SAFETENSORS_KEY = "odesolvers.edm"


def load_edm(
    path_or_url: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Preconditioner:
    """Load a denoiser from a checkpoint of Karras et al. 2022 (github.com/NVlabs/edm).

    Published pickles, training snapshots and the files of `save_edm` are supported. Code in pickles is
    not executed.

    Args:
        path_or_url: path or URL of a ``.pkl`` or ``.safetensors`` file. A URL is downloaded once, to
            ``torch.hub.get_dir()``.
        device: device of the network.
        dtype: dtype that the network computes in. The state of a solver, the preconditioning and the
            noise embedding are not affected.

    Returns:
        The network with its averaged weights, frozen and in evaluation mode.

    Raises:
        FileNotFoundError: if the file does not exist.
        ConnectionError: if the file cannot be downloaded.
        TypeError: if `dtype` is not a floating point dtype.
        CheckpointError: if the file is damaged, unsupported or refused.
    """
    check_floating_dtype(dtype)
    path = _local(os.fspath(path_or_url))
    read = _read_safetensors if path.suffix == ".safetensors" else _read_published
    denoiser = read(path)
    denoiser.model.compute_in(dtype)
    return denoiser.to(device).eval().requires_grad_(False)


def save_edm(denoiser: Preconditioner, path: str | os.PathLike[str]) -> None:
    """Write a denoiser to a safetensors file, with its constructor arguments as metadata.

    Args:
        denoiser: a denoiser from `load_edm` or from the classes of this package.
        path: the output file, ending in ``.safetensors``.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if `path` does not end in ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_edm writes safetensors: name the file so, got {path.name!r}")
    metadata = json.dumps(_describe(denoiser))
    tensors = {name: t.contiguous() for name, t in denoiser.state_dict().items()}
    _safetensors().torch.save_file(tensors, path, metadata={_SAFETENSORS_KEY: metadata})


def _describe(denoiser: Preconditioner) -> dict[str, Any]:
    """The class name and constructor arguments of `denoiser`, the input of `_build`."""
    names = {cls: name for name, (cls, _) in _PRECONDITIONERS.items()}
    arguments = dataclasses.asdict(denoiser.model.config)
    del arguments["in_channels"], arguments["out_channels"]
    arguments |= denoiser.arguments()
    arguments["img_channels"] = denoiser.img_channels
    arguments["model_type"] = type(denoiser.model).__name__
    return {"class_name": names[type(denoiser)], "arguments": arguments}


def _build(class_name: str, arguments: dict[str, Any]) -> Preconditioner:
    """Construct the denoiser described in a file on the meta device, without allocating memory."""
    if class_name not in _PRECONDITIONERS:
        raise CheckpointError(
            f"the file holds a {class_name}; known are {', '.join(_PRECONDITIONERS)}"
        )
    cls, default = _PRECONDITIONERS[class_name]
    rest = dict(arguments)
    model_type = rest.pop("model_type", default)
    own = {name: rest.pop(name) for name in inspect.signature(cls).parameters if name in rest}
    try:
        rest["in_channels"] = channels = rest.pop("img_channels")
        rest["out_channels"] = 2 * channels if cls is IDDPMPrecond else channels
        with torch.device("meta"):
            model: UNet
            if model_type == "SongUNet":
                model = SongUNet(SongConfig(**rest))
            elif model_type == "DhariwalUNet":
                model = DhariwalUNet(DhariwalConfig(**rest))
            else:
                raise ValueError(f"unknown network {model_type!r}")
            return cls(model, **own)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(
            f"the file describes a {class_name} that cannot be constructed: {error}"
        ) from error


def _fill(denoiser: Preconditioner, tensors: dict[str, Tensor]) -> Preconditioner:
    """Replace the meta tensors of `denoiser` by `tensors`, after checking these."""
    expected = denoiser.state_dict()
    for kind, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            few = ", ".join(sorted(names)[:3])
            raise CheckpointError(f"the file {kind} {len(names)} tensors, such as {few}")
    for name, meta in expected.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{name} in the file is not a floating point tensor")
        if tensor.shape != meta.shape:
            raise CheckpointError(
                f"{name} in the file has shape {tuple(tensor.shape)}, its construction arguments "
                f"ask for {tuple(meta.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} in the file is not finite")
    owned = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    denoiser.load_state_dict(owned, assign=True)
    return denoiser


def _read_published(path: Path) -> Preconditioner:
    """Read a published pickle or training snapshot."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            raise CheckpointError(
                f"{path.name} is an archive of torch.save, such as a training-state-*.pt: take the "
                "network-snapshot-*.pkl beside it"
            )
        file.seek(0)
        content = read_pickle(file)
    record = content.get("ema") if isinstance(content, dict) else content
    if not isinstance(record, Record):
        held = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path.name} has no network under 'ema': it holds {held}")
    args, kwargs = record.init
    # All four classes begin with these arguments, in this order.
    names = ("img_resolution", "img_channels", "label_dim", "use_fp16")
    if len(args) > len(names):
        raise CheckpointError(f"the file passes {len(args)} arguments by position")
    denoiser = _build(record.class_name, dict(zip(names, args, strict=False)) | kwargs)
    _fill(denoiser, module_tensors(record))
    _compare(denoiser, record)
    return denoiser


def _compare(denoiser: Preconditioner, record: Record) -> None:
    """Check that the numeric attributes in the file equal those of `denoiser`.

    The defaults of the code that wrote the file may differ from ours: a different `sigma_data` or
    number of attention heads would otherwise be loaded without an error, with wrong results.
    """
    ours = dict(denoiser.named_modules())
    for path, state in module_states(record):
        module = ours.get(path.rstrip("."))
        for name, mine in vars(module).items() if module is not None else ():
            theirs = state.get(name)
            if name == "training" or not isinstance(mine, (bool, int, float)):
                continue
            if isinstance(theirs, (bool, int, float)) and not _same(name, mine, theirs):
                raise CheckpointError(f"the file has {path}{name} = {theirs}, we make it {mine}")


def _same(name: str, a: float, b: float) -> bool:
    # Derived noise levels were computed in float32, in which the lowest lose most of their digits.
    slack = 0.05 if name in ("sigma_min", "sigma_max") else 1e-9
    return a == b or abs(a - b) <= slack * abs(a)


def _read_safetensors(path: Path) -> Preconditioner:
    """Read a file written by `save_edm`."""
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(_SAFETENSORS_KEY)
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except library.SafetensorError as error:
        raise CheckpointError(f"{path.name} is damaged: {error}") from error
    if metadata is None:
        raise CheckpointError(f"{path.name} was not written by save_edm: its metadata is missing")
    try:
        description = json.loads(metadata)
        class_name, arguments = description["class_name"], dict(description["arguments"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the metadata of {path.name} is damaged: {error!r}") from error
    return _fill(_build(class_name, arguments), tensors)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors files need: pip install 'odesolvers[edm]'") from error
    return safetensors


def _local(path_or_url: str) -> Path:
    """The path of a local file, or of the cached download of a URL."""
    url = urlparse(path_or_url)
    if url.scheme not in ("http", "https"):
        return Path(path_or_url)
    name = os.path.basename(url.path)
    # The digest distinguishes files of the same name at different URLs.
    digest = hashlib.sha256(path_or_url.encode()).hexdigest()[:8]
    path = Path(torch.hub.get_dir(), "checkpoints", f"{digest}-{name}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(path_or_url, str(path))
        except (URLError, OSError) as error:
            raise ConnectionError(
                f"could not download {path_or_url}: {error}; without a connection, bring the file "
                f"here by other means and pass its path, or put it at {path}"
            ) from error
    return path
