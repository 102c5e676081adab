"""The EDM networks as denoisers: numbers of the published code, labels, ranges, round trips."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odesolvers import BDIA, HeunEDM, StepRatio, karras_sigmas
from odesolvers.grids import Grid
from odesolvers.models.edm import EDMPrecond, VEPrecond, VPPrecond, load_edm, preconditioning

from .edm_files import ARCHITECTURES, PRECONDITIONERS, published, tiny, wave

# What the published code (github.com/NVlabs/edm, training/networks.py) returns for the same
# parameters and input, on two images at sigma 0.3 and 20 with labels 2 and 1: the root mean square
# of each output, and one pixel of each.
GOLDEN = {
    ("ddpmpp", "VPPrecond", 3): (0.5724603, 28.0036, -0.4919161, 37.7384),
    ("ddpmpp", "VEPrecond", 3): (0.5220075, 17.77477, -0.552627, 6.386423),
    ("ddpmpp", "iDDPMPrecond", 3): (0.5724555, 27.72244, -0.4950977, 37.02045),
    ("ddpmpp", "EDMPrecond", 0): (0.3964602, 0.5642073, -0.2398146, -0.455232),
    ("ddpmpp", "EDMPrecond", 3): (0.3974951, 0.5716223, -0.2181582, -0.4686935),
    ("ncsnpp", "VPPrecond", 3): (0.5454901, 26.61281, -0.8978757, 33.86053),
    ("ncsnpp", "VEPrecond", 3): (0.5015154, 17.86195, -0.1568561, 6.061902),
    ("ncsnpp", "iDDPMPrecond", 3): (0.5475684, 26.18751, -0.9041485, 33.85631),
    ("ncsnpp", "EDMPrecond", 0): (0.3913137, 0.5335213, -0.08166495, -0.3950454),
    ("ncsnpp", "EDMPrecond", 3): (0.3895519, 0.5329645, -0.09305078, -0.3948417),
    ("skips", "VPPrecond", 3): (0.5600371, 32.40581, -0.5129631, 22.72979),
    ("skips", "VEPrecond", 3): (0.5682958, 25.1587, -0.567388, 20.37611),
    ("skips", "iDDPMPrecond", 3): (0.5603096, 32.34854, -0.5248413, 22.39488),
    ("skips", "EDMPrecond", 0): (0.4512509, 0.6673918, -0.6476281, -0.09215294),
    ("skips", "EDMPrecond", 3): (0.4533152, 0.6747401, -0.6068352, -0.1074658),
    ("adm", "VPPrecond", 3): (0.6881316, 39.01124, -0.6601326, 34.08207),
    ("adm", "VEPrecond", 3): (0.7434054, 29.94211, -0.3996751, 19.65041),
    ("adm", "iDDPMPrecond", 3): (0.6801945, 39.01064, -0.6485951, 34.08279),
    ("adm", "EDMPrecond", 0): (0.6112376, 0.9219642, -0.1949656, -0.4111564),
    ("adm", "EDMPrecond", 3): (0.6001281, 0.9243336, -0.2621146, -0.4035034),
}

# The same outside of the ranges: the two levels first.
OUTSIDE = {
    ("ddpmpp", "VPPrecond"): (
        4.0019906e-4,
        258.683837890625,
        0.3527986,
        359.0734,
        -0.4513578,
        480.2213,
    ),
    ("adm", "VPPrecond"): (
        4.0019906e-4,
        258.683837890625,
        0.3526846,
        504.1354,
        -0.4516151,
        439.2281,
    ),
    ("ddpmpp", "VEPrecond"): (0.008, 170.0, 0.3520399, 148.1532, -0.4531683, 105.0304),
    ("adm", "VEPrecond"): (0.008, 170.0, 0.3545311, 242.3765, -0.4483477, 361.1374),
    ("ddpmpp", "iDDPMPrecond"): (
        0.0025701651,
        34494.98828125,
        0.3530579,
        48186.94,
        -0.4509225,
        64874.67,
    ),
    ("adm", "iDDPMPrecond"): (
        0.0025701651,
        34494.98828125,
        0.352341,
        67364.42,
        -0.4525278,
        59098.23,
    ),
}


def golden_input() -> tuple[Tensor, Tensor, Tensor]:
    sigma = torch.tensor([0.3, 20.0])
    spread = (sigma.double() ** 2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
    return (wave("x", (2, 3, 8, 8)) * spread).float(), sigma, torch.tensor([2, 1])


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edm") / "unconditional.pkl"
    path.write_bytes(published(tiny()))
    return path


@pytest.mark.parametrize(("architecture", "precond", "classes"), GOLDEN)
def test_agrees_with_the_published_code(
    architecture: str, precond: str, classes: int, device: torch.device
) -> None:
    denoiser = tiny(architecture, precond, classes).to(device)
    x, sigma, labels = (t.to(device) for t in golden_input())
    out = denoiser(x, sigma, labels if classes else None)
    assert out.dtype == torch.float32
    assert out.shape == x.shape
    first, second = out.double().cpu()
    rms = first.square().mean().sqrt().item(), second.square().mean().sqrt().item()
    got = torch.tensor([*rms, first[1, 5, 3].item(), second[2, 0, 7].item()])
    expected = torch.tensor(GOLDEN[architecture, precond, classes])
    # float32 on another device orders its sums differently, and may use TF32 in convolutions.
    tolerance = 1e-5 if device.type == "cpu" else 3e-3
    assert bool(((got - expected).abs() / torch.tensor([*rms, *rms]) < tolerance).all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precond", PRECONDITIONERS)
def test_a_float64_state_and_network_confirm_float32(architecture: str, precond: str) -> None:
    denoiser = tiny(architecture, precond, 3)
    x, sigma, labels = golden_input()
    single = denoiser(x, sigma, labels)
    denoiser.model.compute_in(torch.float64)
    double = denoiser(x.double(), sigma.double(), labels)
    assert double.dtype == torch.float64
    assert (double - single).norm() < 1e-4 * double.norm()
    mixed = denoiser(x, sigma, labels)
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)], ids=str
)
def test_half_precision_networks_stay_close(
    architecture: str, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    x, sigma, labels = (t.to(device) for t in golden_input())
    denoiser = tiny(architecture, "VPPrecond", 3).to(device)
    exact = denoiser(x, sigma, labels)
    denoiser.model.compute_in(dtype)
    assert denoiser.model.dtype == dtype
    rough = denoiser(x, sigma, labels)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < tolerance * exact.norm()


def test_half_by_hand_is_refused_where_it_would_destroy_the_embedding() -> None:
    x, sigma, _ = golden_input()
    with pytest.raises(TypeError, match=r"load_edm\(\.\.\., dtype="):
        tiny("ncsnpp").half()(x, sigma)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_labels_as_numbers_or_one_hot_and_they_matter(
    architecture: str, device: torch.device
) -> None:
    denoiser = tiny(architecture, classes=3).to(device)
    x, sigma, labels = (t.to(device) for t in golden_input())
    out = denoiser(x, sigma, class_labels=labels)
    hot = torch.eye(3, device=device)[labels]
    assert torch.equal(denoiser(x, sigma, class_labels=hot), out)
    assert torch.equal(denoiser(x, sigma, class_labels=hot.double()), out)
    none = denoiser(x, sigma)
    assert torch.equal(denoiser(x, sigma, class_labels=torch.zeros_like(hot)), none)
    for other in (none, denoiser(x, sigma, class_labels=labels - 1)):
        assert (other - out).norm() > 1e-3 * out.norm()


def test_label_dropout_acts_in_training_only() -> None:
    denoiser = tiny(classes=3, label_dropout=1.0, dropout=0.0)
    x, sigma, labels = golden_input()
    with_label, without = denoiser(x, sigma, labels), denoiser(x, sigma)
    assert torch.equal(denoiser.train()(x, sigma, labels), without)
    assert not torch.equal(with_label, without)


def test_augmentation_labels_matter_where_the_network_has_them() -> None:
    x, sigma, _ = golden_input()
    for architecture in ("ddpmpp", "adm"):
        denoiser = tiny(architecture, augment_dim=9)
        plain = denoiser(x, sigma)
        augmented = denoiser(x, sigma, augment_labels=wave("augment", (2, 9)).float())
        assert (augmented - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("precond", PRECONDITIONERS)
def test_the_models_grid_stays_in_its_range(precond: str) -> None:
    denoiser = tiny(precond=precond)
    sigmas = denoiser.get_sigmas(18)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == 19
    assert sigmas[-1] == 0
    assert Grid.of(sigmas).steps == 18
    x, _, _ = golden_input()
    for sigma in (sigmas[0], sigmas[-2]):
        assert bool(denoiser(x, sigma.expand(2)).isfinite().all())
    assert torch.equal(denoiser.round_sigma(sigmas[:-1]), sigmas[:-1])


def test_grids_of_the_paper() -> None:
    assert torch.equal(tiny(precond="EDMPrecond").get_sigmas(18), karras_sigmas(18))
    assert torch.equal(tiny(precond="VPPrecond").get_sigmas(18), karras_sigmas(18))
    assert torch.equal(tiny(precond="VEPrecond").get_sigmas(18), karras_sigmas(18, 0.02, 80.0))
    # Karras et al. 2022, table 1: sigma_min and sigma_max of the pre-trained models.
    vp, iddpm = tiny(precond="VPPrecond"), tiny(precond="iDDPMPrecond")
    assert vp.sigma_max == pytest.approx(math.sqrt(math.expm1(19.9 / 2 + 0.1)))
    assert iddpm.sigma_min == pytest.approx(0.0064, abs=1e-4)
    assert iddpm.sigma_max == pytest.approx(20291, rel=1e-2)


def test_levels_of_improved_ddpm() -> None:
    denoiser = tiny(precond="iDDPMPrecond")
    u = denoiser.get_buffer("u")
    assert bool((u.diff() < 0).all())
    between = torch.lerp(u[300], u[301], 0.4)
    assert denoiser.round_sigma(between) == u[300]
    # Levels that the network does not tell apart are refused rather than visited twice.
    with pytest.raises(ValueError, match="ask for fewer"):
        denoiser.get_sigmas(900)


# Half-precision outputs jump where rounding moves the state across one of their own roundings. A
# float32 state under gains that amplify meets that too often to promise anything: see docs/edm.md.
ROUND_TRIPS = [
    (architecture, network, dtype, gamma)
    for architecture, network in (
        ("ddpmpp", torch.float32),
        ("ddpmpp", torch.float64),
        ("ddpmpp", torch.bfloat16),
        ("ddpmpp", torch.float16),
        ("ncsnpp", torch.bfloat16),
        ("adm", torch.float32),
    )
    for dtype in (torch.float32, torch.float64)
    for gamma in (1.0, StepRatio(2))
    if dtype == torch.float64 or network.itemsize >= 4 or gamma == 1.0
]


@pytest.mark.parametrize(("architecture", "network", "dtype", "gamma"), ROUND_TRIPS, ids=str)
def test_round_trip(
    architecture: str,
    network: torch.dtype,
    dtype: torch.dtype,
    gamma: float | StepRatio,
    device: torch.device,
) -> None:
    denoiser = tiny(architecture, classes=3).to(device)
    denoiser.model.compute_in(network)
    sigmas = karras_sigmas(8, 0.5, 80.0)
    x = (80 * wave("start", (2, 3, 8, 8))).to(device, dtype)
    solver = BDIA(HeunEDM("both"), gamma)
    labels = {"class_labels": torch.tensor([0, 2], device=device)}
    there = solver.sample(denoiser, x, sigmas, extra_args=labels)
    assert there.x.std() < 4
    back = solver.invert(denoiser, there.state, sigmas, extra_args=labels)
    error = (back.x - x).abs().max().item() / 80
    # Each inverted step multiplies what rounding has done by 1 / g_i.
    growth = 1.0
    if isinstance(gamma, StepRatio):
        growth = math.prod(1 / g for g in gamma.weights(Grid.of(sigmas), HeunEDM().scale))
    assert error < max(20.0, growth) * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("x", "sigma", "message"),
    [
        (torch.zeros(2, 1, 8, 8), torch.ones(2), r"\(B, 3, 8, 8\), got \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 16, 16), torch.ones(2), r"\(B, 3, 8, 8\), got \(2, 3, 16, 16\)"),
        (torch.zeros(3, 8, 8), torch.ones(3), r"\(B, 3, 8, 8\), got \(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), torch.ones(0), "got"),
        (torch.zeros(2, 3, 8, 8), torch.ones(()), r"shape \(2,\), got \(\)"),
        (torch.zeros(2, 3, 8, 8), torch.ones(3), r"shape \(2,\), got \(3,\)"),
        (
            torch.zeros(2, 3, 8, 8),
            torch.tensor([1.0, 0.0]),
            "sigma must be above 0 and finite, got (0|nan)",
        ),
        (
            torch.zeros(2, 3, 8, 8),
            torch.tensor([1.0, math.nan]),
            "sigma must be above 0 and finite, got (0|nan)",
        ),
        (torch.zeros(2, 3, 8, 8, device="meta"), torch.ones(2), "network is on cpu, x on meta"),
    ],
)
def test_wrong_images_and_levels(x: Tensor, sigma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(x, sigma)


def test_wrong_dtypes() -> None:
    with pytest.raises(TypeError, match="floating point"):
        tiny()(torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.ones(1))
    with pytest.raises(TypeError, match="floating point"):
        tiny()(torch.zeros(1, 3, 8, 8), torch.ones(1, dtype=torch.int64))


@pytest.mark.parametrize(("architecture", "precond"), OUTSIDE)
def test_levels_outside_the_range_are_evaluated_as_in_the_published_code(
    architecture: str, precond: str, recwarn: pytest.WarningsRecorder, device: torch.device
) -> None:
    denoiser = tiny(architecture, precond, 3).to(device)
    low, high, *expected = OUTSIDE[architecture, precond]
    sigma = torch.tensor([low, high])
    assert low < denoiser.sigma_min < denoiser.sigma_max < high
    spread = (sigma.double() ** 2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
    x, labels = (wave("x", (2, 3, 8, 8)) * spread).float(), torch.tensor([2, 1])
    out = denoiser(x.to(device), sigma.to(device), labels.to(device)).double().cpu()
    assert len(recwarn) == (device.type == "cpu")
    rms = out.square().mean((1, 2, 3)).sqrt()
    got = torch.stack([*rms, out[0, 1, 5, 3], out[1, 2, 0, 7]])
    tolerance = 1e-5 if device.type == "cpu" else 3e-3
    error = (got - torch.tensor(expected)).abs() / rms.repeat(2)
    assert bool((error < tolerance).all())


@pytest.mark.parametrize("precond", [VPPrecond, VEPrecond])
def test_levels_outside_the_range_are_warned_of_once(precond: type) -> None:
    denoiser = tiny(precond=precond.__name__)
    x = torch.zeros(1, 3, 8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for k in range(1, 5):
            denoiser(x, torch.tensor([denoiser.sigma_min / (k + 1)]))
            denoiser(x, torch.tensor([denoiser.sigma_max * (k + 1)]))
    assert len(caught) == 1
    assert "trained on sigma from" in str(caught[0].message)
    assert "get_sigmas(n) gives a grid within" in str(caught[0].message)
    for sigma in (denoiser.sigma_min, denoiser.sigma_max):
        denoiser(x, torch.tensor([sigma]))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 3]), ValueError, r"between 0 and 2, got \[0, 3\]"),
        (torch.tensor([0, -1]), ValueError, "between 0 and 2"),
        (torch.tensor([0]), ValueError, r"shape \(2,\), got \(1,\)"),
        (torch.tensor([[0], [1]]), ValueError, r"shape \(2,\), got \(2, 1\)"),
        (torch.eye(2), ValueError, r"one-hot, shape \(2, 3\), got \(2, 2\)"),
        (torch.tensor([0.0, 1.0]), ValueError, "one-hot"),
        (torch.full((2, 3), math.nan), ValueError, "not finite"),
        (torch.tensor([True, False]), TypeError, r"int64 or floating point, got torch\.bool"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "class_labels are on meta"),
    ],
)
def test_wrong_labels(labels: Tensor, error: type[Exception], message: str) -> None:
    x, sigma, _ = golden_input()
    with pytest.raises(error, match=message):
        tiny(classes=3)(x, sigma, class_labels=labels)


def test_labels_for_an_unconditional_network() -> None:
    x, sigma, labels = golden_input()
    with pytest.raises(ValueError, match="unconditional"):
        tiny()(x, sigma, class_labels=labels)


def test_where_values_cannot_be_read_a_run_still_fails(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(preconditioning, "values_readable", lambda x: False)
    x, sigma, labels = (t.to(device) for t in golden_input())
    denoiser = tiny(precond="VEPrecond", classes=3).to(device)
    out = denoiser(x, torch.where(sigma > 1, -1.0, sigma), labels)
    assert bool(out[0].isfinite().all())
    assert bool(out[1].isnan().all())
    out = denoiser(x, sigma, torch.tensor([3, 1], device=device))
    assert bool(out[0].isnan().all())
    assert torch.equal(out[1], denoiser(x, sigma, labels)[1])
    labels = torch.tensor([3, 1], device=device)
    with pytest.raises(FloatingPointError, match=r"sigma = 1"):
        HeunEDM().sample(denoiser, x, [1.0, 0.5], extra_args={"class_labels": labels})


def test_nan_is_reported_with_its_level(unconditional: Path, device: torch.device) -> None:
    denoiser = load_edm(unconditional, device=device)
    x, sigma, _ = (t.to(device) for t in golden_input())
    assert bool(denoiser(x * math.nan, sigma).isnan().all())
    with pytest.raises(FloatingPointError, match="not finite"):
        HeunEDM().sample(denoiser, x * math.nan, [80.0, 1.0])


def test_the_same_bits_every_time_and_gradients_of_the_input(
    unconditional: Path, device: torch.device
) -> None:
    denoiser = load_edm(unconditional, device=device)
    x, sigma, _ = (t.to(device) for t in golden_input())
    assert torch.equal(denoiser(x, sigma), denoiser(x, sigma))
    assert isinstance(denoiser, EDMPrecond)
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    x.requires_grad_()
    denoiser(x, sigma).sum().backward()
    assert x.grad is not None
