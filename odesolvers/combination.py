"""Linear combinations of a state and denoiser outputs, held as their coefficients.

Every explicit one-step method moves by a linear combination of the state it starts from and the
denoiser outputs it asks for, with coefficients that depend on the noise levels only. Working on
the coefficients keeps the algebra on the host, in double precision, and leaves the arithmetic of
the tensors to one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Final, NamedTuple

STATE: Final = 0
"""The term that stands for the current state; denoiser output number k is the term k = 1, 2, ..."""


class Factored(NamedTuple):
    """``factor · (v_k + Σ_j r_j v_j)``"""

    factor: float
    k: int
    others: tuple[tuple[int, float], ...]


class Mean(NamedTuple):
    """A weighted mean: ``v_first``, moved by each ``(j, w)`` in turn, from m to ``m + w (v_j - m)``."""

    first: int
    moves: tuple[tuple[int, float], ...]


class Combination:
    """An immutable linear combination ``Σ_k c_k v_k``.

    ``v_0`` is the current state and ``v_k`` the k-th denoiser output. Combinations add, subtract
    and scale as vectors do.

    >>> from odesolvers.combination import STATE, Combination
    >>> x, denoised = Combination({STATE: 1.0}), Combination({1: 1.0})
    >>> (x - denoised) / 2.0
    Combination({0: 0.5, 1: -0.5})
    """

    def __init__(self, coefficients: Mapping[int, float]) -> None:
        for k, c in coefficients.items():
            if not isinstance(c, int | float) or not math.isfinite(c):
                raise TypeError(
                    f"a combination has finite numbers as coefficients, got {c!r} for term {k}: "
                    "states may be added, subtracted, and scaled by numbers"
                )
        self._coefficients = {k: c for k, c in sorted(coefficients.items()) if c != 0.0}

    def __getitem__(self, term: int) -> float:
        """The coefficient of `term`, 0.0 where it does not appear."""
        return self._coefficients.get(term, 0.0)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Pairs (term, coefficient) in the order of the terms, zeros left out."""
        return iter(self._coefficients.items())

    @cached_property
    def factored(self) -> Factored | None:
        """The largest coefficient c, its term k, and the others over it; None without terms.

        ``c (v_k + Σ_j (c_j / c) v_j)``: a sum with one factor takes a pass over memory less.
        """
        if not self._coefficients:
            return None
        k, c = max(self, key=lambda term: abs(term[1]))
        return Factored(c, k, tuple((j, d / c) for j, d in self if j != k))

    @cached_property
    def mean(self) -> Mean | None:
        """The combination as a mean with its coefficients as weights; None unless they add up to 1."""
        return self.mean_over(1.0)

    def mean_over(self, total: float) -> Mean | None:
        """``Σ_k c_k v_k / total``; None unless the coefficients add up to `total`, up to rounding.

        Moving a mean takes one operation for each term but the first, where a sum takes one more. The
        terms come in the order in which no part of the sum is smaller than the whole or the largest
        term, so that nothing cancels on the way. Where the whole is nothing beside the terms, that is
        None too.
        """
        size = max((abs(c) for _, c in self), default=0.0)
        missing = total - math.fsum(c for _, c in self)
        if not abs(missing) <= 1e-12 * max(size, 1.0) or not abs(total) > 1e-7 * size > 0.0:
            return None
        (first, _), *others = sorted(self, key=lambda term: -term[1] / total)
        # From the end, where the whole is known: what is missing is rounding, and left to the first.
        moves, so_far = [], 1.0
        for k, c in reversed(others):
            moves.append((k, c / total / so_far))
            so_far -= c / total
        return Mean(first, tuple(reversed(moves)))

    def __add__(self, other: Combination) -> Combination:
        if not isinstance(other, Combination):
            return NotImplemented
        terms = self._coefficients.keys() | other._coefficients.keys()
        return Combination({k: self[k] + other[k] for k in terms})

    def __neg__(self) -> Combination:
        return -1.0 * self

    def __sub__(self, other: Combination) -> Combination:
        return self + -other

    def __mul__(self, factor: float) -> Combination:
        return Combination({k: c * factor for k, c in self})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Combination:
        return Combination({k: c / divisor for k, c in self})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Combination):
            return NotImplemented
        return self._coefficients == other._coefficients

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Combination({self._coefficients})"


HERE: Final = Combination({STATE: 1.0})
"""The current state itself."""

NOTHING: Final = Combination({})
"""The empty combination."""
