"""Numbers, rows of numbers and texts as callers and files give them."""

from __future__ import annotations

import math
import operator
import traceback
from numbers import Real

import numpy as np
import torch
from torch import Tensor


def refuse_gradient(name: str, value: object) -> None:
    """Raises a ValueError for a tensor whose gradient would be lost, for it is read as numbers.

    Under `torch.no_grad()` nothing asks for one. Looks into lists and tuples too.
    """
    if isinstance(value, list | tuple):
        for item in value:
            refuse_gradient(name, item)
    elif isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, which would be lost, for it is read as a number: pass "
            "tensor.detach(); a condition of the denoiser, such as the scale of a guidance, has its "
            "gradient in extra_args"
        )


def number(name: str, value: object) -> float:
    """A real number of any kind, or a tensor of no dimension, as a float; or an error."""
    refuse_gradient(name, value)
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:  # of an integer
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def count(name: str, value: object) -> int:
    """An integer of any kind as an int, or a TypeError."""
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {value!r}")


def shown(text: str, most: int = 200) -> str:
    """At most so many characters of a text that may come from a file, all of them printable."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable_cause(error: Exception) -> Exception | None:
    """An exception as the cause of another, unless a traceback of it would print control characters."""
    text = "".join(traceback.format_exception(error))
    return error if all(c.isprintable() or c in "\n\t" for c in text) else None


def widened(x: Tensor) -> Tensor:
    """`x` in float64; on the CPU if its device, as Apple's GPUs, has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def row(name: str, values: object, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor, an array or a sequence of real numbers as a tensor on the CPU, without gradients."""
    refuse_gradient(name, values)
    if isinstance(values, list | tuple):
        values = [v.item() if isinstance(v, np.ndarray) and v.ndim == 0 else v for v in values]
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "iuf":
            raise TypeError(f"{name} must be real numbers, got an array of {values.dtype}")
        # torch has no negative strides or foreign orders of bytes, and warns of what is read-only.
        values = np.array(values, values.dtype.newbyteorder("="), order="C")
    if isinstance(values, Tensor) and (values.is_complex() or values.dtype is torch.bool):
        raise TypeError(f"{name} must be real numbers, got a tensor of {values.dtype}")
    try:
        return torch.as_tensor(values, dtype=dtype, device="cpu").detach()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be one row of numbers: {error}") from None
