"""Solvers as schedulers of diffusers. Import this before loading a pipeline that was saved with one."""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"schedulers need diffusers ({error}): pip install diffusers transformers accelerate",
        name=error.name,
    ) from error

from .invertible import InvertibleScheduler

__all__ = ["InvertibleScheduler"]
