"""Concatenation of the arguments of several denoiser calls into one call with a larger batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def join(branches: list[Any], n: int, name: str, shared: Collection[str] = ()) -> Any:
    """Join the values of one argument in several branches, each for a batch of `n` states.

    Tensors are concatenated along their first dimension, also inside mappings and lists. That
    dimension is `n`, or 1 for a value shared by all states. Anything else must be equal in all
    branches, and so must the arguments whose names are in `shared`: these have no batch and are
    passed on as they are. Error messages call the argument `name`.

    Raises:
        TypeError, ValueError: if the branches cannot be joined.
    """
    first = branches[0]
    if name in shared:
        if not all(_equal(b, first) for b in branches):
            raise ValueError(
                f"{name} is shared by both branches, but is given with two values: give it once, beside "
                "the branches"
            )
        return first
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
                    f"{tuple(branch.shape)}; a condition without a batch is named by "
                    f"ClassifierFreeGuidance(..., shared=[{name!r}])"
                )
            if branch.shape[1:] != first.shape[1:] or branch.dtype != first.dtype:
                raise ValueError(
                    f"{name} must have one form in both branches, got {first.dtype} "
                    f"{tuple(first.shape)} and {branch.dtype} {tuple(branch.shape)}: pad the shorter "
                    "prompt to the tokens of the longer, or convert one to the dtype of the other"
                )
        return torch.cat([b.expand(n, *b.shape[1:]) for b in branches])
    if isinstance(first, Mapping):
        if any(not isinstance(b, Mapping) or b.keys() != first.keys() for b in branches):
            raise ValueError(
                f"{name or 'the two branches'} must have the same keys in both branches, got "
                + " and ".join(str(sorted(b) if isinstance(b, Mapping) else b) for b in branches)
            )
        inner = f"{name}." if name else ""
        return {k: join([b[k] for b in branches], n, f"{inner}{k}", shared) for k in first}
    if isinstance(first, list | tuple):
        if any(type(b) is not type(first) or len(b) != len(first) for b in branches):
            raise ValueError(f"{name} must have the same length in both branches")
        items = zip(*branches, strict=True)
        return [join(list(item), n, f"{name}[{k}]", shared) for k, item in enumerate(items)]
    if any(b != first for b in branches):
        raise ValueError(
            f"{name} is {' and '.join(map(repr, branches))} in the two branches: only tensors can differ"
        )
    return first


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are equal, also of tensors and of mappings and lists of them."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b)
