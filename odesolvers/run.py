"""The one loop: a pair of states, shear by shear, down the grid or up it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .arithmetic import Arithmetic
from .checks import OVERFLOW, check_same, is_finite, place, refuse_output
from .formula import Shear
from .grids import Grid
from .state import Convergence

Pair: TypeAlias = "tuple[Tensor | None, Tensor | None]"
"""Two stored states, the a and b of ``(a, b) -> (b, gain · a + rest(b))``."""

Steps: TypeAlias = "Iterable[tuple[int, tuple[Shear, ...]]]"
"""Steps in the order of a run, each with its number and its shears."""

Callback: TypeAlias = Callable[[dict[str, Any]], object]


class Denoiser(Protocol):
    """``denoiser(x, sigma, **extra_args) -> E[x0 | x]``, the contract of k-diffusion's wrappers.

    `x` has shape ``(B, ...)``; `sigma` has shape ``(B,)``, is float64 where `x` is and float32
    otherwise, and lives on the device of `x`. The result has the shape, dtype and device of `x`, in
    storage that no later call of the same step writes to; `x` is left as it is.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /, **extra_args: Any) -> Tensor: ...


class Run:
    """The denoiser calls of one run, checked and counted. States are never written to.

    Args:
        denoiser, extra_args, callback: see `Solver.sample`.
        arithmetic: applies the shears.
        grid: the noise levels, for messages.
        like: a stored state, for its device.
        dtype: that of the states that the denoiser sees.
        reuse: whether a shear may call the denoiser at the state and level of the one before, as those
            of coupled solvers do; that output is then kept and used again.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        arithmetic: Arithmetic,
        grid: Grid,
        like: Tensor,
        dtype: torch.dtype,
        extra_args: Mapping[str, Any],
        callback: Callback | None,
        reuse: bool,
    ) -> None:
        self.denoiser, self.arithmetic, self.grid, self.dtype = denoiser, arithmetic, grid, dtype
        self.extra_args, self.callback, self.reuse = extra_args, callback, reuse
        self.nfe = 0
        self.convergence: list[Convergence] = []
        self.memory: Any = None
        self.check = arithmetic.exact
        """Whether every output is checked for values that are not finite, at once."""
        # Half precision does not resolve noise levels.
        self._levels = like.new_empty(
            0, dtype=torch.float64 if dtype == torch.float64 else torch.float32
        )
        self._versions = not torch.is_inference_mode_enabled()  # inference tensors have none
        self._twice = arithmetic.check_determinism
        self._last: tuple[Tensor, float, Tensor] | None = None
        self._reported = -1

    def walk(self, steps: Steps, pair: Pair, *, undo: bool = False) -> Pair:
        """Applies `steps` to the pair (a, b).

        A shear maps (a, b) to (b, c) with c = gain · a + rest(b). To undo it the pair comes in reverse,
        and goes from (c, b) to (b, a): the denoiser is called at b either way.
        """
        apply: Any = self.arithmetic.inverse if undo else self.arithmetic.forward
        far, near = pair
        assert near is not None
        for k, shears in steps:
            for shear in shears:
                if shear.gain == 1.0 and not shear.rest.terms:  # only exchanges the two
                    far, near = near, far
                else:
                    new = apply(shear.gain, far, self.rest(shear, near, k), self.memory)
                    if new.dtype is not near.dtype:  # half precision is summed in float32
                        new = new.to(near.dtype)
                    far, near = near, new
        return far, near

    def rest(self, shear: Shear, stored: Tensor, k: int) -> Tensor:
        """``rest(b)`` for the stored state b, in new storage; `k` is the number of the step.

        Raises:
            TypeError, ValueError, FloatingPointError: for an output of the denoiser that cannot be
                used, naming the noise level, and what to do.
        """
        x = stored
        if self.memory is not None:
            self.memory.sigma, x = self.grid.levels[k], self.arithmetic.load(stored, self.dtype)
        values, last, self._last = [x], self._last, None
        pointers: list[int] = []
        if (
            last is not None
            and shear.calls
            and last[0] is stored
            and last[1] == shear.calls[0].sigma
        ):
            values.append(last[2])
            pointers.append(last[2].data_ptr())
        del last  # an output less while the next is made
        for point, sigma in shear.calls[len(values) - 1 :]:
            y = x if point.terms == {0: 1.0} else point.of(values).to(x.dtype)
            version = y._version if self._versions else 0
            level = self._levels.new_full(x.shape[:1], sigma)
            output = self.denoiser(y, level, **self.extra_args)
            self.nfe += 1
            if self._versions and y._version != version:
                raise ValueError(
                    f"the denoiser wrote to its input {place(sigma, k)}: work on a copy, x.clone()"
                )
            if (
                not isinstance(output, Tensor)
                or output.shape != x.shape
                or output.dtype is not x.dtype
                or output.device != x.device
                or (pointer := output.data_ptr()) in pointers
            ):
                refuse_output(output, y, sigma, k)
            if self.check and not is_finite(output):
                what = (
                    "the denoiser's output" if is_finite(y) else "the state handed to the denoiser"
                )
                raise FloatingPointError(f"{what} is not finite {place(sigma, k)}; {OVERFLOW}")
            if self._twice:  # of the first shear that calls at all
                before, self.nfe = output.clone(), self.nfe + 1
                check_same(before, self.denoiser(y, level, **self.extra_args), sigma, k)
            values.append(output)
            pointers.append(pointer)
        if len(values) > 1:
            self._twice = False
            if self.reuse:
                self._last = stored, shear.calls[0].sigma, values[1]
            if self.callback is not None and k != self._reported:
                self._reported = k
                self._report(self.callback, x, values[1], shear.calls[0].sigma, k)
        return shear.rest.of(values)

    def _report(
        self, callback: Callback, x: Tensor, denoised: Tensor, sigma: float, k: int
    ) -> None:
        """Calls the callback with k-diffusion's dictionary, and refuses writes to what the run uses."""
        shown = {"x": x, "denoised": denoised}
        before = [0 if t.is_inference() else t._version for t in shown.values()]
        level = self._levels.new_full((), sigma)
        callback({**shown, "i": k, "sigma": level, "sigma_hat": level.clone()})
        for (name, tensor), version in zip(shown.items(), before, strict=True):
            if not tensor.is_inference() and tensor._version != version:
                raise ValueError(
                    f"the callback wrote to {name} at step {k}, which would change the run: work on a "
                    f"copy, info[{name!r}].clone()"
                )
