"""How a whole run is executed, where that is not call by call: recorded once and replayed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

Program: TypeAlias = "Callable[..., tuple[Tensor, ...]]"
"""Tensors in, tensors out; the same operations whatever their values."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A run that was recorded.

    Attributes:
        replay: the run as a program, which returns storage of its own each time.
        nfe: denoiser evaluations of a replay.
        denoiser: kept, so that no other object is taken for it.
        program: what was recorded, kept with the tensors that it reads.
    """

    replay: Program
    nfe: int
    denoiser: object
    program: Program


class Execution(ABC):
    """Records the runs it is passed to, and replays each when it comes again with other values.

    An object of this kind owns its recordings, with their memory, for as long as it lives; it serves one
    thread at a time. A run is the same if its solver, grid, direction, levels, denoiser (with the
    addresses of its parameters and its training flag) and all of `extra_args` that is not a tensor
    are, all tensors have their shapes, dtypes and devices, and `torch.autocast` is set alike. What else
    the denoiser reads, such as numbers among its attributes, stays as it was when the run was recorded.
    """

    def __init__(self) -> None:
        self._recordings: dict[Hashable, Recording] = {}

    def __len__(self) -> int:
        """How many runs were recorded."""
        return len(self._recordings)

    @abstractmethod
    def record(self, program: Program, inputs: Sequence[Tensor]) -> Program:
        """`program` as something that is faster to call with tensors like `inputs`.

        Raises:
            RuntimeError: if that is impossible, with what to do.
        """

    @final
    def find(
        self, key: Hashable, denoiser: object, program: Program, inputs: Sequence[Tensor], run: Any
    ) -> Recording:
        """The recording of `program`, made now if there is none; ``run.nfe`` counts what it does."""
        form = tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        kind = inputs[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        mode = autocast, torch.is_inference_mode_enabled()
        whole = key, id(denoiser), _weights(denoiser), form, mode
        if whole not in self._recordings:
            # What a cache of autocast holds would be gone when the recording is replayed.
            with torch.autocast(kind, autocast or None, bool(autocast), cache_enabled=False):
                replay = self.record(program, inputs)
            self._recordings[whole] = Recording(replay, run.nfe, denoiser, program)
        return self._recordings[whole]


@final
class CUDAGraph(Execution):
    """The whole run, denoiser included, as one CUDA graph: launched at once, with no work on the host.

    Pays where the denoiser is so fast that launching its kernels takes longer than running them. Memory
    is that of one run more, kept between runs. The denoiser must not wait for the device, as ``.item()``
    or a branch on the values of a tensor do. A first run is made `warmups` times before it is recorded.

    Args:
        warmups: runs before the recording, 1 or more, which let libraries choose their kernels.

    Raises:
        ValueError: at construction, if `warmups` is less than 1; in a run, if the state, or a tensor of
            `extra_args`, is not on the GPU.
        RuntimeError: in a run, if the denoiser cannot be captured.
    """

    def __init__(self, warmups: int = 2) -> None:
        super().__init__()
        if warmups < 1:
            raise ValueError(f"a CUDA graph needs warmups >= 1, got {warmups}")
        self.warmups = warmups

    def record(self, program: Program, inputs: Sequence[Tensor]) -> Program:
        device = inputs[0].device
        _check_on_gpu(device)
        for x in inputs:
            if x.device != device:
                raise ValueError(
                    f"a CUDA graph reads its tensors on {device}, and extra_args has one on {x.device}, "
                    "which would keep the value it has now: move it there, or pass a number"
                )
        places = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            ahead = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            ahead.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(ahead):
                for _ in range(self.warmups):
                    program(*places)
            torch.cuda.current_stream().wait_stream(ahead)
            try:
                # The outer one is there to return from where a capture that fails leaves the inner.
                with (
                    torch.cuda.stream(ahead),
                    torch.cuda.graph(graph, stream=ahead, capture_error_mode="thread_local"),
                ):
                    results = program(*places)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "the run cannot be captured in a CUDA graph: the denoiser waits for the device or "
                    "allocates outside of PyTorch, as .item(), a branch on values or a copy to the CPU "
                    "do; run it without execution=CUDAGraph()"
                ) from error

        def replay(*values: Tensor) -> tuple[Tensor, ...]:
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
            graph.replay()
            return tuple(result.clone() for result in results)

        return replay


@final
class Compiled(Execution):
    """The whole run, denoiser included, traced and compiled by `torch.compile`.

    The steps are unrolled, so that what surrounds a small denoiser is fused with it: every linear
    combination is one kernel that reads each input once and writes once. Compiling takes a time in
    proportion to the steps and the size of the denoiser: minutes, for many of both. For a large denoiser
    pass ``torch.compile(denoiser)`` to a plain run instead. Results agree with those of a plain run up
    to rounding; to undo a run to the last bits, use the same execution both ways.

    Args:
        backend: of `torch.compile`.

    Raises:
        RuntimeError: in a run, if the denoiser cannot be traced.
    """

    def __init__(self, backend: str = "inductor") -> None:
        super().__init__()
        self.backend = backend

    def record(self, program: Program, inputs: Sequence[Tensor]) -> Program:
        from torch.fx.experimental.proxy_tensor import make_fx

        try:
            traced = make_fx(program, tracing_mode="real")(*inputs)
        except Exception as error:
            raise RuntimeError(
                f"the run cannot be traced for compilation ({error}): the denoiser must not be compiled "
                "already, nor read or branch on the values of tensors, as .item() does; run it without "
                "execution=Compiled()"
            ) from error
        compiled: Program = torch.compile(
            traced, backend=self.backend, fullgraph=True, dynamic=False
        )
        return compiled


def _check_on_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"CUDAGraph() needs the state on a GPU, got {device}: move x and the denoiser there, or "
            "use Compiled() or no execution"
        )


def _weights(denoiser: object) -> Hashable:
    """What a recording knows of the weights: where they lie, not what they are."""
    if not isinstance(denoiser, torch.nn.Module):
        return None
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    forms = ((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors)
    return denoiser.training, tuple(forms)
