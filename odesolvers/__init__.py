"""ODE solvers for diffusion models that go from noise to data and exactly back."""

from .approximators import (
    DDIM,
    RK3,
    RK4,
    DPMSolverPP2S,
    Euler,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
)
from .arithmetic import (
    Arithmetic,
    FixedPoint,
    FloatingPoint,
    SideInformation,
    side_information_bound,
)
from .bdia import BDIA
from .gamma import ConstantGamma, GammaRule, PerStep, SmoothedOutput, StepRatio
from .grids import (
    Grid,
    ddim_timesteps,
    exponential_sigmas,
    karras_sigmas,
    polyexponential_sigmas,
    sigmas_from_alphas_cumprod,
    vp_sigmas,
)
from .solver import Denoiser, InvertibleSolver, Solver
from .state import Solution, State
from .storage import load_state, save_state

__version__ = "0.1.0"

__all__ = [
    "BDIA",
    "DDIM",
    "RK3",
    "RK4",
    "Arithmetic",
    "ConstantGamma",
    "DPMSolverPP2S",
    "Denoiser",
    "Euler",
    "FixedPoint",
    "FloatingPoint",
    "GammaRule",
    "Grid",
    "HeunEDM",
    "IntegrationApproximator",
    "InvertibleSolver",
    "Midpoint",
    "PerStep",
    "SideInformation",
    "SmoothedOutput",
    "Solution",
    "Solver",
    "State",
    "StepRatio",
    "ddim_timesteps",
    "exponential_sigmas",
    "karras_sigmas",
    "load_state",
    "polyexponential_sigmas",
    "save_state",
    "side_information_bound",
    "sigmas_from_alphas_cumprod",
    "vp_sigmas",
]
