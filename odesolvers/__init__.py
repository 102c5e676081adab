"""ODE solvers for diffusion models that go from noise to data and exactly back."""

from .approximators import (
    DDIM,
    RK3,
    RK4,
    Denoise,
    DPMSolverPP2S,
    Euler,
    Exponential,
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
from .belm import BELM, BELMRule, Coefficients, GivenBELM, OptimalBELM
from .calibration import Calibrated, CalibrationReport, Objective, calibrate
from .combination import Combination
from .coupled import EDICT, McCallumFoster, ReversibleHeun, Rex
from .execution import Compiled, CUDAGraph, Execution
from .gamma import (
    ConstantGamma,
    DampedStepRatio,
    GammaRule,
    PerStep,
    SmoothedOutput,
    StepRatio,
    order_gaining,
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
from .iterative import DDIMInversion, FixedPointInversion, IterativeSolver
from .solver import CoupledSolver, Denoiser, InvertibleSolver, Solver
from .stability import StabilityReport, stability_report
from .state import Convergence, Solution, State
from .trust import InversionWarning

__version__ = "0.1.0"

__all__ = [
    "BDIA",
    "BELM",
    "DDIM",
    "EDICT",
    "RK3",
    "RK4",
    "Arithmetic",
    "BELMRule",
    "CUDAGraph",
    "Calibrated",
    "CalibrationReport",
    "Coefficients",
    "Combination",
    "Compiled",
    "ConstantGamma",
    "Convergence",
    "CoupledSolver",
    "DDIMInversion",
    "DPMSolverPP2S",
    "DampedStepRatio",
    "Denoise",
    "Denoiser",
    "Euler",
    "Execution",
    "Exponential",
    "FixedPoint",
    "FixedPointInversion",
    "FloatingPoint",
    "FlowEuler",
    "GammaRule",
    "GivenBELM",
    "Grid",
    "HeunEDM",
    "IntegrationApproximator",
    "InversionWarning",
    "InvertibleSolver",
    "IterativeSolver",
    "McCallumFoster",
    "Midpoint",
    "Objective",
    "OptimalBELM",
    "PerStep",
    "ReversibleHeun",
    "Rex",
    "SideInformation",
    "SmoothedOutput",
    "Solution",
    "Solver",
    "StabilityReport",
    "State",
    "StepRatio",
    "calibrate",
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
