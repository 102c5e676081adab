"""How a state is stored and a step applied to it."""

from .base import Arithmetic
from .fixed_point import FixedPoint, side_information_bound
from .floating import FloatingPoint
from .stack import SideInformation

__all__ = [
    "Arithmetic",
    "FixedPoint",
    "FloatingPoint",
    "SideInformation",
    "side_information_bound",
]
