"""A network of emoji in the package, its labels, and drawings that it has not seen.

Its training is not at its end: ``python -m benchmarks.emoji.train --start`` goes on from the weights
here.
"""

from .labels import STYLES, TONES, emoji_groups, emoji_labels
from .network import Drawings, emoji_drawings, load_emoji, training_log

__all__ = [
    "STYLES",
    "TONES",
    "Drawings",
    "emoji_drawings",
    "emoji_groups",
    "emoji_labels",
    "load_emoji",
    "training_log",
]
