"""The names needed to write solvers, methods, rules and arithmetics of your own.

A newcomer does not need this module. `Combination` is the type that formulas compute with, `Shear` one
step of a pair of states, and `Solver` the base of everything with `sample` and `invert`.
"""

from .approximators import IntegrationApproximator, euler, leaving, slope
from .arithmetic import Arithmetic, SideInformation
from .coupled import CoupledSolver
from .formula import Call, Combination, Denoise, Shear, trace
from .gamma import GammaRule, as_rule
from .iterative import IterativeSolver, Residual
from .propagation import LinearRun
from .run import Callback, Denoiser, Pair, Run, Steps
from .settings import Settings
from .solver import Solver
from .state import Convergence

__all__ = [
    "Arithmetic",
    "Call",
    "Callback",
    "Combination",
    "Convergence",
    "CoupledSolver",
    "Denoise",
    "Denoiser",
    "GammaRule",
    "IntegrationApproximator",
    "IterativeSolver",
    "LinearRun",
    "Pair",
    "Residual",
    "Run",
    "Settings",
    "Shear",
    "SideInformation",
    "Solver",
    "Steps",
    "as_rule",
    "euler",
    "leaving",
    "slope",
    "trace",
]
