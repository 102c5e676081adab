"""States in files: the tensors as safetensors, everything else as JSON in its header."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any, Final

import torch
from torch import Tensor

from .arithmetic import SideInformation
from .state import State, check_pair

_FORMAT: Final = "odesolvers.State"
_VERSION: Final = 1


def save_state(state: State, path: str | os.PathLike[str]) -> None:
    """Write `state` to a safetensors file, to the bit, with a checksum of its contents.

    Raises:
        ImportError: where safetensors is not installed.
    """
    tensors, metadata = state_to_tensors(state)
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "state": json.dumps(metadata),
        "crc32": _crc(tensors, json.dumps(metadata)),
    }
    _safetensors().torch.save_file(tensors, os.fspath(path), metadata=header)


def load_state(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
    """Read what `save_state` wrote.

    Raises:
        ImportError: where safetensors is not installed.
        OSError: if the file cannot be opened.
        ValueError: if it is not a state, is of a version that this one cannot read, or is damaged.
    """
    safetensors = _safetensors()
    name = os.fspath(path)
    with open(name, "rb"):
        pass  # a missing file is an OSError, and not a damaged one
    try:
        with safetensors.safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{name} is not a safetensors file, or is damaged: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{name} does not hold a state: it was not written by save_state")
    if header.get("version") != str(_VERSION):
        raise ValueError(
            f"{name} is of version {header.get('version')}, this package reads version {_VERSION}"
        )
    if header.get("crc32") != _crc(tensors, header.get("state", "")):
        raise ValueError(f"{name} is damaged: its contents do not have the checksum of its header")
    return state_from_tensors(tensors, json.loads(header["state"])).to(device)


def state_to_tensors(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All of `state` as named tensors on the CPU and values that JSON can hold."""
    pair = {"cleaner": state.cleaner, "noisier": state.noisier}
    tensors = {name: tensor for name, tensor in pair.items() if tensor is not None}
    metadata: dict[str, Any] = {
        "index": state.index,
        "sigmas": list(state.sigmas),
        "solver": state.solver,
        "side": None,
    }
    side = state.side
    if side is not None:
        tensors |= {f"side.word.{i}": word for i, word in enumerate(side.words)}
        tensors |= {"side.packed": side.packed, "side.checksum": side.checksum}
        metadata["side"] = {
            "dtype": str(side.dtype).removeprefix("torch."),
            "words": len(side.words),
            "spills": [list(spill) for spill in side.spills],
            "depth": side.depth,
            "origin": side.origin,
        }
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata


def state_from_tensors(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> State:
    """The state that `state_to_tensors` was given, on the CPU.

    Raises:
        ValueError: if something is missing or the parts do not fit each other.
    """
    try:
        side = metadata["side"]
        state = State(
            cleaner=tensors["cleaner"],
            noisier=tensors.get("noisier"),
            index=int(metadata["index"]),
            sigmas=tuple(float(sigma) for sigma in metadata["sigmas"]),
            solver=str(metadata["solver"]),
            side=side
            and SideInformation(
                dtype=getattr(torch, side["dtype"]),
                words=tuple(tensors[f"side.word.{i}"] for i in range(side["words"])),
                packed=tensors["side.packed"],
                spills=tuple((int(depth), int(bound)) for depth, bound in side["spills"]),
                depth=int(side["depth"]),
                origin=int(side["origin"]),
                checksum=tensors["side.checksum"],
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"these tensors and metadata are not a state: {error!r}") from error
    check_pair(state)
    return state


def _crc(tensors: dict[str, Tensor], text: str) -> str:
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(f"{name} {tuple(tensors[name].shape)}".encode(), total)
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes(), total)
    return f"{total:08x}"


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading states needs safetensors: pip install 'odesolvers[cli]'"
        ) from error
    return safetensors
