"""Checkpoints of "Elucidating the design space of diffusion-based generative models".

Karras et al. 2022, arXiv 2206.00364; the files are at github.com/NVlabs/edm.
"""

from .checkpoint import load_edm, save_edm
from .networks import DhariwalConfig, DhariwalUNet, SongConfig, SongUNet
from .pickles import CheckpointError
from .preconditioning import EDMPrecond, IDDPMPrecond, Preconditioner, VEPrecond, VPPrecond

__all__ = [
    "CheckpointError",
    "DhariwalConfig",
    "DhariwalUNet",
    "EDMPrecond",
    "IDDPMPrecond",
    "Preconditioner",
    "SongConfig",
    "SongUNet",
    "VEPrecond",
    "VPPrecond",
    "load_edm",
    "save_edm",
]
