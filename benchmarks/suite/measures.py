"""Measures of the suite: distances to the fine solution, to data and to normal noise."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from scipy.stats import kstest
from torch import Tensor

from ..common import Denoiser


def percentile(errors: Tensor, of: float) -> float:
    """The smallest error that a fraction `of` of all states does not exceed."""
    rank = math.ceil(of * len(errors)) - 1
    return float(errors.sort().values[max(rank, 0)])


def relative_distance(x: Tensor, y: Tensor) -> float:
    """``|x - y| / |y|`` over all states."""
    x, y = x.double(), y.double()
    distance = float((x - y).norm() / y.norm())
    return math.inf if math.isnan(distance) else distance


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians with the moments of two sets of points.

    ``|m - n|² + tr(A + B - 2 (A^½ B A^½)^½)`` (Dowson and Landau 1982), for points ``(N, ...)``.
    Infinite where a point is not finite.
    """
    x, y = x.double().flatten(1), y.double().flatten(1)
    if not bool(x.isfinite().all()):
        return math.inf
    means, covariances = [], []
    for points in (x, y):
        means.append(points.mean(dim=0))
        covariances.append(torch.cov(points.T))
    A, B = covariances
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    squared = (means[0] - means[1]).square().sum() + A.trace() + B.trace() - 2 * cross
    return float(squared.clamp(min=0))


def normality(code: Tensor) -> float:
    """Kolmogorov-Smirnov statistic of all elements against N(0, 1): between 0, normal, and 1."""
    values = code.double().flatten()
    if not bool(values.isfinite().all()):
        return 1.0
    return float(kstest(values.numpy(), "norm").statistic)


class Meter:
    """Wraps a denoiser, and counts its calls and the seconds they take."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.calls = 0
        self.seconds = 0.0

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        begin = time.perf_counter()
        denoised = self.denoiser(x, sigma, **extra_args)
        self.seconds += time.perf_counter() - begin
        self.calls += 1
        return denoised
