"""Shared by the benchmarks: problems, their fine solutions, errors, timing, tables."""

from .errors import (
    CACHE,
    Code,
    Reference,
    Upwards,
    encoding_error,
    invertible,
    median_error,
    one_step,
    reference,
    relative_errors,
    sampling_error,
    solve,
)
from .files import claimed, locked, save
from .problems import (
    DIGITS,
    EXACT_PROBLEMS,
    LETTERS,
    MIXTURE,
    PROBLEMS,
    Denoiser,
    Problem,
)
from .tables import DOCS, IMAGES, TABLES, shown, table, write
from .timing import Watch, bare, k_diffusion, machine, seconds

__all__ = [
    "CACHE",
    "DIGITS",
    "DOCS",
    "EXACT_PROBLEMS",
    "IMAGES",
    "LETTERS",
    "MIXTURE",
    "PROBLEMS",
    "TABLES",
    "Code",
    "Denoiser",
    "Problem",
    "Reference",
    "Upwards",
    "Watch",
    "bare",
    "claimed",
    "encoding_error",
    "invertible",
    "k_diffusion",
    "locked",
    "machine",
    "median_error",
    "one_step",
    "reference",
    "relative_errors",
    "sampling_error",
    "save",
    "seconds",
    "shown",
    "solve",
    "table",
    "write",
]
