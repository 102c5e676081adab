"""ODE solvers for diffusion models that go from noise to data and exactly back."""

from .approximators import (
    DDIM,
    RK3,
    RK4,
    Denoise,
    DPMSolverPP2S,
    Euler,
    FlowEuler,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
    slope,
)
from .arithmetic import (
    Arithmetic,
    FixedPoint,
    FloatingPoint,
    SideInformation,
    side_information_bound,
)
from .bdia import BDIA
from .combination import Combination
from .gamma import ConstantGamma, GammaRule, PerStep, SmoothedOutput, StepRatio, order_gaining
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
from .stability import StabilityReport, stability_report
from .state import Solution, State
from .trust import InversionWarning

__version__ = "0.1.0"

__all__ = [
    "BDIA",
    "DDIM",
    "RK3",
    "RK4",
    "Arithmetic",
    "Combination",
    "ConstantGamma",
    "DPMSolverPP2S",
    "Denoise",
    "Denoiser",
    "Euler",
    "FixedPoint",
    "FloatingPoint",
    "FlowEuler",
    "GammaRule",
    "Grid",
    "HeunEDM",
    "IntegrationApproximator",
    "InversionWarning",
    "InvertibleSolver",
    "Midpoint",
    "PerStep",
    "SideInformation",
    "SmoothedOutput",
    "Solution",
    "Solver",
    "StabilityReport",
    "State",
    "StepRatio",
    "ddim_timesteps",
    "exponential_sigmas",
    "karras_sigmas",
    "order_gaining",
    "polyexponential_sigmas",
    "side_information_bound",
    "sigmas_from_alphas_cumprod",
    "slope",
    "stability_report",
    "vp_sigmas",
]
