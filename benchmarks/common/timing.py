"""Times of runs that take turns, and what a run does beside its denoiser."""

from __future__ import annotations

import platform
import random
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from odesolvers.models import import_k_diffusion

from .problems import Denoiser

Name = TypeVar("Name", bound=Hashable)


def machine() -> str:
    """The processor, the GPU and the versions of this run."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{model}, one thread; {device}; {versions}"


def seconds(
    runs: Mapping[Name, Callable[[], Any]],
    repeats: int,
    *,
    twice: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, float]:
    """Median times of runs that take turns in random order, because each leaves the caches its way.

    With `twice`, each turn consists of two runs, and the second is timed. ``time.thread_time`` as the
    `clock` leaves out what other processes take of the core.
    """
    for run in runs.values():
        run()
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in random.sample(list(runs), len(runs)):
            if twice:
                runs[name]()
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def bare(denoiser: Denoiser, x: Tensor, steps: int) -> None:
    """A loop of denoiser calls that does nothing else."""
    sigma = x.new_ones(len(x))
    for _ in range(steps):
        denoiser(x, sigma)


def k_diffusion(name: str, sigmas: Tensor) -> Callable[[Denoiser, Tensor], Any]:
    """A run of a k-diffusion sampler."""
    sampler, sigmas = getattr(import_k_diffusion().sampling, name), sigmas.float()
    return lambda denoiser, x: sampler(denoiser, x, sigmas.to(x.device), disable=True)


def waited(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """`run`, until the device has done it."""

    def wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


def peak(run: Callable[[], Any], device: torch.device) -> int:
    """The peak of GPU memory that a run adds; 0 on a CPU."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Watch(TorchDispatchMode):
    """Counts the tensor operations outside the denoiser, and the most bytes of states alive at once.

    Args:
        denoiser: the denoiser; pass `denoise` to the solver.
        start: the caller's tensor, which is not counted.
        elements: the size from which a tensor counts as a state.
    """

    def __init__(self, denoiser: Denoiser, start: Tensor, elements: int) -> None:
        super().__init__()
        self._theirs = start.untyped_storage().data_ptr()
        self.operations: Counter[str] = Counter()
        self.peak = 0
        self._denoiser, self._elements, self._inside = denoiser, elements, False
        self._made: list[weakref.ref[Tensor]] = []

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self._inside = True
        try:
            return self._denoiser(x, sigma)
        finally:
            self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self.operations[".".join(str(func).split(".")[:2])] += 1
            if isinstance(result, Tensor) and result.numel() >= self._elements:
                self._made.append(weakref.ref(result))
            alive = [x.untyped_storage() for ref in self._made if (x := ref()) is not None]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
            sizes.pop(self._theirs, None)
            self.peak = max(self.peak, sum(sizes.values()))
        return result
