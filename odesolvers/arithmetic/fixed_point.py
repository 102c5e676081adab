"""Fixed point: a state is a tensor of integers, and inversion is exact to the bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from ..grids import Grid
from ..values import count
from .base import Arithmetic
from .stack import SideInformation, Stack, checksum

_STATE_BITS: Final = 61
"""Products g Z and increments stay below 2^61, so that sums of three fit into 63 bits."""
_WEIGHT_BITS: Final = 12
_LARGEST_WEIGHT: Final = 2**48
_HEADROOM: Final = 2**8

_NOT_UNDONE: Final = (
    "the denoiser did not return the same bits for the same input, other extra_args were given, or "
    "the state was changed. FixedPoint(check_determinism=True) tests the denoiser; to go on from a "
    "state with other arguments, as an edit does, begin a run of its own with state.fork()"
)


@final
@dataclass(frozen=True, repr=False, eq=False)
class FixedPoint(Arithmetic):
    """States as integers ``Z ≈ 2^F x``, and steps that are undone to the bit.

        Z_{i-1} = g_i ⊗ Z_{i+1} + round(2^F rest(x_i))        x_i = 2^-F Z_i, in the dtype of x

    `rest`, with all denoiser outputs, is a function of Z_i alone, the same in both directions; adding
    integers is exact; and ⊗, the multiplication by a fraction, stores its remainders in the side
    information of the state, see `Stack`: about ``log2(1 / g_i)`` bits for each element and step,
    which is what a contraction by g_i destroys, and nothing for g_i = 1.

    `solution.x` and what the denoiser sees are tensors of the dtype of x. The pair in
    `solution.state` is int64. A run that starts at `x` and is undone returns `snap(x)`.

    Weights g_i are replaced by fractions, see `weight`, and the formula of the step is made with the
    replaced ones. What a multiplication rounds is below 2^(12-F), amplified by g_i where that is
    above 1.

    Args:
        fractional_bits: F, from 8 to 53. A state can hold ``|x|`` below 2^(61-F), 2 million for the
            default of 40; each run checks that this leaves room for its grid, and that no state
            leaves the range.
        check_determinism: evaluate the first shear of each run twice and raise where the outputs are
            not the same to the bit. Costs the evaluations of one shear, which for most solvers is a
            step.

    Raises:
        ValueError: at construction, if `fractional_bits` is not usable.
        OverflowError: in a run, if a state leaves the range.
        RuntimeError: in a run, if the denoiser is not deterministic; or if a run has been undone to
            where it began and is not what it was: see `close`.
    """

    fractional_bits: int = 40
    check_determinism: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        F = count("fractional_bits", self.fractional_bits)
        if not 8 <= F <= 53:
            raise ValueError(f"fractional_bits must be an integer from 8 to 53, got {F}")
        if not isinstance(self.check_determinism, bool):
            raise TypeError(
                f"check_determinism must be True or False, got {self.check_determinism!r}"
            )
        object.__setattr__(self, "fractional_bits", F)

    exact: ClassVar[bool] = True

    @property
    def limit(self) -> float:
        """The range: states stay below it in absolute value."""
        return 2.0 ** (_STATE_BITS - self.fractional_bits)

    @torch.no_grad()
    def snap(self, x: Tensor) -> Tensor:
        """The value of the fixed-point grid nearest to `x`, in the dtype of `x`.

        For a dtype of p significant bits (float32: 24) every ``|x| >= 2^(p-1-F)`` is on the grid
        already and comes back as it is (and -0.0 as 0.0); smaller ones are rounded to a multiple of
        2^-F, which the dtype represents. So `snap` is idempotent and never leaves the dtype.

        Raises:
            OverflowError: if an element is outside the range, or not finite.
        """
        return self.load(self.store(x), x.dtype)

    def check(self, grid: Grid) -> None:
        """Raises a ValueError for levels that 2^F does not resolve, or that leave no room above them."""
        F, top = self.fractional_bits, grid.levels[0]
        bottom = min(sigma for sigma in grid.levels if sigma > 0)
        most = _STATE_BITS - math.ceil(math.log2(top * _HEADROOM))
        least = math.ceil(math.log2(2**_WEIGHT_BITS * 8 / bottom))
        if not least <= F <= most:
            advice = (
                f"use FixedPoint(fractional_bits={max(8, min(most, 53))})"
                if max(8, least) <= min(most, 53)
                else "no number of bits serves both ends of this grid"
            )
            raise ValueError(
                f"{self} does not fit the grid: its highest level {top:.6g} needs at most {most} "
                f"fractional bits, to leave a factor of {_HEADROOM} for the state, and its lowest "
                f"level above 0, {bottom:.6g}, at least {least}; {advice}"
            )

    def weight(self, g: float) -> float:
        """The fraction ``a / 2^k`` nearest to `g` with a below 2^12, as a float; -1 stays -1.

        The difference is at most 2^-12 of `g`. A multiplication needs one division for it, where other
        fractions need two. Above 2^12 it is the nearest integer.

        Raises:
            ValueError: if `g` is above 2^48 or below 2^-48.
        """
        return 0.0 if g == 0.0 else math.copysign(float(_fraction(abs(g))), g)

    def store(self, x: Tensor) -> Tensor:
        largest = float(x.abs().max())
        if not largest < self.limit:
            raise OverflowError(
                f"the state has an element of size {largest:.6g}; {self} holds |x| below "
                f"{self.limit:.6g}: scale x, or use fewer fractional bits"
            )
        return self._encode(x.float() if x.element_size() < 4 else x.clone())

    def load(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        working = torch.float64 if dtype == torch.float64 else torch.float32
        return stored.to(working).mul_(2.0**-self.fractional_bits).to(dtype)

    def open(self, state: Any, origin: int, dtype: torch.dtype) -> Stack:
        current, partner, side = state.current, state.partner, state.side
        if side is not None:
            if current.dtype != torch.int64 or partner is None:
                raise ValueError(
                    f"a state with side information is a pair in int64, got {current.dtype}"
                )
            return Stack.unpack(side, current.shape)
        total = checksum(current)
        total = total if partner is None else total + checksum(partner)
        return Stack(current.shape, origin, total, dtype)

    def close(
        self, memory: Stack, current: Tensor, partner: Tensor | None, index: int
    ) -> SideInformation:
        """The side information of the state at `index`, after a check of the run.

        A step maps (pair, side information) to (pair, side information) one to one. So a run that is
        undone to its first pair must find that pair, by its checksum, and the empty side information
        that it started with; a denoiser output that differed on the way, or a bit changed in the
        state, cannot lead there but by a collision of the 64-bit checksum.

        Raises:
            OverflowError: if a state left the range on the way.
            RuntimeError: if the run is back at its first pair and that is not what it was.
        """
        assert partner is not None
        for extent in memory.extents:
            self._check_range(*extent, memory.dtype)
        if any(bool(overflow) for overflow in memory.overflows):
            raise RuntimeError("the side information does not fit the run: " + _NOT_UNDONE)
        side = memory.pack()
        if index == memory.origin and (
            side.bits_per_element > 0
            or not torch.equal(checksum(current) + checksum(partner), memory.checksum)
        ):
            raise RuntimeError(
                "the run was undone to its first pair of states, which is not what it was: "
                + _NOT_UNDONE
            )
        return side

    def forward(self, gain: float, a: Tensor | None, rest: Tensor, memory: Stack) -> Tensor:
        self._check_extent(memory, rest, 1.0)
        encoded = self._encode(rest)
        if a is None:  # the second state of the first pair of the run
            memory.checksum = memory.checksum + checksum(encoded)
        if a is None or gain == 0.0:
            return encoded
        size = self._check_extent(memory, a, max(abs(gain), 1.0))
        p, q = self._terms(gain)
        product = a if p == q else memory.multiply(a, p, q, size)
        return encoded.add_(product, alpha=1 if gain > 0.0 else -1)

    def inverse(self, gain: float, c: Tensor, rest: Tensor, memory: Stack) -> Tensor:
        self._check_extent(memory, rest, 1.0)
        product = self._encode(rest)
        torch.sub(c, product, out=product)
        if gain < 0.0:
            product = product.neg_()
        size = self._check_extent(memory, product, max(1 / abs(gain), 1.0))
        p, q = self._terms(gain)
        return product if p == q else product.copy_(memory.divide(product, p, q, size))

    def _encode(self, x: Tensor) -> Tensor:
        """``round(2^F x)`` as int64; overwrites `x`, which is float32 or float64."""
        return x.mul_(2.0**self.fractional_bits).round_().to(torch.int64)

    def _terms(self, gain: float) -> tuple[int, int]:
        fraction = _fraction(abs(gain))
        if abs(gain) != float(fraction):
            raise ValueError(
                f"a step has the gain {gain!r}, which {self} cannot undo: a solver must take "
                "its weights through arithmetic.weight()"
            )
        return fraction.as_integer_ratio()

    def _check_extent(self, stack: Stack, x: Tensor, factor: float) -> float:
        """Checks the range of `x` times `factor`: at once on the CPU, else at the end of the run.

        Returns:
            the largest ``|x|`` where it is known, infinite elsewhere.
        """
        low, high = x.aminmax()
        if x.dtype == torch.int64:
            factor *= 2.0**-self.fractional_bits
        if x.device.type == "cpu":
            self._check_range(stack.sigma, low, high, factor, stack.dtype)
            return max(-float(low), float(high))
        stack.extents.append((stack.sigma, low, high, factor))
        return math.inf

    def _check_range(
        self, sigma: float, low: Tensor, high: Tensor, factor: float, dtype: torch.dtype
    ) -> None:
        limit = min(self.limit, torch.finfo(dtype).max)
        size = max(-float(low), float(high)) * factor
        if not size < limit:
            raise OverflowError(
                f"the state reaches {size:.3g} in the step from sigma = {sigma:.6g}; {self} with "
                f"{dtype} holds |x| below {limit:.6g}. A run that grows so far is unstable: use "
                "weights g_i that amplify less in this direction, or fewer fractional bits if it is "
                "meant to"
            )


@lru_cache(maxsize=4096)
def _fraction(g: float) -> Fraction:
    """The fraction of `FixedPoint.weight`; that of ``float(_fraction(g))`` is the same."""
    if not 1 / _LARGEST_WEIGHT <= g <= _LARGEST_WEIGHT:
        raise ValueError(
            f"the weight g = {g:.6g} is too far from 1 for fixed-point states, which take weights "
            "from 2^-48 to 2^48: choose another gamma, or a grid whose steps differ less"
        )
    _, exponent = math.frexp(g)
    denominator = 2 ** max(0, _WEIGHT_BITS - exponent)
    return Fraction(round(g * denominator), denominator)
