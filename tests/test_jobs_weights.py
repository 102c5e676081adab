"""The identity of models: other weights are found wherever a denoiser holds them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from odesolvers.jobs import Job
from odesolvers.jobs.weights import fingerprint
from odesolvers.opening import BUNDLED, open_model

from .job_models import opened

GLOBAL = nn.Linear(2, 2)


class Held:
    """A denoiser that holds something."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, x: Tensor, sigma: Tensor) -> Any:
        return self.inner(x)


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Private:
    __slots__ = ("__inner",)

    def __init__(self, inner: Any) -> None:
        self.__inner = inner

    def __call__(self, x: Any, sigma: Any) -> Any:
        return self.__inner(x)


class Hidden(nn.Module):
    """A module that holds another one where torch does not find it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.own, self._inner = nn.Linear(1, 1, bias=False), [inner]
        self.own.weight.data.fill_(1)


class Unregistered(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.table = inner.weight.detach()


class Global:
    def __call__(self, x: Tensor, sigma: Tensor) -> Any:
        return GLOBAL(x)


def closed(inner: Any) -> Any:
    def denoiser(x: Tensor, sigma: Tensor) -> Any:
        return inner(x)

    return denoiser


def enclosing(inner: Any) -> nn.Module:
    class Closing(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor) -> Any:
            return self._network(x)

        def _network(self, x: Tensor) -> Any:
            return inner(x)

    return Closing()


def in_class(member: Callable[[nn.Linear], Any]) -> Callable[[nn.Linear], Any]:
    """A class with a member that is made of a network, and the same method as its base."""

    class Base:
        def __call__(self, x: Tensor, sigma: Tensor) -> Any:
            return self.net(x)  # type: ignore[attr-defined]

    def holder(inner: nn.Linear) -> Any:
        return type("Denoiser", (Base,), {"net": member(inner)})()

    return holder


def overriding(inner: nn.Linear) -> Any:
    class Base:
        def __call__(self, x: Tensor, sigma: Tensor) -> Any:
            return x

    class Denoiser(Base):
        def __call__(self, x: Tensor, sigma: Tensor) -> Any:
            return inner(x)

    return Denoiser()


def hooked(inner: nn.Linear) -> nn.Module:
    network = nn.Identity()
    network.register_forward_hook(lambda module, args, found: inner(found))
    return network


def in_8_bits(inner: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a later torch, which leaves it to another library
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(inner), {nn.Linear}
        )
    return quantized


HOLDERS: dict[str, Callable[[nn.Linear], Any]] = {
    "a module": lambda inner: inner,
    "a module in a module": lambda inner: nn.Sequential(nn.SiLU(), inner),
    "an attribute": Held,
    "attributes": lambda inner: Held(Held(SimpleNamespace(net=inner))),
    "a slot": lambda inner: Held(Slotted(inner)),
    "a private slot": Private,
    "a list": lambda inner: Held([1, (inner,)]),
    "a set": lambda inner: Held({inner}),
    "a dictionary": lambda inner: Held({"nets": {3: inner}}),
    "a module's list": Hidden,
    "a tensor that is no buffer": Unregistered,
    "a tensor": lambda inner: Held(inner.weight.detach()),
    "an array": lambda inner: Held(inner.weight.detach().numpy()),
    "a partial function": lambda inner: partial(torch.add, alpha=inner.weight),
    "a bound method": lambda inner: Held(inner).__call__,
    "a closure": closed,
    "a method of a module": enclosing,
    "a function of functions": lambda inner: closed(closed(inner)),
    "a class": in_class(lambda inner: inner),
    "a property": in_class(lambda inner: property(lambda self: inner)),
    "a cached property": in_class(lambda inner: cached_property(lambda self: inner)),
    "a static method": in_class(lambda inner: staticmethod(closed(inner))),
    "a class method": in_class(lambda inner: classmethod(lambda cls, x: inner(x))),
    "a method of its base's name": overriding,
    "a cached function": lambda inner: lru_cache(closed(inner)),
    "a hook": hooked,
    "8 bits": in_8_bits,
    "bytes": lambda inner: Held(inner.weight.detach().numpy().tobytes()),
    "an array of objects": lambda inner: np.array({"w": inner.weight.detach()}, dtype=object),
    "a default": lambda inner: Held(lambda x, net=inner: net(x)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_another_weight_is_another_model_wherever_it_is_held(holder: str) -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    before = fingerprint(HOLDERS[holder](network))
    assert fingerprint(HOLDERS[holder](copy.deepcopy(network))) == before
    network.weight.data[1, 2] += 0.5
    assert fingerprint(HOLDERS[holder](network)) != before


def test_weights_in_globals_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(Global())
    monkeypatch.setitem(globals(), "GLOBAL", nn.Linear(2, 2))
    assert fingerprint(Global()) != before


def test_networks_that_change_places_are_another_model() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    assert fingerprint(Held((a, b))) != fingerprint(Held((b, a)))


def test_calls_and_devices_change_nothing_and_dtypes_do() -> None:
    model = opened()
    before = fingerprint(model.denoiser)
    model.denoiser(torch.zeros(2, 3, 5, 5), torch.ones(2), class_labels=torch.zeros(2))
    assert fingerprint(model.denoiser) == before
    weight = torch.ones(2, 3)
    assert fingerprint(Held(weight)) != fingerprint(Held(weight.T.contiguous()))
    network = nn.Linear(3, 2)
    assert fingerprint(network.to(torch.float16)) != fingerprint(network.to(torch.bfloat16))


@pytest.mark.parametrize("name", BUNDLED)
def test_models_of_the_package_have_one_identity(name: str) -> None:
    cpu = torch.device("cpu")
    found = {fingerprint(open_model(name, cpu, None, None).denoiser) for _ in range(2)}
    assert len(found) == 1


def test_weights_that_cannot_be_found_are_refused(tmp_path: Path) -> None:
    pixels = Image.new("L", (2, 2)).im  # an object of a library's C
    with pytest.raises(ValueError, match=r"denoiser\.inner is a .*ImagingCore.*`fingerprint`"):
        fingerprint(Held(pixels))
    model = opened()
    model.denoiser.session = pixels
    job = Job("sample", "mine", "seeds:3", "Euler()", (1.0, 0.0))
    with pytest.raises(ValueError, match="weights cannot be found"):
        job.prepare(tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
    named = [Held(pixels), Held(pixels)]
    for k, denoiser in enumerate(named):
        denoiser.fingerprint = f"weights {k}"  # type: ignore[attr-defined]
    assert fingerprint(named[0]) != fingerprint(named[1])


def test_what_holds_no_weights_is_no_fault() -> None:
    """Functions of torch and of Python, generators, locks, files and types that a denoiser names."""
    import logging
    import threading

    def denoiser(x: Tensor, sigma: Tensor) -> Any:
        with threading.Lock():
            logging.getLogger().debug("%s", Path)
        return nn.functional.silu(x) + torch.sin(sigma)

    things = [denoiser, torch.Generator(), threading.Lock(), torch.float16, nn.functional.gelu]
    fingerprint(Held([*things, open, torch.device("cpu"), logging.getLogger(), range(3), print]))
