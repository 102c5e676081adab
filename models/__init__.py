"""Denoisers: everything that turns a model into ``denoiser(x, sigma, **extra_args)``."""

from .closed_form import Gaussian, GaussianMixture, IdealDenoiser
from .digits import load_digits
from .edm import load_edm, save_edm
from .precision import InDtype

__all__ = [
    "Gaussian",
    "GaussianMixture",
    "IdealDenoiser",
    "InDtype",
    "load_digits",
    "load_edm",
    "save_edm",
]
