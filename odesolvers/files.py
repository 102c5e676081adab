"""Tensors with a JSON header in safetensors files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from .arithmetic import SideInformation

FORMAT: Final = "odesolvers state"
VERSION: Final = "2"


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Writes `tensors` and a `header` that JSON can hold to `path`, with their checksum.

    Raises:
        ImportError: if safetensors is not installed.
        OSError: if the file cannot be written.
    """
    safetensors = _safetensors()
    # A denoiser may round differently in another memory format, so that is restored too.
    last = [name for name, tensor in tensors.items() if _is_channels_last(tensor)]
    stored = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    text = json.dumps({**header, "channels_last": last})
    metadata = {"format": FORMAT, "version": VERSION, "state": text}
    metadata["sha256"] = _digest(text, stored)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.torch.save_file(stored, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `write` wrote.

    Raises:
        ImportError: if safetensors is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind or version, or does not match its checksum.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata)
            # Copies, so that a later change of the file does not reach the tensors.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a saved state: not a safetensors file, or a damaged one ({error})"
        ) from error
    text = metadata.get("state", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum")
    header = json.loads(text)
    for name in header.pop("channels_last"):
        tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    return tensors, header


def write_state(
    path: str | os.PathLike[str], fields: Mapping[str, Any], notes: Mapping[str, Any] | None
) -> None:
    """Writes the fields of a `State` and its notes, see `State.save`."""
    described, tensors = ({}, {}) if fields["side"] is None else fields["side"].parts()
    tensors |= {k: fields[k] for k in ("current", "partner") if fields[k] is not None}
    header = {k: fields[k] for k in ("index", "solver", "coupled")}
    header["sigmas"] = [sigma.hex() for sigma in fields["sigmas"]]  # hexadecimal keeps every bit
    write(path, tensors, {**header, "side": described, "notes": dict(notes or {})})


def read_state(
    path: str | os.PathLike[str], device: torch.device | str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the `State` in a file, on `device`, and its notes."""
    tensors, header = read(path)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    fields = {k: header[k] for k in ("index", "solver", "coupled")}
    fields |= {"current": tensors["current"], "partner": tensors.get("partner")}
    fields["sigmas"] = tuple(map(float.fromhex, header["sigmas"]))
    fields["side"] = SideInformation.of_parts(header["side"], tensors) if header["side"] else None
    return fields, header["notes"]


def _is_channels_last(x: Tensor) -> bool:
    return (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )


def _check_kind(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not a state saved by odesolvers (State.save)"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} is in version {metadata.get('version')} of the state format, this odesolvers "
            f"reads version {VERSION}: load it with the odesolvers that wrote it"
        )


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading states needs safetensors: pip install 'odesolvers[cli]'"
        ) from error
    return safetensors
