"""Reading of published pickles, and reading and writing of safetensors files."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse
from urllib.request import urlopen

import torch

from odesolvers.values import printable_cause
from odesolvers.writing import replacing

from ..base import check_floating_dtype
from .checks import brief
from .dhariwal import DhariwalConfig, DhariwalUNet
from .pickles import Record, module_states, module_tensors, read_pickle
from .preconditioning import EDMPrecond, IDDPMPrecond, Preconditioner, VEPrecond, VPPrecond
from .song import SongConfig, SongUNet
from .stored import FLOATING, CheckpointError, StoredTensor, read_file, read_safetensors
from .unet import UNet, UNetConfig

# The class names in the files, each with its default network.
_PRECONDITIONERS: dict[str, tuple[type[Preconditioner], str]] = {
    "VPPrecond": (VPPrecond, "SongUNet"),
    "VEPrecond": (VEPrecond, "SongUNet"),
    "iDDPMPrecond": (IDDPMPrecond, "DhariwalUNet"),
    "EDMPrecond": (EDMPrecond, "DhariwalUNet"),
}
_NETWORKS: dict[str, tuple[type[UNetConfig], Callable[[Any], UNet]]] = {
    "SongUNet": (SongConfig, SongUNet),
    "DhariwalUNet": (DhariwalConfig, DhariwalUNet),
}
_SAFETENSORS_KEY = "odesolvers.edm"
DOWNLOAD = 2**32
"""The most bytes of a download; the largest published network has 1.2e9."""
BLOCKS = 500
"""The most residual blocks of a network in a file; the largest published one has 44."""
_BLOCK = re.compile(r"model\.(?:enc|dec)\.\d+x\d+_(?:block\d+|in[01]|up|down)(?=\.)")


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
            ``torch.hub.get_dir()``, if it has at most 4 GiB.
        device: device of the network.
        dtype: dtype that the network computes in. The state of a solver, the preconditioning and the
            noise embedding are not affected.

    Returns:
        The network with its averaged weights, frozen and in evaluation mode.

    Raises:
        FileNotFoundError: if the file does not exist.
        ConnectionError: if the file cannot be downloaded, or saved.
        TypeError: if `dtype` is not a floating point dtype.
        CheckpointError: if the file is damaged, unsupported or refused.
    """
    check_floating_dtype(dtype)
    path = _local(os.fspath(path_or_url))
    data = read_file(path)
    read = _read_safetensors if path.suffix == ".safetensors" else _read_published
    try:
        denoiser = read(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name[-60:]}: {error}") from printable_cause(error)
    except Exception as error:  # anything that no check foresaw
        raise CheckpointError(
            f"{path.name[-60:]} is damaged: {type(error).__name__}: {error}"
        ) from printable_cause(error)
    denoiser.model.compute_in(dtype)
    return denoiser.to(device).eval().requires_grad_(False)


def save_edm(denoiser: Preconditioner, path: str | os.PathLike[str]) -> None:
    """Write a denoiser to a safetensors file, with its constructor arguments as metadata.

    Args:
        denoiser: a denoiser from `load_edm` or from the classes of this package.
        path: the output file, ending in ``.safetensors``.

    Raises:
        ImportError: if safetensors is not installed.
        OSError: if the file cannot be written; an older one of its name stays as it was.
        ValueError: if `path` does not end in ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_edm writes safetensors: name the file so, got {path.name!r}")
    metadata = json.dumps(_describe(denoiser))
    tensors = {name: t.contiguous() for name, t in denoiser.state_dict().items()}
    data = _safetensors().torch.save(tensors, metadata={_SAFETENSORS_KEY: metadata})
    with replacing(path) as file:
        file.write(data)


def _describe(denoiser: Preconditioner) -> dict[str, Any]:
    """The class name and constructor arguments of `denoiser`, the input of `_build`."""
    names = {cls: name for name, (cls, _) in _PRECONDITIONERS.items()}
    arguments = dataclasses.asdict(denoiser.model.config)
    del arguments["in_channels"], arguments["out_channels"]
    arguments |= denoiser.arguments()
    arguments["img_channels"] = denoiser.img_channels
    arguments["model_type"] = type(denoiser.model).__name__
    return {"class_name": names[type(denoiser)], "arguments": arguments}


def _class(name: Any) -> tuple[type[Preconditioner], str]:
    """The class that a file names, and its default network."""
    if not isinstance(name, str) or name not in _PRECONDITIONERS:
        known = ", ".join(_PRECONDITIONERS)
        raise CheckpointError(f"the file holds a network {brief(name)}; known are {known}")
    return _PRECONDITIONERS[name]


def _build(
    class_name: Any, arguments: dict[str, Any], tensors: dict[str, StoredTensor]
) -> Preconditioner:
    """Construct the denoiser described in a file on the meta device, without allocating memory.

    The numbers of its parts are compared with those of `tensors` before it is constructed, so that this
    takes no longer than the size of the file allows.
    """
    cls, default = _class(class_name)
    rest = dict(arguments)
    model_type = rest.pop("model_type", default)
    own = {name: rest.pop(name) for name in inspect.signature(cls).parameters if name in rest}
    try:
        rest["in_channels"] = channels = rest.pop("img_channels")
        if cls is IDDPMPrecond and type(channels) is int:
            rest["out_channels"] = 2 * channels
        else:
            rest["out_channels"] = channels
        if not isinstance(model_type, str) or model_type not in _NETWORKS:
            raise ValueError(f"unknown network {brief(model_type)}")
        config_class, network = _NETWORKS[model_type]
        config = config_class(**rest)
        _compare_sizes(config, own.get("M", 0), tensors)
        with torch.device("meta"):
            return cls(network(config), **own)
    except CheckpointError:
        raise
    except Exception as error:  # of arguments of any type
        raise CheckpointError(
            f"the file describes a {class_name} that cannot be constructed: {error}"
        ) from error


def _compare_sizes(config: UNetConfig, levels: Any, tensors: dict[str, StoredTensor]) -> None:
    """Check that the file has enough tensors and numbers for the network that it describes."""
    total = sum(tensor.numel for tensor in tensors.values())
    blocks = len(config.channel_mult) * (2 * config.num_blocks + 3)
    named = {match[0] for match in map(_BLOCK.match, tensors) if match}
    for what, asked, held in (
        ("residual blocks", blocks, min(len(named), BLOCKS)),
        ("channels", config.model_channels, total),
        ("filter taps", len(getattr(config, "resample_filter", ())) ** 2, max(total, 64)),
        ("noise levels", levels if type(levels) is int else 0, total),
    ):
        if asked > held:
            raise CheckpointError(
                f"the file lacks tensors: its construction arguments ask for {brief(asked)} {what}, its "
                f"{len(tensors)} tensors have at most {held}"
            )


def _fill(denoiser: Preconditioner, tensors: dict[str, StoredTensor]) -> Preconditioner:
    """Replace the meta tensors of `denoiser` by `tensors` of a file, after checks."""
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
        if tensor.storage.dtype not in FLOATING.values():
            raise CheckpointError(
                f"{name} in the file is not a floating point tensor, but {tensor.storage.dtype}"
            )
        if tensor.shape != meta.shape:
            raise CheckpointError(
                f"{name} in the file has shape {tuple(tensor.shape)}, its construction arguments "
                f"ask for {tuple(meta.shape)}"
            )
    owned = {}
    for name, tensor in tensors.items():
        owned[name] = tensor.load()
        if not bool(owned[name].isfinite().all()):
            raise CheckpointError(f"{name} in the file is not finite")
    denoiser.load_state_dict(owned, assign=True)
    return denoiser


def _read_published(data: memoryview) -> Preconditioner:
    """Read a published pickle or training snapshot."""
    if bytes(data[:4]) == b"PK\x03\x04":
        raise CheckpointError(
            "it is an archive of torch.save, such as a training-state-*.pt: take the "
            "network-snapshot-*.pkl beside it"
        )
    content = read_pickle(data)
    record = content.get("ema") if isinstance(content, dict) else content
    if not isinstance(record, Record):
        held = "a " + type(content).__name__
        if isinstance(content, dict):
            held = ", ".join(brief(key) for key in list(content)[:5]) or "nothing"
        raise CheckpointError(f"no network under 'ema': the file holds {held}")
    args, kwargs = record.init
    # All four classes begin with these arguments, in this order.
    names = ("img_resolution", "img_channels", "label_dim", "use_fp16")
    if len(args) > len(names):
        raise CheckpointError(f"the file passes {len(args)} arguments by position")
    _class(record.class_name)
    tensors = module_tensors(record)
    if sum(tensor.nbytes for tensor in tensors.values()) > len(data):
        raise CheckpointError("refused: tensors in the file share their numbers with others")
    denoiser = _build(record.class_name, dict(zip(names, args, strict=False)) | kwargs, tensors)
    _fill(denoiser, tensors)
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


def _read_safetensors(data: memoryview) -> Preconditioner:
    """Read a file written by `save_edm`."""
    notes, tensors = read_safetensors(data)
    if _SAFETENSORS_KEY not in notes:
        raise CheckpointError("it was not written by save_edm: its metadata is missing")
    try:
        description = json.loads(notes[_SAFETENSORS_KEY])
        class_name, arguments = description["class_name"], dict(description["arguments"])
    except Exception as error:
        raise CheckpointError(
            f"its metadata is damaged: {type(error).__name__}: {error}"
        ) from printable_cause(error)
    return _fill(_build(class_name, arguments, tensors), tensors)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors files need: pip install safetensors") from error
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
            with urlopen(path_or_url, timeout=60) as response, replacing(path) as file:
                _copy(response, file, path_or_url)
        except OSError as error:  # of the connection, or of the disk
            raise ConnectionError(
                f"could not download {path_or_url}: {error}; without a connection, bring the file "
                f"here by other means and pass its path, or put it at {path}"
            ) from error
    return path


def _copy(response: HTTPResponse, file: IO[bytes], url: str) -> None:
    """Copy a download of at most `DOWNLOAD` bytes, and show its progress in a terminal.

    Raises:
        CheckpointError: if it is longer.
        OSError: if it ends early.
    """
    total, done, shown = int(response.headers.get("Content-Length") or 0), 0, -1
    while chunk := response.read(2**20):
        done += len(chunk)
        if done > DOWNLOAD:
            raise CheckpointError(f"refused: {url[:100]} has more than {DOWNLOAD} bytes")
        file.write(chunk)
        if sys.stderr.isatty() and done >> 24 > shown:
            shown = done >> 24
            of = f" of {total / 1e6:.0f}" if total else ""
            print(f"\r{done / 1e6:.0f}{of} MB of {url[-60:]}", end="", file=sys.stderr)
    if done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")
