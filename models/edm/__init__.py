"""Networks and checkpoints of "Elucidating the design space of diffusion-based generative models".

Karras et al. 2022, arXiv 2206.00364; the published files are at github.com/NVlabs/edm.
"""

from .checkpoint import load_edm, save_edm
from .dhariwal import DhariwalConfig, DhariwalUNet
from .preconditioning import EDMPrecond, IDDPMPrecond, Preconditioner, VEPrecond, VPPrecond
from .song import SongConfig, SongUNet
from .stored import CheckpointError

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
