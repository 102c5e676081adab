"""How a state is stored and a step applied to it."""

from .base import Arithmetic
from .floating import FloatingPoint

__all__ = ["Arithmetic", "FloatingPoint"]
