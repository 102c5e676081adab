"""Solvers as sampler functions with the signature of `k_diffusion.sampling`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import check_is
from ..run import Callback, Denoiser
from ..solver import Solver
from ..state import Solution, State
from ..values import row


class Sampler(Protocol):
    """The signature of the functions of `k_diffusion.sampling`, see `as_sampler`."""

    def __call__(
        self,
        model: Denoiser,
        x: Tensor | State,
        sigmas: Tensor | Sequence[float],
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        disable: bool | None = None,
    ) -> Tensor: ...


def as_sampler(solver: Solver, on_end: Callable[[Solution], object] | None = None) -> Sampler:
    """A function to use in the place of ``k_diffusion.sampling.sample_euler`` and its like.

    The function is ``sampler(model, x, sigmas, extra_args=None, callback=None, disable=None)`` and
    returns the state at ``sigmas[-1]``. Levels that fall sample; levels that rise invert, so that
    ``sigmas.flip(0)`` goes back.

    A function that returns a tensor drops the partner that an exact inversion starts from. A lone
    tensor is inverted from a first step that is approximate, see `Solver.invert`. The pair is passed on
    openly: `on_end` is given the solution of every run, and `x` may be its state::

        solutions = []
        sampler = as_sampler(solver, on_end=solutions.append)
        image = sampler(model, noise, sigmas)
        back = sampler(model, solutions[-1].state, sigmas.flip(0))  # exact

    The arguments of the function:

    - ``model``: k-diffusion's contract and that of `Denoiser`, ``model(x, sigma, **extra_args)``.
    - ``x``: floating point tensor ``(B, ...)`` at level ``sigmas[0]``, not modified; or a `State`.
    - ``sigmas``: levels that fall or rise strictly, of any floating point dtype, on any device.
    - ``extra_args``: keyword arguments for every call of the model.
    - ``callback``: called once a step with k-diffusion's dictionary, where ``i`` counts the intervals
      of `sigmas` in their own order, and ``sigma`` is ``sigmas[i]``. A run from a pair begins with
      ``i = 1``, for the pair stands at both ends of the first interval. Inversions differ from that
      where `Solver.invert` says so: in the ``sigma`` of a step from level 0, and of coupled solvers.
    - ``disable``: k-diffusion's switch of the progress bar: True for none, False for one, None for one
      on a terminal only. The bar needs tqdm.

    Args:
        solver: any solver of this package; an approximator alone samples, and is not inverted.
        on_end: called with the `Solution` of each run that ends without an error.

    Raises:
        TypeError: if `solver` is not a solver. The function raises what `Solver.sample` and
            `Solver.invert` raise.
    """
    check_is(solver, Solver, "as_sampler needs a solver such as BDIA(Euler())")

    def sampler(
        model: Denoiser,
        x: Tensor | State,
        sigmas: Tensor | Sequence[float],
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        with torch.no_grad():  # as the run, which asks for no gradient
            levels = row("sigmas", sigmas, torch.float64)
        rises = levels.numel() > 1 and bool(levels.flatten()[0] < levels.flatten()[-1])
        if rises and callback is not None:
            callback = _counted_up(solver, len(levels) - 1, callback)
        solution = (solver.invert if rises else solver.sample)(
            model,
            x,
            levels.flip(0) if rises else levels,
            extra_args=extra_args,
            callback=callback,
            progress=sys.stderr.isatty() if disable is None else not disable,
        )
        if on_end is not None:
            on_end(solution)
        return solution.x

    return sampler


def _counted_up(solver: Solver, steps: int, callback: Callback) -> Callback:
    """`callback`, with ``i`` as the number of an interval of rising levels."""
    # Step k of a two-step solver is evaluated at level k, which the way up leaves by its interval
    # steps - k; otherwise step k itself is crossed, which is the interval before.
    first = steps - (1 if solver.coupled or solver.states == 1 else 0)

    def counted(shown: dict[str, Any]) -> object:
        return callback({**shown, "i": first - shown["i"]})

    return counted
