"""Weights and noise levels learned for a model: least squares over whole runs, both ways at once."""

from .fit import calibrate
from .objective import Objective
from .rule import Calibrated, CalibrationReport

__all__ = ["Calibrated", "CalibrationReport", "Objective", "calibrate"]
