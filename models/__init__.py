"""Denoisers: everything that turns a model into ``denoiser(x, sigma, **extra_args)``."""

from .closed_form import Gaussian, GaussianMixture, IdealDenoiser
from .digits import load_digits
from .letters import load_letters, random_letters, render_letter
from .precision import InDtype

__all__ = [
    "Gaussian",
    "GaussianMixture",
    "IdealDenoiser",
    "InDtype",
    "load_digits",
    "load_letters",
    "random_letters",
    "render_letter",
]
