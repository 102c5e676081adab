"""Files in the wire format of NVlabs' checkpoints, written without their code."""

from __future__ import annotations

import io
import math
import pickle
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from odesolvers.models.edm import (
    DhariwalConfig,
    DhariwalUNet,
    EDMPrecond,
    IDDPMPrecond,
    Preconditioner,
    SongConfig,
    SongUNet,
    VEPrecond,
    VPPrecond,
    load_edm,
)
from odesolvers.models.edm.layers import (
    Block,
    ConvDown,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    ResampleConv,
)

SONG: dict[str, Any] = {
    "model_channels": 16,
    "channel_mult": [1, 2],
    "attn_resolutions": [4],
    "num_blocks": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpmpp": SONG,
    "ncsnpp": SONG
    | {
        "channel_mult": [1, 2, 2],
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
    },
    "skips": SONG
    | {
        "channel_mult": [1, 2, 2],
        "encoder_type": "skip",
        "decoder_type": "skip",
        "resample_filter": [1, 3, 3, 1],
    },
    "adm": SONG | {"model_channels": 64},
}
PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
    "iDDPMPrecond": IDDPMPrecond,
    "EDMPrecond": EDMPrecond,
}


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Deterministic numbers in [-1, 1], float64, by a formula that any program can repeat."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * steps + zlib.crc32(name.encode()) % 1000).reshape(shape)


def fill(module: nn.Module) -> None:
    """Set all parameters from `wave`, at sizes that keep every layer's output near 1."""
    for name, value in module.state_dict().items():
        if name == "u" or name.endswith("resample_filter"):
            continue
        numbers = wave(name, tuple(value.shape))
        if name.endswith("freqs"):
            numbers = 3 * numbers
        elif value.ndim == 1:
            gain = "norm" in name and name.endswith("weight")
            numbers = 0.2 * numbers + (1 if gain else 0)
        else:
            numbers = numbers * (2 / math.prod(value.shape[1:])) ** 0.5
        value.copy_(numbers)


def tiny(
    architecture: str = "ddpmpp", precond: str = "EDMPrecond", classes: int = 0, **options: Any
) -> Preconditioner:
    """A small network for 8x8 images with parameters from `fill`."""
    cls = PRECONDITIONERS[precond]
    shape = {"img_resolution": 8, "in_channels": 3, "out_channels": 3 + 3 * (cls is IDDPMPrecond)}
    arguments = shape | {"label_dim": classes} | ARCHITECTURES[architecture] | options
    if architecture == "adm":
        denoiser = cls(DhariwalUNet(DhariwalConfig(**arguments)))
    else:
        denoiser = cls(SongUNet(SongConfig(**arguments)))
    denoiser.eval().requires_grad_(False)
    fill(denoiser)
    return denoiser


class Persistent:
    """Pickles as a persistence record: source code, class name, attributes."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str = "1 / 0\n") -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj,
            (self.meta,),
            None,
        )


@contextmanager
def _persistence() -> Iterator[None]:
    """Stands in for the module whose name the records carry, while one is written."""

    def _reconstruct_persistent_obj(meta: object) -> None:
        raise AssertionError("a record was executed")

    package, module = ModuleType("torch_utils"), ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    package.persistence = module  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, module.__name__: module}
    try:
        yield
    finally:
        del sys.modules[package.__name__], sys.modules[module.__name__]


_PUBLISHED_NAMES: dict[type[nn.Module], str] = {
    Block: "UNetBlock",
    nn.Conv2d: "Conv2d",
    ResampleConv: "Conv2d",
    ConvDown: "Conv2d",
    Resample: "Conv2d",
    nn.Linear: "Linear",
    nn.GroupNorm: "GroupNorm",
    PositionalEmbedding: "PositionalEmbedding",
    FourierEmbedding: "FourierEmbedding",
    SongUNet: "SongUNet",
    DhariwalUNet: "DhariwalUNet",
} | {cls: name for name, cls in PRECONDITIONERS.items()}


def record(module: nn.Module, arguments: dict[str, Any] | None = None) -> Any:
    """`module` as the published code would have pickled it."""
    state = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
    }
    state |= {
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_is_full_backward_hook": None,
        "_modules": OrderedDict(
            (name, None if child is None else record(child))
            for name, child in module._modules.items()
            if not isinstance(child, nn.Identity)
        ),
        "_init_args": (),
        "_init_kwargs": arguments or {},
    }
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain.__dict__["_modules"] = state["_modules"]
        return plain
    return Persistent(_PUBLISHED_NAMES[type(module)], state)


def arguments(denoiser: Preconditioner) -> dict[str, Any]:
    """The construction arguments as a training script would have passed them."""
    config = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(denoiser.model.config).items()
        if name not in ("in_channels", "out_channels")
    }
    model = {"img_channels": 3, "model_type": type(denoiser.model).__name__}
    return config | model | denoiser.arguments()


def published(denoiser: Preconditioner, **changes: Any) -> bytes:
    """`denoiser` as a checkpoint; `changes` to its construction arguments make it a bad one."""
    return dump({"ema": record(denoiser, arguments(denoiser) | changes)})


def dump(content: Any, protocol: int = 4) -> bytes:
    """`content` as a pickle, `Persistent` objects in it as records."""
    file = io.BytesIO()
    with _persistence():
        pickle.dump(content, file, protocol=protocol)
    return file.getvalue()


def load(data: bytes, folder: Path, **options: Any) -> Preconditioner:
    path = folder / "network.pkl"
    path.write_bytes(data)
    return load_edm(path, **options)


def same(a: Preconditioner, b: Preconditioner) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return (
        type(a) is type(b)
        and a.arguments() == b.arguments()
        and a.model.config == b.model.config
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def short(text: str) -> bytes:
    """The instruction that pushes a short string."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def name(module: str, attribute: str) -> bytes:
    """The instructions that push a global."""
    return short(module) + short(attribute) + b"\x93"
