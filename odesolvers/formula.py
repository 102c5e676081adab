"""Formulas in a state x and a denoiser D(x, σ), run once on coefficients: combinations and shears."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias, TypeVar

from torch import Tensor

T = TypeVar("T")


class Combination:
    """An immutable linear combination ``Σ_k c_k v_k``, which adds, subtracts and scales as a vector.

    ``v_0`` is a state and ``v_k`` the k-th denoiser output. Every explicit one-step method moves by such
    a combination, with coefficients that depend on the noise levels alone.

    >>> from odesolvers.extend import Combination
    >>> x, denoised = Combination({0: 1.0}), Combination({1: 1.0})
    >>> (x - denoised) / 2.0
    Combination({0: 0.5, 1: -0.5})

    Args:
        terms: the coefficients c_k by k; zeros are left out.

    Raises:
        TypeError: if a coefficient is not a finite number.
    """

    __slots__ = ("_first", "_others", "terms")

    def __init__(self, terms: Mapping[int, float]) -> None:
        for k, c in terms.items():
            if not isinstance(c, int | float) or not math.isfinite(c):
                raise TypeError(
                    f"a combination has finite numbers as coefficients, got {c!r} for term {k}: "
                    "states may be added, subtracted, and scaled by numbers"
                )
        self.terms = {k: c for k, c in sorted(terms.items()) if c != 0.0}
        items = list(self.terms.items()) or [(0, 0.0)]
        self._first, self._others = items[0], items[1:]

    def __getitem__(self, k: int) -> float:
        return self.terms.get(k, 0.0)

    def __add__(self, other: Combination) -> Combination:
        if not isinstance(other, Combination):
            raise TypeError(
                f"a combination is added to a combination of x and outputs, got {other!r}: does a "
                "formula add a number, or return nothing?"
            )
        return Combination({k: self[k] + other[k] for k in self.terms.keys() | other.terms.keys()})

    def __mul__(self, factor: float) -> Combination:
        return Combination({k: c * factor for k, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return Combination({k: c / divisor for k, c in self.terms.items()})

    def __neg__(self) -> Combination:
        return -1.0 * self

    def __sub__(self, other: Combination) -> Combination:
        return self + -other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Combination) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(tuple(self.terms.items()))

    def __repr__(self) -> str:
        return f"Combination({self.terms})"

    def of(self, values: Sequence[Tensor]) -> Tensor:
        """The combination of tensors of one dtype, in new storage; of half precision, in float32."""
        if values[0].itemsize < 4:
            values = [value.float() for value in values]
        k, c = self._first
        total = values[k] * c
        for k, c in self._others:
            total.add_(values[k], alpha=c)
        return total


Denoise: TypeAlias = Callable[[Combination, float], Combination]
"""``D(point, sigma)`` in a formula: the denoiser's output at a combination of states and outputs."""


class Call(NamedTuple):
    """A denoiser call: the point, made of the state and of earlier outputs, and the noise level."""

    point: Combination
    sigma: float


def trace(formula: Callable[[Combination, Denoise], T]) -> tuple[tuple[Call, ...], T]:
    """Runs ``formula(x, D)`` on coefficients: its denoiser calls, equal ones once, and its result."""
    calls: list[Call] = []

    def D(point: Combination, sigma: float) -> Combination:
        call = Call(point, sigma)
        if call not in calls:
            calls.append(call)
        return Combination({calls.index(call) + 1: 1.0})

    result = formula(Combination({0: 1.0}), D)
    return tuple(calls), result


@dataclass(frozen=True)
class Shear:
    """A map of a pair of states, and its inverse by the same denoiser calls at b:

        (a, b) -> (b, gain · a + rest(b))              (b, c) -> ((c - rest(b)) / gain, b)

    Attributes:
        calls: the denoiser calls; each point is made of b and of the outputs of the calls before.
        rest: a combination of b and of the outputs.
        gain: the weight of a; a shear of gain 0 loses a, and has no inverse.
    """

    calls: tuple[Call, ...]
    rest: Combination
    gain: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.gain, int | float):
            raise TypeError(f"the gain of a shear must be a number, got {self.gain!r}")

    @cached_property
    def exchanges(self) -> bool:
        """Whether it only exchanges the two states, which no rounding and no memory is needed for."""
        return self.gain == 1.0 and not self.rest.terms

    @classmethod
    def of(cls, rest: Callable[[Combination, Denoise], Combination], gain: float = 0.0) -> Shear:
        """The shear whose ``rest(b)`` is given as a formula ``rest(b, D)``.

        Raises:
            TypeError: if the formula returns anything but a `Combination`.
        """
        calls, result = trace(rest)
        if not isinstance(result, Combination):
            raise TypeError(f"a formula must return a combination of x and outputs, got {result!r}")
        return cls(calls, result, gain)
