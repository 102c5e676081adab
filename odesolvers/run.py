"""The one loop: a pair of states, shear by shear, down the grid or up it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .arithmetic import Arithmetic
from .checks import OVERFLOW, check_output, check_same, is_finite, place, version
from .formula import Shear
from .grids import Grid, level_dtype
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
        dtype: of the states that the denoiser sees.
        reuse: whether a shear may call the denoiser at the state and level of the one before, as those
            of coupled solvers do; that output is then kept and used again.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        arithmetic: Arithmetic,
        grid: Grid,
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
        self._twice = arithmetic.check_determinism
        self._last: tuple[Tensor, float, Tensor] | None = None
        self._reported = -1

    def walk(self, steps: Steps, pair: Pair, *, undo: bool = False) -> Pair:
        """Applies `steps` to the pair (a, b).

        A shear maps (a, b) to (b, c) with c = gain · a + rest(b). To undo it the pair comes in reverse,
        and goes from (c, b) to (b, a): the denoiser is called at b either way.
        """
        apply: Callable[..., Tensor]
        apply = self.arithmetic.inverse if undo else self.arithmetic.forward
        far, near = pair
        assert near is not None
        for k, shears in steps:
            for shear in shears:
                if shear.swaps:
                    far, near = near, far
                else:
                    new = apply(shear.gain, far, self.rest(shear, near, k), self.memory)
                    far, near = near, new.to(near.dtype)  # half precision is summed in float32
        return far, near

    def rest(self, shear: Shear, stored: Tensor, k: int) -> Tensor:
        """``rest(b)`` for the stored state b, in new storage; `k` is the number of the step."""
        if self.memory is not None:
            self.memory.sigma = self.grid.levels[k]
        values, last, self._last = [self.arithmetic.load(stored, self.dtype)], self._last, None
        if shear.calls:
            sigma = shear.calls[0].sigma
            if last is not None and last[0] is stored and last[1] == sigma:
                values.append(last[2])
            del last  # an output less while the next is made
            self._call(shear, values, k)
            if self._twice:
                self._twice = False
                before = [value.clone() for value in values]  # outputs may be one buffer
                check_same(before, self._call(shear, values[:1], k), place(sigma, k))
            if self.reuse:
                self._last = stored, sigma, values[1]
            if self.callback is not None and k != self._reported:
                self._reported = k
                self._report(self.callback, values[0], values[1], sigma, k)
        return shear.rest.of(values)

    def _call(self, shear: Shear, values: list[Tensor], k: int) -> list[Tensor]:
        """Appends to the state and the known outputs those of the other calls of a shear.

        Raises:
            TypeError, ValueError, FloatingPointError: naming the noise level, and what to do.
        """
        x = values[0]
        for point, sigma in shear.calls[len(values) - 1 :]:
            y = x if point.terms == {0: 1.0} else point.of(values).to(x.dtype)
            before = version(y)
            level = x.new_full(x.shape[:1], sigma, dtype=level_dtype(x.dtype))
            output = self.denoiser(y, level, **self.extra_args)
            self.nfe += 1
            if version(y) != before:
                raise ValueError(
                    f"the denoiser wrote to its input {place(sigma, k)}: work on a copy, x.clone()"
                )
            check_output(output, y, values[1:], sigma, k)
            if self.check and not is_finite(output):
                what = (
                    "the denoiser's output" if is_finite(y) else "the state handed to the denoiser"
                )
                raise FloatingPointError(f"{what} is not finite {place(sigma, k)}; {OVERFLOW}")
            values.append(output)
        return values

    def _report(
        self, callback: Callback, x: Tensor, denoised: Tensor, sigma: float, k: int
    ) -> None:
        """Calls the callback with k-diffusion's dictionary, and refuses writes to what the run uses."""
        shown = {"x": x, "denoised": denoised}
        before = [version(tensor) for tensor in shown.values()]
        level = x.new_full((), sigma, dtype=level_dtype(x.dtype))
        callback({**shown, "i": k, "sigma": level, "sigma_hat": level.clone()})
        for (name, tensor), number in zip(shown.items(), before, strict=True):
            if version(tensor) != number:
                raise ValueError(
                    f"the callback wrote to {name} at step {k}, which would change the run: work on a "
                    f"copy, info[{name!r}].clone()"
                )
