"""One-step methods: each estimates the integral of the flow from one state alone."""

from .base import IntegrationApproximator, check_approximator, euler, slope
from .exponential import DPMSolverPP2S, Exponential
from .first_order import DDIM, Euler, FlowEuler, variance_preserving
from .runge_kutta import RK3, RK4, HeunEDM, Midpoint, leaving
from .tableaus import EES25, Dopri5

__all__ = [
    "DDIM",
    "EES25",
    "RK3",
    "RK4",
    "DPMSolverPP2S",
    "Dopri5",
    "Euler",
    "Exponential",
    "FlowEuler",
    "HeunEDM",
    "IntegrationApproximator",
    "Midpoint",
    "check_approximator",
    "euler",
    "leaving",
    "slope",
    "variance_preserving",
]
