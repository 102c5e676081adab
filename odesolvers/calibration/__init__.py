"""Weights learned for a model: least squares over whole runs, sampling and encoding together."""

from .fit import calibrate
from .objective import Objective
from .rule import Calibrated, CalibrationReport

__all__ = ["Calibrated", "CalibrationReport", "Objective", "calibrate"]
