"""One-step methods: each estimates the integral of the flow from one state alone."""

from .base import Denoise, IntegrationApproximator, slope
from .euler import DDIM, Euler, FlowEuler
from .exponential import DPMSolverPP2S, Exponential
from .heun import HeunEDM, leaving
from .runge_kutta import RK3, RK4, Midpoint

__all__ = [
    "DDIM",
    "RK3",
    "RK4",
    "DPMSolverPP2S",
    "Denoise",
    "Euler",
    "Exponential",
    "FlowEuler",
    "HeunEDM",
    "IntegrationApproximator",
    "Midpoint",
    "leaving",
    "slope",
]
