"""`load_edm` and `save_edm`: published pickles and safetensors to denoisers and back."""

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
from .networks import DhariwalConfig, DhariwalUNet, SongConfig, SongUNet, UNet
from .pickles import CheckpointError, Record, module_states, module_tensors, read_pickle
from .preconditioning import EDMPrecond, IDDPMPrecond, Preconditioner, VEPrecond, VPPrecond

# The names in the files, each with the network that its class takes where none is named.
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
    """A denoiser from a checkpoint of Karras et al. 2022 (github.com/NVlabs/edm).

    Reads the published pickles and training snapshots, whose code is not executed, and what
    `save_edm` writes.

    Args:
        path_or_url: a ``.pkl`` or ``.safetensors`` file, or the address of one, which is downloaded
            once, into ``torch.hub.get_dir()``.
        device: where to put the network.
        dtype: what the network computes in; the state of a solver, the preconditioning and the
            noise embedding keep their own precision.

    Returns:
        The network with its averaged weights, in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: if there is no such file.
        ConnectionError: if it cannot be downloaded.
        CheckpointError: if the file is damaged, is of an unknown kind, or is refused.
    """
    check_floating_dtype(dtype)
    path = _local(os.fspath(path_or_url))
    read = _read_safetensors if path.suffix == ".safetensors" else _read_published
    denoiser = read(path)
    denoiser.model.compute_in(dtype)
    return denoiser.to(device).eval().requires_grad_(False)


def save_edm(denoiser: Preconditioner, path: str | os.PathLike[str]) -> None:
    """Write a denoiser as safetensors: its tensors as they are, its construction as metadata.

    Args:
        denoiser: from `load_edm`, or made from the classes of this package.
        path: the file to write, ending in ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_edm writes safetensors: name the file so, got {path.name!r}")
    metadata = json.dumps(_describe(denoiser))
    tensors = {name: t.contiguous() for name, t in denoiser.state_dict().items()}
    _safetensors().torch.save_file(tensors, path, metadata={_SAFETENSORS_KEY: metadata})


def _describe(denoiser: Preconditioner) -> dict[str, Any]:
    """The class name and arguments by which a file records `denoiser`; see `_build`."""
    names = {cls: name for name, (cls, _) in _PRECONDITIONERS.items()}
    arguments = dataclasses.asdict(denoiser.model.config)
    del arguments["in_channels"], arguments["out_channels"]
    arguments |= denoiser.arguments()
    arguments["img_channels"] = denoiser.img_channels
    arguments["model_type"] = type(denoiser.model).__name__
    return {"class_name": names[type(denoiser)], "arguments": arguments}


def _build(class_name: str, arguments: dict[str, Any]) -> Preconditioner:
    """The denoiser that a file describes, on the meta device: no memory is spent on it yet."""
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
    """`denoiser` with `tensors` in place of the promises on the meta device."""
    expected = denoiser.state_dict()
    for kind, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            few = ", ".join(sorted(names)[:3])
            raise CheckpointError(f"the file {kind} {len(names)} tensors, such as {few}")
    for name, promise in expected.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{name} in the file is not a floating point tensor")
        if tensor.shape != promise.shape:
            raise CheckpointError(
                f"{name} in the file has shape {tuple(tensor.shape)}, its construction arguments "
                f"ask for {tuple(promise.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} in the file is not finite")
    owned = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    denoiser.load_state_dict(owned, assign=True)
    return denoiser


def _read_published(path: Path) -> Preconditioner:
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
    # The interface that all four classes share comes first, in this order.
    names = ("img_resolution", "img_channels", "label_dim", "use_fp16")
    if len(args) > len(names):
        raise CheckpointError(f"the file passes {len(args)} arguments by position")
    denoiser = _build(record.class_name, dict(zip(names, args, strict=False)) | kwargs)
    _fill(denoiser, module_tensors(record))
    _compare(denoiser, record)
    return denoiser


def _compare(denoiser: Preconditioner, record: Record) -> None:
    """Check that numbers which the file keeps beside the arguments say the same.

    Defaults could have changed between the code that wrote the file and ours: a different
    `sigma_data` or number of attention heads would load without complaint, and be wrong.
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
    # Derived noise levels were computed in float32, the lowest with few digits left.
    slack = 0.05 if name in ("sigma_min", "sigma_max") else 1e-9
    return a == b or abs(a - b) <= slack * abs(a)


def _read_safetensors(path: Path) -> Preconditioner:
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
    """The file at a path, or the cached download of an address."""
    url = urlparse(path_or_url)
    if url.scheme not in ("http", "https"):
        return Path(path_or_url)
    name = os.path.basename(url.path)
    # Files of one name lie at different addresses: the cache must not confuse them.
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
