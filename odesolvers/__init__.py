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
from .calibration import Calibrated, CalibrationReport, Objective, calibrate
from .combination import Combination
from .gamma import (
    ConstantGamma,
    DampedStepRatio,
    GammaRule,
    PerStep,
    SmoothedOutput,
    StepRatio,
)
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

__version__ = "0.1.0"

__all__ = [
    "BDIA",
    "DDIM",
    "RK3",
    "RK4",
    "Arithmetic",
    "Calibrated",
    "CalibrationReport",
    "Combination",
    "ConstantGamma",
    "DPMSolverPP2S",
    "DampedStepRatio",
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
    "InvertibleSolver",
    "Midpoint",
    "Objective",
    "PerStep",
    "SideInformation",
    "SmoothedOutput",
    "Solution",
    "Solver",
    "State",
    "StepRatio",
    "calibrate",
    "ddim_timesteps",
    "exponential_sigmas",
    "karras_sigmas",
    "polyexponential_sigmas",
    "side_information_bound",
    "sigmas_from_alphas_cumprod",
    "slope",
    "vp_sigmas",
]
