"""States in files: safetensors, with what a run needs to go on in the header."""

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
from .arithmetic.stack import Done
from .grids import Grid
from .state import State, check_pair

FORMAT: Final = "odesolvers state"
VERSION: Final = "1"


def write(
    state: State, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None
) -> None:
    """Save `state`; see `State.save`. The file appears whole or not at all."""
    safetensors = _safetensors()
    tensors = {"cleaner": state.current, "noisier": state.partner}
    side, side_tensors = _describe_side(state.side)
    stored = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in (tensors | side_tensors).items()
        if tensor is not None
    }
    # Hexadecimal floats: every level comes back to the bit, which `State.check` insists on.
    header = {
        "index": state.index,
        "sigmas": [sigma.hex() for sigma in state.sigmas],
        "solver": state.solver,
        "side": side,
        "coupled": state.coupled,
        "channels_last": _in_channels_last(state.current),
        "notes": dict(notes or {}),
    }
    metadata = {"format": FORMAT, "version": VERSION, "state": json.dumps(header)}
    metadata["sha256"] = _digest(metadata["state"], stored)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.torch.save_file(stored, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[State, dict[str, Any]]:
    """The state in the file `path`, see `State.load`, and the notes that were saved with it."""
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata)
            # Copies: what the file shows must not change under a state when the file does.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a saved state: not a safetensors file, or a damaged one ({error})"
        ) from error
    if metadata.get("sha256") != _digest(metadata.get("state", ""), tensors):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum")
    header = json.loads(metadata["state"])
    pair = {name: tensors[name] for name in ("cleaner", "noisier") if name in tensors}
    if header["channels_last"]:  # a denoiser may round otherwise in another memory format
        pair = {
            name: tensor.contiguous(memory_format=torch.channels_last)
            for name, tensor in pair.items()
        }
    state = State(
        current=pair["cleaner"],
        partner=pair.get("noisier"),
        index=header["index"],
        sigmas=tuple(float.fromhex(sigma) for sigma in header["sigmas"]),
        solver=header["solver"],
        side=_read_side(header["side"], tensors),
        coupled=header.get("coupled", False),  # files of before there were coupled solvers
    )
    check_pair(state)
    state.check(Grid.of(state.sigmas), state.solver)
    return state.to(device), header["notes"]


def _in_channels_last(x: Tensor) -> bool:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_contiguous()


def _describe_side(side: SideInformation | None) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """What JSON can hold of `side`, and its tensors by name."""
    if side is None:
        return None, {}
    tensors = {f"side.word.{i}": word for i, word in enumerate(side.words)}
    tensors |= {"side.packed": side.packed, "side.checksum": side.checksum}
    described = {
        "dtype": str(side.dtype).removeprefix("torch."),
        "words": len(side.words),
        "done": side.done,
        "origin": side.origin,
    }
    return described, tensors


def _read_side(
    described: dict[str, Any] | None, tensors: Mapping[str, Tensor]
) -> SideInformation | None:
    """What `_describe_side` was given."""
    if described is None:
        return None
    return SideInformation(
        dtype=getattr(torch, described["dtype"]),
        words=tuple(tensors[f"side.word.{i}"] for i in range(described["words"])),
        packed=tensors["side.packed"],
        done=tuple(Done(*done) for done in described["done"]),
        origin=described["origin"],
        checksum=tensors["side.checksum"],
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
