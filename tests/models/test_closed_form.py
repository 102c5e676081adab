"""Closed-form denoisers against brute force, autograd and scipy."""

from __future__ import annotations

import math

import pytest
import torch

from odesolvers.models import (
    Gaussian,
    GaussianMixture,
    IdealDenoiser,
    InDtype,
    closed_form,
    load_digits,
)

from ..problems import gaussian, mixture, noise, reference, relative_error


def levels(sigma: float, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.full((n,), sigma, dtype=dtype)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_gaussian_is_tweedies_formula(sigma: float) -> None:
    """D = x + σ² ∇ log p(x; σ), the score by autograd of torch's own density."""
    model = gaussian()
    x = noise(4, 5, sigma=1 + sigma).requires_grad_()
    spread = (model.std**2 + sigma**2).sqrt()
    density = torch.distributions.Normal(model.mean, spread).log_prob(x).sum()
    (score,) = torch.autograd.grad(density, x)
    expected = x + sigma**2 * score
    torch.testing.assert_close(model(x, levels(sigma, 4)), expected, rtol=1e-9, atol=1e-9)


def test_gaussian_flow_solves_the_ode() -> None:
    x = noise(4, 5, sigma=10.0)
    solved = reference(gaussian(), x, 10.0, 0.1)
    assert relative_error(gaussian().flow(x, 10.0, 0.1), solved) < 1e-10


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_mixture_is_tweedies_formula(sigma: float) -> None:
    means = noise(6, 2, 3, seed=3)
    stds = torch.tensor([0.0, 0.1, 0.5, 1.0, 0.3, 0.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 1.0])
    model = GaussianMixture(means, stds, weights)
    x = noise(5, 2, 3, sigma=1 + sigma).requires_grad_()
    variance = stds**2 + sigma**2
    square = (x.unsqueeze(1) - means).square().sum((2, 3))
    exponents = torch.log(weights) - square / (2 * variance) - 3 * torch.log(variance)
    (score,) = torch.autograd.grad(torch.logsumexp(exponents, 1).sum(), x)
    expected = x + sigma**2 * score
    torch.testing.assert_close(model(x, levels(sigma, 5)), expected, rtol=1e-8, atol=1e-8)


def test_mixture_sample_has_the_moments_of_the_mixture() -> None:
    model = mixture()
    draws = model.sample(20000, torch.Generator().manual_seed(0))
    assert draws.shape == (20000, 3)
    torch.testing.assert_close(draws.mean(0), model.means.mean(0), atol=0.03, rtol=0)


def brute_force(
    images: torch.Tensor, x: torch.Tensor, sigma: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """The posterior mean one state at a time, by differences."""
    rows = []
    for i, state in enumerate(x.double()):
        chosen = images if keep is None else images[keep[i]]
        square = (state - chosen.double()).flatten(1).square().sum(1)
        weight = torch.exp(-(square - square.min()) / (2 * sigma**2))
        rows.append((weight[:, None] * chosen.double().flatten(1)).sum(0) / weight.sum())
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 5.0, 80.0])
def test_ideal_denoiser_is_the_posterior_mean_over_the_digits(
    sigma: float, dtype: torch.dtype, device: torch.device
) -> None:
    images, labels = load_digits()
    model = IdealDenoiser(images, labels).to(device)
    x = (images[:9] + noise(9, 1, 8, 8, sigma=sigma)).to(dtype)
    got = model(x.to(device), levels(sigma, 9, dtype).to(device)).cpu()
    assert got.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 1e-9
    assert relative_error(got, brute_force(images, x, sigma)) < bound
    classes = torch.arange(9) % 3
    got = model(x.to(device), levels(sigma, 9, dtype).to(device), classes.to(device)).cpu()
    keep = classes[:, None] == labels
    assert relative_error(got, brute_force(images, x, sigma, keep)) < bound


def test_ideal_denoiser_between_two_images_is_stable_at_the_lowest_level() -> None:
    """Where the posterior is undecided, a slip of 1e-5 in the exponent would show."""
    images = torch.tensor([[-1.0, 1.0], [1.0, 1.0]])
    tiny = 1e-6
    x = torch.tensor([[tiny, 1.0]], dtype=torch.float64)
    got = IdealDenoiser(images)(x, levels(0.002, 1))
    assert got[0, 0].item() == pytest.approx(math.tanh(tiny / 0.002**2), rel=1e-9)


def test_batches_do_not_mix() -> None:
    images, _ = load_digits()
    model = IdealDenoiser(images)
    x = noise(6, 1, 8, 8, sigma=3.0)
    sigma = torch.tensor([0.002, 0.1, 1.0, 3.0, 10.0, 80.0], dtype=torch.float64)
    together = model(x, sigma)
    for i in range(6):
        alone = model(x[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_digits_are_the_real_ones() -> None:
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert sorted(set(labels.tolist())) == list(range(10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(0.0, -1.0), "std must not be negative"),
        (lambda: GaussianMixture(torch.ones(3)), r"shape \(K, ...\), got torch.float32 \(3,\)"),
        (lambda: GaussianMixture(torch.ones(3, 2, dtype=torch.int64)), "int64"),
        (lambda: GaussianMixture(torch.ones(3, 2), torch.tensor([1.0, -1, 1])), "not be negative"),
        (lambda: GaussianMixture(torch.ones(3, 2), weights=torch.ones(2)), "3 positive numbers"),
        (lambda: IdealDenoiser(torch.ones(3, 2), torch.ones(3)), "labels must be 3 integers"),
        (lambda: mixture()(torch.ones(2, 4), levels(1.0, 2)), r"states of shape \(B, 3\)"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 12]), r"among \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\], got \[0, 12\]"),
        (torch.tensor([0]), r"must be 2 integers.*got torch.int64 \(1,\)"),
        (torch.tensor([0.0, 1.0]), "got torch.float32"),
    ],
)
def test_bad_class_labels(labels: torch.Tensor, message: str) -> None:
    model = IdealDenoiser(*load_digits())
    with pytest.raises(ValueError, match=message):
        model(noise(2, 1, 8, 8), levels(1.0, 2), labels)
    with pytest.raises(ValueError, match="made without"):
        IdealDenoiser(load_digits()[0])(noise(2, 1, 8, 8), levels(1.0, 2), torch.tensor([0, 1]))


def test_where_labels_cannot_be_read_wrong_ones_give_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "values_readable", lambda x: False)
    out = IdealDenoiser(*load_digits())(noise(2, 1, 8, 8), levels(1.0, 2), torch.tensor([3, 12]))
    assert bool(out[0].isfinite().all())
    assert bool(out[1].isnan().all())


def test_another_device_is_named() -> None:
    x, sigma = noise(2, 3).to("meta"), levels(1.0, 2).to("meta")
    for model in (Gaussian(), mixture()):
        with pytest.raises(ValueError, match="x is on meta, the model on cpu"):
            model(x, sigma)
        with pytest.raises(ValueError, match="sigma is on meta"):
            model(noise(2, 3), sigma)
    digits = IdealDenoiser(*load_digits())
    with pytest.raises(ValueError, match="class_labels is on meta"):
        digits(noise(2, 1, 8, 8), levels(1.0, 2), torch.tensor([1, 2], device="meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_dtype(dtype: torch.dtype) -> None:
    seen = []

    def network(x: torch.Tensor, sigma: torch.Tensor, shift: float) -> torch.Tensor:
        seen.append((x.dtype, sigma.dtype))
        return x + shift

    x = noise(2, 3, dtype=torch.float32)
    out = InDtype(network, dtype)(x, levels(1.0, 2, torch.float32), shift=1.0)
    assert out.dtype == torch.float32
    # The contract of a state in `dtype`: sigma is float64 where it is, and float32 otherwise.
    assert seen == [(dtype, torch.float64 if dtype == torch.float64 else torch.float32)]
    torch.testing.assert_close(out, x + 1, rtol=1e-2, atol=1e-2)
    with pytest.raises(TypeError, match="floating point dtype"):
        InDtype(network, torch.int32)
