"""Denoisers: adapters from models to the contract ``denoiser(x, sigma, **extra_args)``."""

from .closed_form import Gaussian, GaussianMixture, IdealDenoiser
from .digits import load_digits
from .edm import load_edm, save_edm
from .emoji import emoji_drawings, emoji_groups, emoji_labels, load_emoji
from .flow import FLOW_SIGMA_MAX, FlowDenoiser, flow_sigmas, flow_times
from .guidance import ClassifierFreeGuidance
from .kdiffusion import import_k_diffusion, wrapper_sigmas
from .noise import init_noise
from .precision import InDtype
from .prediction import PredictionWarning, check_prediction
from .stable_diffusion import StableDiffusion
from .stable_diffusion_loading import load_stable_diffusion
from .tiny_stable_diffusion import save_tiny_stable_diffusion
from .wrappers import CosineDenoiser, DiscreteDenoiser, EDMDenoiser, VPDenoiser

__all__ = [
    "FLOW_SIGMA_MAX",
    "ClassifierFreeGuidance",
    "CosineDenoiser",
    "DiscreteDenoiser",
    "EDMDenoiser",
    "FlowDenoiser",
    "Gaussian",
    "GaussianMixture",
    "IdealDenoiser",
    "InDtype",
    "PredictionWarning",
    "StableDiffusion",
    "VPDenoiser",
    "check_prediction",
    "emoji_drawings",
    "emoji_groups",
    "emoji_labels",
    "flow_sigmas",
    "flow_times",
    "import_k_diffusion",
    "init_noise",
    "load_digits",
    "load_edm",
    "load_emoji",
    "load_stable_diffusion",
    "save_edm",
    "save_tiny_stable_diffusion",
    "wrapper_sigmas",
]
