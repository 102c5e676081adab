"""The representations of states: floating point and fixed point."""

from .base import Arithmetic, check_arithmetic
from .fixed_point import FixedPoint
from .floating import FloatingPoint
from .stack import SideInformation

__all__ = [
    "Arithmetic",
    "FixedPoint",
    "FloatingPoint",
    "SideInformation",
    "check_arithmetic",
]
