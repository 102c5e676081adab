"""The identity of a model: a hash of all weights that it computes with, and what else a job takes."""

from __future__ import annotations

import builtins
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import odesolvers as ode

from ..opening import Model
from ..settings import attributes

_BUILTIN: Final = {x for m in (builtins, types) for x in vars(m).values() if isinstance(x, type)}
_COMMON: Final = sys.stdlib_module_names - {"builtins"} | {"torch", "numpy"}
"""Packages whose objects hold no weights but in tensors, arrays, networks and containers; any type that
is written in C may say that it is one of the builtins."""
_LIBRARIES: Final = _COMMON | {"builtins", "odesolvers", "diffusers", "transformers", "k_diffusion"}
"""Packages whose functions hold no weights."""
_PLAIN: Final = (str, bytes, bytearray, memoryview, range)
_OWN: Final = frozenset(vars(nn.Module()))
"""What every module has: its weights, which are read by name, its parts, and its hooks."""
_HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks")
_WRAPPED: Final = (staticmethod, classmethod, type(lru_cache(len)))


def identity(model: Model) -> dict[str, Any]:
    """What a job keeps of a model: a hash of its weights, and the numbers that it takes from it."""
    weights = fingerprint(model.denoiser, model.encode, model.condition, model.noise)
    numbers = {"shape": tuple(model.shape), "default_guidance": float(model.guidance)}
    return {"weights": weights, **numbers}


def versions() -> dict[str, str]:
    """The versions of libraries that a job is made with."""
    return {"odesolvers": ode.__version__, "torch": torch.__version__}


def fingerprint(denoiser: Any, *others: Any) -> str:
    """The SHA-256 of the weights of a denoiser, and of `others`, such as an encoder.

    It is the same on every device, and another one for each dtype.

    Weights are the parameters and buffers of networks, and all other tensors and arrays that the
    denoiser holds: in attributes, in containers, in closures, and in globals that its functions name.
    Of a pipeline they are those of its parts, with their configurations. Numbers and texts are
    settings, and not counted: a denoiser may count its calls.

    What holds weights that are out of reach has an attribute `fingerprint`, a text to hash for them.

    Raises:
        ValueError: for an object of a library that may hold weights where they cannot be read.
    """
    search = _Search()
    search.add("denoiser", denoiser)
    for part in others:
        search.add("model", part)
    return search.digest.hexdigest()


class _Search:
    """Weights are found in one order, and each is counted where it is found first."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        # The objects too: another may get the place of one that is gone.
        self.seen: dict[int, Any] = {}

    def add(self, path: str, thing: Any) -> None:
        """Counts a thing, and what it holds."""
        if id(thing) in self.seen:
            return
        self.seen[id(thing)] = thing
        pipeline = getattr(thing, "pipeline", thing)
        if isinstance(thing, type | ModuleType):
            return
        if isinstance(thing, Tensor):
            self._tensor(path, thing)
        elif isinstance(thing, np.ndarray | np.generic) and thing.dtype.kind in "biufc":
            self._tensor(path, torch.from_numpy(np.array(thing)))
        elif isinstance(thing, np.ndarray) and thing.dtype.hasobject:
            self.add(path, thing.tolist())
        elif isinstance(thing, bytes | bytearray):
            self.digest.update(f"{path} {len(thing)}\n".encode() + thing)
        elif isinstance(text := getattr(thing, "fingerprint", None), str):
            self.digest.update(f"{path} {text}\n".encode())
        elif isinstance(parts := getattr(pipeline, "components", None), Mapping):
            for name, part in sorted(parts.items()):
                settings = getattr(part, "config", None)
                if isinstance(settings, Mapping):  # of diffusers: of what is predicted, how scaled
                    kept = {k: v for k, v in settings.items() if not k.startswith("_")}
                    text = json.dumps(kept, sort_keys=True, default=str)
                    self.digest.update(f"{path} {name} {text}\n".encode())
                if isinstance(part, nn.Module):
                    self._network(f"{path}.{name}", part)
        elif isinstance(thing, nn.Module):
            self._network(path, thing)
            for name, module in thing.named_modules():
                held = {k: value for k, value in vars(module).items() if k not in _OWN}
                held |= {k: list(vars(module)[k].values()) for k in _HOOKS}  # not by their numbers
                for key, value in (held | _of_class(type(module))).items():
                    self.add(f"{path}.{name}.{key}", value)
        else:
            for name, part in _parts(path, thing):
                self.add(f"{path}.{name}", part)

    def _network(self, path: str, network: nn.Module) -> None:
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            self.seen[id(tensor)] = tensor
            self._tensor(f"{path}.{name}", tensor)
        for name, packed in network.state_dict().items():
            if not isinstance(packed, Tensor):  # weights in 8 bits
                self.add(f"{path}.{name}", packed)
        self.seen |= {id(module): module for module in network.modules()}

    def _tensor(self, path: str, tensor: Tensor) -> None:
        shape = f"{path} {tensor.dtype} {tuple(tensor.shape)}\n"
        tensor = tensor.dequantize() if tensor.is_quantized else tensor
        try:
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise _unreadable(path, tensor) from error
        self.digest.update(shape.encode())
        self.digest.update(data)


def _parts(path: str, thing: Any) -> Iterable[tuple[str, Any]]:
    """What a container or an object holds, or a function uses."""
    if isinstance(thing, Mapping):
        return ((f"[{k}]" if isinstance(k, str | int) else "[]", x) for k, x in thing.items())
    if isinstance(thing, Sequence | Set) and not isinstance(thing, _PLAIN):
        return ((f"[{k}]", part) for k, part in enumerate(thing))
    if isinstance(thing, SimpleNamespace):
        return vars(thing).items()
    if isinstance(thing, partial):
        return [("func", thing.func), ("args", thing.args), ("keywords", thing.keywords)]
    if inspect.ismethod(thing):
        return [("self", thing.__self__), ("func", thing.__func__)]
    if inspect.isfunction(thing):
        return _used(thing)
    if isinstance(thing, property):
        return [("fget", thing.fget)]
    if isinstance(thing, cached_property):
        return [("func", thing.func)]
    if isinstance(thing, _WRAPPED):
        return [("wrapped", thing.__wrapped__)]
    if isinstance(thing, torch.jit.ScriptFunction):
        raise _unreadable(path, thing)
    if type(thing) in _BUILTIN or _is_of(_COMMON, type(thing).__module__):
        return []  # numbers, texts, functions written in C, generators, locks
    slotted = any("__slots__" in vars(base) for base in type(thing).__mro__)
    if not slotted and not hasattr(thing, "__dict__"):  # of a class that is not written in Python
        raise _unreadable(path, thing)
    return (attributes(thing) | _of_class(type(thing))).items()


def _of_class(cls: type) -> dict[str, Any]:
    """The attributes of a class and its bases, and their functions, which may close over weights."""
    own = (base for base in cls.__mro__ if not _is_of(_LIBRARIES, base.__module__))
    found = ((f"{base.__name__}.{k}", k, x) for base in own for k, x in vars(base).items())
    return {name: x for name, k, x in found if inspect.isfunction(x) or not k.startswith("__")}


def _used(function: Any) -> Iterator[tuple[str, Any]]:
    """The globals that a function names, its defaults, and what it closes over."""
    if not _is_of(_LIBRARIES, function.__globals__.get("__name__", "")):
        for name in _names(function.__code__):
            yield name, function.__globals__.get(name)
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # without a value yet
            yield name, cell.cell_contents


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_of(packages: Set[str], module: str) -> bool:
    return module.partition(".")[0] in packages


def _unreadable(path: str, thing: Any) -> ValueError:
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    return ValueError(
        f"{path} is a {kind}, in which weights cannot be found: another model would pass for this one. "
        "Give it, or what holds it, an attribute `fingerprint`, a text that changes with its weights"
    )
