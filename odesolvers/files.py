"""States in safetensors files, which appear whole or not at all and are believed by type alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from .arithmetic import SideInformation
from .checks import describe, is_finite
from .typed import each, hexadecimal, optional, parsed, printable, whole
from .values import printable_cause
from .writing import open_regular, replacing

T = TypeVar("T")

FORMAT: Final = "odesolvers state"
VERSION: Final = "3"
_LONGEST: Final = 2**23
"""Bytes of the longest header; one of 1000 levels has 0.03 million."""
_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HEADER: Final = {
    "index": whole(0),
    "solver": printable,
    "coupled": bool,
    "sigmas": [hexadecimal],  # every bit of them
    "strides": each([whole(0)]),
    "side": optional(dict),
    "notes": dict,
}


def write_state(
    path: str | os.PathLike[str], fields: Mapping[str, Any], notes: Mapping[str, Any] | None
) -> None:
    """Writes the fields of a `State` and its notes, see `State.save`."""
    safetensors = _safetensors()
    described, tensors = (None, {}) if fields["side"] is None else fields["side"].parts()
    states = {k: fields[k] for k in ("current", "partner") if fields[k] is not None}
    # A denoiser may round differently in another memory format, so that is restored too.
    states = {k: x.detach().to("cpu", copy=True) for k, x in states.items()}  # dense
    header = {k: fields[k] for k in ("index", "coupled")}
    header |= {"side": described, "notes": dict(notes or {})}
    header["solver"] = printable(fields["solver"])
    header["sigmas"] = [sigma.hex() for sigma in fields["sigmas"]]
    header["strides"] = {k: x.stride() for k, x in states.items()}
    stored = {k: x.new_empty(x.shape).copy_(x) for k, x in (states | tensors).items()}
    text = json.dumps(header)
    metadata = {"format": FORMAT, "version": VERSION, "state": text}
    metadata["sha256"] = _digest(text, stored)
    content = safetensors.torch.save(stored, metadata)
    if int.from_bytes(content[:8], "little") > _LONGEST:
        raise ValueError(f"a state with its notes has a header of at most {_LONGEST} bytes")
    with replacing(path) as file:
        file.write(content)


def read_state(path: str | os.PathLike[str], make: Callable[..., T]) -> tuple[T, dict[str, Any]]:
    """What `make` makes of the fields of the `State` in a file, and its notes, see `State.load`."""
    safetensors = _safetensors()
    with open_regular(
        path
    ) as file:  # not mapped: whoever wrote to it would change or kill a reader
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), _LONGEST + 1))
        try:
            if len(header) > _LONGEST:
                raise ValueError(f"its header has more than {_LONGEST} bytes")
            text, digest = _metadata(header)
            with torch.device("cpu"):  # safetensors makes empty tensors on the default one
                tensors = safetensors.torch.load(length + header + file.read())
            if digest != _digest(text, tensors):
                raise ValueError("it is damaged: its contents do not match its checksum")
            fields, notes = _fields(text, tensors)
            return make(**fields), notes
        except OSError:
            raise
        except Exception as error:  # of a file from anywhere
            reason = str(error) if isinstance(error, ValueError) else f"it is damaged, {error!r}"
            raise ValueError(
                f"{os.fspath(path)} is not a saved state: {ascii(reason)[1:-1]:.300}"
            ) from printable_cause(error)


def _metadata(header: bytes) -> tuple[str, str]:
    """The text that describes the state, and the checksum."""
    try:
        found = parsed(header, dict).get("__metadata__", {})
    except ValueError:
        raise ValueError("it is no safetensors file, or a damaged one") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("it is a safetensors file, not a state saved by odesolvers (State.save)")
    if found.get("version") != VERSION:
        raise ValueError(
            f"it is in version {found.get('version')} of the state format, this odesolvers reads "
            f"version {VERSION}: load it with the odesolvers that wrote it"
        )
    return found["state"], found["sha256"]


def _fields(text: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = parsed(text, _HEADER)
    strides, notes, described = fields.pop("strides"), fields.pop("notes"), fields["side"]
    states = {name: _laid_out(tensors.pop(name), strides[name]) for name in strides}
    if described is not None:
        fields["side"] = SideInformation.of_parts(described, tensors)
        fields["side"].check(states["current"].shape)
    if tensors or not {"current"} <= states.keys() <= {"current", "partner"}:
        raise ValueError(f"it has the tensors {sorted(states | tensors)}")
    for x in states.values():
        if not (x.dtype in _FLOATS or (described and x.dtype == torch.int64)):
            raise ValueError(f"its states are {describe(x)}")
        if x.ndim == 0 or x.numel() == 0 or not is_finite(x):
            raise ValueError(f"its states, {describe(x)}, are empty or not finite")
    return {"partner": None, **fields, **states}, notes


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor of these strides without gaps."""
    fits, below = len(strides) == x.ndim and x.numel() > 0, 1
    for stride, n in sorted(zip(strides, x.shape, strict=False)):
        if n > 1:
            fits, below = fits and stride == below, below * n
    if not fits:  # two elements in one place, or a gap
        raise ValueError(f"{describe(x)} has no strides {strides}")
    return x.new_empty_strided(x.shape, strides).copy_(x)


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
            "saving and loading states needs safetensors: pip install safetensors"
        ) from error
    return safetensors
