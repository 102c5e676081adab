"""Concatenation of the arguments of several denoiser calls into one call with a larger batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def join(branches: list[Any], n: int, name: str) -> Any:
    """Join the values of one argument in several branches, each for a batch of `n` states.

    Tensors are concatenated along their first dimension, also inside mappings and lists. That
    dimension is `n`, or 1 for a value shared by all states. Anything else must be equal in all
    branches. Error messages call the argument `name`.

    Raises:
        TypeError, ValueError: if the branches cannot be joined.
    """
    first = branches[0]
    if any(isinstance(b, Tensor) != isinstance(first, Tensor) for b in branches):
        kinds = " and ".join(type(b).__name__ for b in branches)
        raise TypeError(
            f"{name} is {kinds} in the two branches, which one call cannot mix: give the negative "
            "branch a tensor too, such as the label or the embedding that stands for no condition"
        )
    if isinstance(first, Tensor):
        for branch in branches:
            if branch.ndim == 0 or branch.shape[0] not in (1, n):
                raise ValueError(
                    f"{name} must have the batch of x, {n}, or 1 as its first dimension, got shape "
                    f"{tuple(branch.shape)}"
                )
            if branch.shape[1:] != first.shape[1:] or branch.dtype != first.dtype:
                raise ValueError(
                    f"{name} must have one form in both branches, got {first.dtype} "
                    f"{tuple(first.shape)} and {branch.dtype} {tuple(branch.shape)}"
                )
        return torch.cat([b.expand(n, *b.shape[1:]) for b in branches])
    if isinstance(first, Mapping):
        if any(not isinstance(b, Mapping) or b.keys() != first.keys() for b in branches):
            raise ValueError(
                f"{name or 'the two branches'} must have the same keys in both branches, got "
                + " and ".join(str(sorted(b) if isinstance(b, Mapping) else b) for b in branches)
            )
        inner = f"{name}." if name else ""
        return {k: join([b[k] for b in branches], n, f"{inner}{k}") for k in first}
    if isinstance(first, list | tuple):
        if any(type(b) is not type(first) or len(b) != len(first) for b in branches):
            raise ValueError(f"{name} must have the same length in both branches")
        items = zip(*branches, strict=True)
        return [join(list(item), n, f"{name}[{k}]") for k, item in enumerate(items)]
    if any(b != first for b in branches):
        raise ValueError(
            f"{name} is {' and '.join(map(repr, branches))} in the two branches: only tensors can differ"
        )
    return first
