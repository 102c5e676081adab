"""Solvers as schedulers of diffusers. Import this before loading a pipeline that was saved with one."""

from .invertible import InvertibleScheduler

__all__ = ["InvertibleScheduler"]
