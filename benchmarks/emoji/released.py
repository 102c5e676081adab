"""Contestants as they are released, mistakes included, and those that need a grid of their own.

Each has the `invert` and the `sample` of a solver, for an image at the last level of a grid: the result
of the one is what the other starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    MALI,
    Denoiser,
    Dopri5,
    Exponential,
    Grid,
    IntegrationApproximator,
    McCallumFoster,
    Solution,
    State,
    adaptive_sigmas,
    midpoint_sigmas,
)
from odesolvers.extend import Combination, Denoise, Solver, slope

Arguments: TypeAlias = "Mapping[str, Any] | None"


@dataclass(frozen=True)
class ReleasedBDIA:
    """BDIA as the baseline of BELM and of Rex, where an inversion begins without the network.

    In ``samplers/BDIA.py`` of https://github.com/zituitui/BELM, function `latent_to_intermediate`, the
    first step up lacks the factor `noise_pred` (issue 13, open); ``samplers/BELM.py`` has the same line,
    and https://github.com/zblasingame/Rex-solver has copies of both files. So the step adds
    ``σ_1 - σ_0`` to every element: the noise is taken to be 1 everywhere. The evaluation is made, and
    its output unused. All other steps are those of `solver`, which for their BELM is ``BELM()``. Their
    scripts for edits have the weight 0.96 by default, the function itself 0.5.
    """

    solver: BDIA = BDIA(DDIM(), 0.96)  # noqa: RUF009

    def invert(
        self, denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, extra_args: Arguments = None
    ) -> Solution:
        """Up the grid from a lone image."""
        levels = Grid.of(sigmas).levels
        neighbour = x + (levels[-2] - levels[-1])
        pair = State(x, neighbour, len(levels) - 1, levels, repr(self.solver))
        code = self.solver.invert(denoiser, pair, extra_args=extra_args)
        return replace(code, nfe=code.nfe + 1)

    def sample(
        self, denoiser: Denoiser, x: Solution, sigmas: Tensor, *, extra_args: Arguments = None
    ) -> Solution:
        """Down the grid from the code."""
        return self.solver.sample(denoiser, x, sigmas, extra_args=extra_args)


@final
@dataclass(frozen=True, repr=False, eq=False)
class LegacyRK4(IntegrationApproximator):
    """RK4 as `exp_rk4` of Rex, for ``Rex(LegacyRK4())``; its order is 1.

    In ``image-experiments/samplers/rex.py`` of https://github.com/zblasingame/Rex-solver the third stage
    evaluates at the point of the second, and the fourth at that of the third, half a step short. Their
    newer code, which is written by tableaus, has the method right; the scripts that made the published
    results use this one. Four evaluations there, of which two are the same; here it is made once.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 3

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        h = target - sigma
        k1 = slope(x, sigma, denoise)
        k2 = slope(x + (h / 2) * k1, sigma + h / 2, denoise)
        k4 = slope(x + (h / 2) * k2, target, denoise)
        return (h / 6) * (k1 + 4 * k2 + k4)


@dataclass(frozen=True)
class OwnGrid:
    """A solver on levels that are not those of the comparison, but chosen from them.

    Attributes:
        solver: the solver.
        levels: ``levels(denoiser, image, sigmas, extra_args)``, the grid for an image.
    """

    solver: Solver
    levels: Callable[[Denoiser, Tensor, Tensor, Arguments], Tensor]

    def invert(
        self, denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, extra_args: Arguments = None
    ) -> Solution:
        """Up its own grid from a lone image; `Solution.state` holds the grid."""
        own = self.levels(denoiser, x, sigmas, extra_args)
        return self.solver.invert(denoiser, x, own, extra_args=extra_args)

    def sample(
        self, denoiser: Denoiser, x: Solution, sigmas: Tensor, *, extra_args: Arguments = None
    ) -> Solution:
        """Down the same grid from the code."""
        del sigmas
        return self.solver.sample(denoiser, x, extra_args=extra_args)


def mali(eta: float = 1.0) -> OwnGrid:
    """MALI on a grid of n steps: n + 1 evaluations each way."""
    return OwnGrid(MALI(eta), lambda denoiser, x, sigmas, extra_args: midpoint_sigmas(sigmas))


def adaptive(solver: McCallumFoster, tolerance: float) -> OwnGrid:
    """``Rex(Dopri5())`` or ``McCallumFoster(Dopri5())`` on steps that the embedded error chooses.

    The levels are chosen on the way up and kept for the way down. (Released Rex chooses them anew for
    each way, which does not lead back.) `Solution.nfe` leaves out the evaluations of the choice.
    """
    base: Any = solver.approximator
    assert isinstance(base, Dopri5 | Exponential)

    def levels(denoiser: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Arguments) -> Tensor:
        return adaptive_sigmas(
            denoiser,
            x,
            float(sigmas[-1]),
            float(sigmas[0]),
            approximator=base,
            rtol=tolerance,
            atol=tolerance,
            extra_args=extra_args,
        )

    return OwnGrid(solver, levels)


class NoiseMaps(NamedTuple):
    """The code of `EditFriendly`: a state, and the noise of each step down from there."""

    start: Tensor
    maps: tuple[Tensor, ...]
    nfe: int


class Edited(NamedTuple):
    """A sample, and the evaluations spent on it."""

    x: Tensor
    nfe: int


class Unedited:
    """Leaves an image as it is."""

    def invert(
        self, denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, extra_args: Arguments = None
    ) -> Edited:
        """The image."""
        return Edited(x, 0)

    def sample(
        self, denoiser: Denoiser, x: Edited, sigmas: Tensor, *, extra_args: Arguments = None
    ) -> Edited:
        """The image."""
        return x


@dataclass(frozen=True)
class EditFriendly:
    """Edit-friendly noise maps (Huberman-Spiegelglas et al., CVPR 2024, arXiv 2304.06140).

    The ancestral sampler (DDPM) draws ``x_{i-1} = μ(x_i) + s_i z_i``, in the unscaled state with

        μ(x_i) = D + (σ_{i-1} / σ_i)² (x_i - D)          s_i² = σ_{i-1}² (1 - (σ_{i-1} / σ_i)²)

    Inverting draws every x_i from the image with noise of its own, and keeps the z_i that lead from one
    to the next; sampling goes down by the same z_i, from the level at which the edit begins. Under the
    conditions of the source that ends at the image. One evaluation a step, for those not skipped.

    Attributes:
        skip: the share of the steps, from the noisiest, that an edit leaves out; 0.36 in the paper.
        seed: of the noise.
    """

    skip: float = 0.36
    seed: int = 0

    def invert(
        self, denoiser: Denoiser, x: Tensor, sigmas: Tensor, *, extra_args: Arguments = None
    ) -> NoiseMaps:
        """The noise maps of an image at level ``sigmas[-1]``."""
        s, first = self._levels(sigmas)
        generator = torch.Generator().manual_seed(self.seed)
        states = [
            x + (level**2 - s[-1] ** 2) ** 0.5 * torch.randn(x.shape, generator=generator).to(x)
            for level in s[:-1]
        ]
        maps = []
        for k, reached in enumerate([*states[1:], x][first:], start=first):
            mean, spread = _posterior(denoiser, states[k], s[k], s[k + 1], extra_args)
            maps.append((reached - mean) / spread if spread else torch.zeros_like(x))
        return NoiseMaps(states[first], tuple(maps), len(maps))

    def sample(
        self, denoiser: Denoiser, x: NoiseMaps, sigmas: Tensor, *, extra_args: Arguments = None
    ) -> Edited:
        """The sample that the noise maps lead to under other conditions."""
        s, first = self._levels(sigmas)
        state = x.start
        for k, noise in enumerate(x.maps, start=first):
            mean, spread = _posterior(denoiser, state, s[k], s[k + 1], extra_args)
            state = mean + spread * noise
        return Edited(state, len(x.maps))

    def _levels(self, sigmas: Tensor) -> tuple[tuple[float, ...], int]:
        levels = Grid.of(sigmas).levels
        return levels, min(round(self.skip * (len(levels) - 1)), len(levels) - 2)


def edit_friendly(
    denoiser: Denoiser,
    image: Tensor,
    sigmas: Tensor,
    source_args: Arguments,
    target_args: Arguments,
    skip: float = 0.36,
    seed: int = 0,
) -> Tensor:
    """`EditFriendly`, there and back: the edit of an image at level ``sigmas[-1]``."""
    method = EditFriendly(skip, seed)
    code = method.invert(denoiser, image, sigmas, extra_args=source_args)
    return method.sample(denoiser, code, sigmas, extra_args=target_args).x


@torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
def _posterior(
    denoiser: Denoiser, x: Tensor, sigma: float, target: float, extra_args: Arguments
) -> tuple[Tensor, float]:
    """μ and s of a step from `sigma` to `target`."""
    level = torch.full(x.shape[:1], sigma, dtype=x.dtype, device=x.device)
    denoised = denoiser(x, level, **(extra_args or {}))
    ratio = (target / sigma) ** 2
    return denoised + ratio * (x - denoised), target * (1 - ratio) ** 0.5
