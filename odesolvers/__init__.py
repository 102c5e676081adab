"""ODE solvers for diffusion models that go from noise to data and exactly back.

`Denoiser`, `Grid`, `ConstantGamma`, `midpoint_sigmas`, `polyexponential_sigmas`, `vp_sigmas`
and `side_information_bound` can be imported too; few users type them.
"""

import sys
from pathlib import Path

# `python -m odesolvers` imports this file first, and what follows takes seconds.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in ("odesolvers", "-modesolvers"):
    import odesolvers_command

    odesolvers_command.hear_early()

from .adaptive import adaptive_sigmas
from .approximators import (
    DDIM,
    EES25,
    RK3,
    RK4,
    Dopri5,
    DPMSolverPP2S,
    Euler,
    Exponential,
    FlowEuler,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
)
from .arithmetic import FixedPoint, FloatingPoint
from .bdia import BDIA
from .calibration import Calibrated, Objective, calibrate
from .coupled import EDICT, McCallumFoster, ReversibleHeun
from .gamma import (
    ConstantGamma as ConstantGamma,
    DampedStepRatio,
    GammaRule,
    HeunStepRatio,
    PerStep,
    SmoothedOutput,
    StepRatio,
    order_gaining,
)
from .grids import (
    Grid as Grid,
    ddim_timesteps,
    exponential_sigmas,
    karras_sigmas,
    midpoint_sigmas as midpoint_sigmas,
    polyexponential_sigmas as polyexponential_sigmas,
    sigmas_from_alphas_cumprod,
    vp_sigmas as vp_sigmas,
)
from .iterative import DDIMInversion, FixedPointInversion, ReverseStepInversion
from .likelihood import log_likelihood
from .named import BELM, MALI, Rex
from .pair_likelihood import importance_samples, log_likelihood_bound
from .parsing import parse
from .run import Denoiser as Denoiser
from .stability import side_information_bound as side_information_bound, stability_report
from .state import Solution, State
from .trust import InversionWarning, StabilityWarning as StabilityWarning

__version__ = "0.1.0"

# An installed package holds `models`; in a clone it stands beside this package. The clone's own is
# meant there, whatever else is installed.
if not Path(__file__).with_name("models").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__all__ = [
    "BDIA",
    "BELM",
    "DDIM",
    "EDICT",
    "EES25",
    "MALI",
    "RK3",
    "RK4",
    "Calibrated",
    "DDIMInversion",
    "DPMSolverPP2S",
    "DampedStepRatio",
    "Dopri5",
    "Euler",
    "Exponential",
    "FixedPoint",
    "FixedPointInversion",
    "FloatingPoint",
    "FlowEuler",
    "GammaRule",
    "HeunEDM",
    "HeunStepRatio",
    "IntegrationApproximator",
    "InversionWarning",
    "McCallumFoster",
    "Midpoint",
    "Objective",
    "PerStep",
    "ReverseStepInversion",
    "ReversibleHeun",
    "Rex",
    "SmoothedOutput",
    "Solution",
    "State",
    "StepRatio",
    "adaptive_sigmas",
    "calibrate",
    "ddim_timesteps",
    "exponential_sigmas",
    "importance_samples",
    "karras_sigmas",
    "log_likelihood",
    "log_likelihood_bound",
    "order_gaining",
    "parse",
    "sigmas_from_alphas_cumprod",
    "stability_report",
]
