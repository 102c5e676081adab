"""Networks of one's own against k-diffusion, diffusers, papers' formulas and closed forms."""

import math
import types
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import odesolvers as ods
from odesolvers.models import (
    ClassifierFreeGuidance,
    CosineDenoiser,
    DiscreteDenoiser,
    EDMDenoiser,
    FlowDenoiser,
    Gaussian,
    InDtype,
    VPDenoiser,
    init_noise,
)

from .exact import exact_network, levels_of

PREDICTIONS = ["epsilon", "v_prediction", "sample", "score"]
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)


class Network(nn.Module):
    """A small convolution that depends on the time and on a condition; records its times."""

    def __init__(self, period=1000.0, out_channels=2):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 8, 3, padding=1)
            self.last = nn.Conv2d(8, out_channels, 3, padding=1)
        self.period, self.times = period, []

    def forward(self, x, t, cond=None):
        self.times.append(t)
        h = torch.tanh(self.first(x) + (t / self.period).to(x.dtype).reshape(-1, 1, 1, 1))
        return self.last(h if cond is None else h + cond.reshape(-1, 1, 1, 1).to(x.dtype))


def noise(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "learned variance"])
def test_discrete_is_k_diffusions_wrapper(k_diffusion, kind, quantize):
    """At training levels and between them, with conditions; so is the time that the network sees."""
    external, learned = k_diffusion.external, kind == "learned variance"
    network = Network(out_channels=4 if learned else 2).double()
    alphas = ALPHAS.float().double() if learned else ALPHAS  # its precision
    if learned:
        diffusion = types.SimpleNamespace(alphas_cumprod=alphas.numpy())
        theirs = external.OpenAIDenoiser(network, diffusion, quantize=quantize).double()
    else:
        wrapper = {"epsilon": "DiscreteEpsDDPMDenoiser", "v_prediction": "DiscreteVDDPMDenoiser"}
        theirs = getattr(external, wrapper[kind])(network, alphas, quantize=quantize)
    prediction = "epsilon" if learned else kind
    ours = DiscreteDenoiser(
        network, alphas.numpy(), prediction, quantize=quantize, learned_variance=learned
    )
    sigma = torch.cat(
        [theirs.sigmas[[0, 7, 500, 999]].double(), theirs.t_to_sigma(torch.tensor([0.3, 612.4]))]
    )
    x, cond = noise(6, 2, 5, 4) * sigma[:, None, None, None], noise(6)
    expected = theirs(x, sigma, cond=cond)
    torch.testing.assert_close(ours(x, sigma, cond=cond), expected, rtol=1e-4, atol=1e-5)
    their_times, our_times = network.times
    torch.testing.assert_close(our_times.double(), their_times.double(), rtol=0, atol=2e-2)
    assert our_times[:4].tolist() == [0, 7, 500, 999]
    assert our_times.dtype == (torch.int64 if quantize else torch.float64)


@pytest.mark.parametrize("name", ["VDenoiser", "Denoiser"])
def test_continuous_wrappers_of_k_diffusion(k_diffusion, name):
    network = Network(1.0).double()
    if name == "VDenoiser":
        theirs, ours = k_diffusion.external.VDenoiser(network), CosineDenoiser(network)
    else:  # its own network sees sigma
        theirs = k_diffusion.layers.Denoiser(network, sigma_data=0.6)
        ours = EDMDenoiser(lambda z, c, **args: network(z, (4 * c).exp(), **args), 0.6)
    sigma = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64)
    x, cond = noise(4, 2, 5, 4) * sigma[:, None, None, None], noise(4)
    torch.testing.assert_close(ours(x, sigma, cond=cond), theirs(x, sigma, cond=cond))
    levels = ours.sigmas(9)
    assert levels[0].item() == pytest.approx(80.0)
    assert levels[-2].item() == pytest.approx(0.002)
    if name == "VDenoiser":
        steps = theirs.sigma_to_t(levels[:-1]).diff()
        torch.testing.assert_close(steps, steps[:1].expand(8))


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_runs_of_diffusers_schedulers(diffusers, name, kind, spacing):
    """A UNet of diffusers as it is, against the loop of its pipeline."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).eval()
    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(prediction_type=kind, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(10)
    start = noise(2, 3, 8, 8, dtype=torch.float32)
    z = start * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(z, t), t).sample
            z = scheduler.step(output, t, z).prev_sample
    denoiser = DiscreteDenoiser(unet, scheduler.alphas_cumprod, kind)
    sigmas = denoiser.sigmas(10, spacing=spacing)
    assert denoiser.timestep(sigmas[:-1]).tolist() == scheduler.timesteps.tolist()
    kwargs = {"generator": torch.Generator().manual_seed(5)}
    exact = name == "EulerDiscreteScheduler" and spacing == "trailing"  # starts from sigma n
    x = init_noise(start.shape, sigmas, data_std=0.0 if exact else 1.0, **kwargs)
    ours = ods.Euler().sample(denoiser, x, sigmas).x
    assert relative(ours, z) < 1e-4


def linear_level(t, low=0.1, high=20.0):
    """Song et al. 2021, appendix C: the mean coefficient and the deviation of the marginal."""
    log_mean = -0.25 * t**2 * (high - low) - 0.5 * t * low
    return (1 - (2 * log_mean).exp()).sqrt() / log_mean.exp()


discrete_level = levels_of(ALPHAS)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("cls", "arguments", "level"),
    [
        (DiscreteDenoiser, (ALPHAS,), discrete_level),
        (VPDenoiser, (), linear_level),
        (CosineDenoiser, (), lambda t: (math.pi / 2 * t).tan()),
    ],
)
def test_every_prediction_in_closed_form(cls, arguments, level, prediction):
    closed = Gaussian(0.4, 0.3)
    denoiser = cls(exact_network(prediction, closed, level), *arguments, prediction)
    sigma = denoiser.sigmas(6)[:-1]
    x = noise(6, 3) * (1 + sigma[:, None])
    torch.testing.assert_close(denoiser(x, sigma), closed(x, sigma), rtol=1e-6, atol=1e-6)
    wrong = PREDICTIONS[PREDICTIONS.index(prediction) - 1]
    other = cls(exact_network(wrong, closed, level), *arguments, prediction)
    assert relative(other(x, sigma), closed(x, sigma)) > 0.1


@pytest.mark.parametrize("betas", [(0.1, 20.0), (0.5, 12.0), (8.0, 8.0)])
def test_probability_flow_of_song(betas):
    """dz/dt = -β (z + score) / 2, integrated in t with his own formulas, ends where we do."""
    closed, low, high = Gaussian(0.4, 0.3), *betas

    def score(z, t):
        return exact_network("score", closed, lambda t: linear_level(t, low, high))(z, t)

    def drift(z, t):
        times = torch.full(z.shape[:1], t, dtype=torch.float64)
        return -0.5 * (low + t * (high - low)) * (z + score(z, times))

    z, grid = noise(3, 2), np.linspace(1, 0.05, 401)
    start = z
    for t, following in pairwise(grid):
        h = following - t
        middle = z + h / 2 * drift(z, t)
        z = z + h * drift(middle, t + h / 2)
    denoiser = VPDenoiser(score, "score", beta_min=low, beta_max=high, t_min=0.05)
    sigmas = denoiser.sigmas(400)[:-1]
    x = ods.RK4().sample(denoiser, start * (1 + sigmas[0] ** 2).sqrt(), sigmas).x
    assert relative(x / (1 + sigmas[-1] ** 2).sqrt(), z) < 1e-3
    t = torch.linspace(0.05, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(denoiser.time(linear_level(t, low, high)), t)


MAKERS = {
    "discrete": lambda net, dtype=None: DiscreteDenoiser(net, ALPHAS, dtype=dtype),
    "vp": lambda net, dtype=None: VPDenoiser(lambda z, t, **a: net(z, 999 * t, **a), dtype=dtype),
    "cosine": lambda net, dtype=None: CosineDenoiser(net, dtype=dtype),
    "edm": lambda net, dtype=None: EDMDenoiser(net, dtype=dtype),
    "flow": lambda net, dtype=None: FlowDenoiser(net, dtype, noise_at=0),
}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MAKERS)
def test_round_trip_in_every_precision(family, dtype, device):
    network = Network().to(device, dtype or torch.float64)
    denoiser = MAKERS[family](network, dtype)
    sigmas = denoiser.sigmas(8)[: None if family == "flow" else -1]
    x = init_noise((2, 2, 5, 4), sigmas, dtype=torch.float64, device=device)
    extra = {"cond": torch.tensor([0.3, -0.5], device=device)}
    solver = ods.BDIA(ods.FlowEuler() if family == "flow" else ods.DDIM(), ods.StepRatio(1))
    solution = solver.sample(denoiser, x, sigmas, extra_args=extra)
    back = solver.invert(denoiser, solution.state, sigmas, extra_args=extra)
    assert solution.x.dtype == torch.float64
    assert relative(back.x, x) < 1e-10
    assert {t.dtype for t in network.times} == {torch.float32 if dtype else torch.float64}
    half = init_noise((2, 2, 5, 4), sigmas, dtype=torch.bfloat16, device=device)
    levels = sigmas[:1].float().expand(2).to(device)
    assert MAKERS[family](network, dtype or torch.float64)(half, levels).dtype == torch.bfloat16


# The start


def test_init_noise_is_that_of_diffusers_and_k_diffusion(diffusers):
    def draw(sigmas, **options):
        return init_noise((3, 2), sigmas, generator=torch.Generator().manual_seed(1), **options)

    n = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    denoiser = DiscreteDenoiser(Network(), ALPHAS)
    for spacing, std in (("leading", 1.0), ("trailing", 0.0)):
        scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(10)
        sigmas = denoiser.sigmas(10, spacing=spacing)
        expected = n * scheduler.init_noise_sigma
        torch.testing.assert_close(draw(sigmas, data_std=std), expected, rtol=1e-4, atol=0)
    sigmas = denoiser.sigmas(10)
    torch.testing.assert_close(draw(sigmas) / (1 + sigmas[0] ** 2).sqrt().float(), n)
    flow = FlowDenoiser(Network()).sigmas(10)
    torch.testing.assert_close(draw(flow) / (1 + flow[0].float()), n, rtol=2e-6, atol=0)
    assert draw([3.0, 1.0], dtype=torch.float64).dtype == torch.float64


def test_bad_starts():
    with pytest.raises(ValueError, match="data_std must be 0 or more and finite, got -1"):
        init_noise((2, 3), [1.0, 0.0], data_std=-1)
    with pytest.raises(TypeError, match=r"floating point dtype, got torch\.int64"):
        init_noise((2, 3), [1.0, 0.0], dtype=torch.int64)
    with pytest.raises(ValueError, match="decrease strictly"):
        init_noise((2, 3), [0.0, 1.0])


# Bad input


@pytest.mark.parametrize("cls", [VPDenoiser, CosineDenoiser])
@pytest.mark.parametrize(
    ("name", "right"), [("v", "v_prediction"), ("eps", "epsilon"), ("pred_x0", "sample")]
)
def test_names_of_predictions_elsewhere(cls, name, right):
    with pytest.raises(ValueError, match=f"got '{name}', which is '{right}' here"):
        cls(Network(), name)
    with pytest.raises(ValueError, match=r"must be one of 'epsilon', .* got 'other'$"):
        cls(Network(), "other")


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_continuous_levels_of_noise_alone_need_another_prediction(prediction):
    for cls, high, usual in (
        (VPDenoiser, {"beta_max": 99}, {}),
        (CosineDenoiser, {"sigma_max": 1e6}, {"sigma_max": 2.0**16}),
    ):
        with pytest.raises(ValueError, match=rf"zero terminal SNR.*'{prediction}' says nothing"):
            cls(Network(), prediction, **high)
        cls(Network(), prediction, **usual)
        for other in ("v_prediction", "sample"):
            cls(Network(), other, **high)


@pytest.mark.parametrize(
    ("alphas", "words"),
    [
        (1 - ALPHAS, r"falling .* of betas, give torch.cumprod\(1 - betas, 0\)"),
        (torch.linspace(1e-4, 0.02, 1000), "of betas, give"),
        (1 - torch.linspace(1e-4, 0.02, 1000), r"of alphas, give torch.cumprod\(alphas, 0\)"),
        (ALPHAS[:1], r"got shape \(1,\)"),
        (torch.tensor([0.9, float("nan"), 0.1]), "got 3 numbers"),
        (torch.cat([ALPHAS, torch.zeros(1)]), r"zero terminal SNR.*'epsilon' says nothing"),
    ],
)
def test_other_rows_than_alphas_cumprod(alphas, words):
    with pytest.raises(ValueError, match=words):
        DiscreteDenoiser(Network(), alphas)


def test_a_scheduler_in_place_of_its_alphas_cumprod(diffusers):
    scheduler = diffusers.DDPMScheduler()
    for given in (scheduler, scheduler.config):
        with pytest.raises(TypeError, match=r"pass scheduler\.alphas_cumprod"):
            DiscreteDenoiser(Network(), given)


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv1d(2, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype_than_the_state(layer, dtype):
    layer = layer.to(dtype)
    x, sigma = noise(3, 2, 8, dtype=torch.float32), torch.full((3,), 0.5)
    for wrap in (lambda net, **settings: DiscreteDenoiser(net, ALPHAS, **settings), FlowDenoiser):
        with pytest.raises(TypeError, match=r"met two dtypes .* its input z is torch\.float32"):
            wrap(lambda z, t: layer(z))(x, sigma)
        assert wrap(lambda z, t: layer(z), dtype=dtype)(x, sigma).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int64])
def test_dtypes_that_are_none(dtype):
    with pytest.raises(TypeError, match="dtype must be a floating point dtype"):
        FlowDenoiser(Network(), dtype)


def test_zero_terminal_snr_of_v_prediction():
    alphas = torch.cat([ALPHAS, torch.zeros(1)])
    assert DiscreteDenoiser(Network(), alphas, "v_prediction").sigma_max == pytest.approx(2.0**20)


@pytest.mark.parametrize("family", ["discrete", "vp", "cosine", "edm"])
def test_levels_out_of_range(family):
    denoiser, x = MAKERS[family](Network()), torch.zeros(1, 2, 4, 4)
    for level in (0.5 * denoiser.sigma_min, 2 * denoiser.sigma_max, math.nan):
        with pytest.raises(ValueError, match="within the model's training levels"):
            denoiser(x, torch.tensor([level]))


def test_bad_networks():
    x, sigma = torch.zeros(1, 2, 4, 4), torch.ones(1)
    with pytest.raises(TypeError, match="network must be callable, got str"):
        DiscreteDenoiser("unet", ALPHAS)
    with pytest.raises(TypeError, match=r"floating point dtype, got torch\.int64"):
        EDMDenoiser(Network(), dtype=torch.int64)
    with pytest.raises(TypeError, match="must return a tensor, got tuple"):
        DiscreteDenoiser(lambda z, t: (z,), ALPHAS)(x, sigma)
    with pytest.raises(ValueError, match="learned_variance=True of DiscreteDenoiser leaves it out"):
        DiscreteDenoiser(Network(out_channels=4), ALPHAS)(x, sigma)
    with pytest.raises(ValueError, match="leave out learned_variance=True"):
        DiscreteDenoiser(Network(), ALPHAS, learned_variance=True)(x, sigma)
    with pytest.raises(ValueError, match=r"must have the shape of the state, \(1, 2, 4, 4\)"):
        CosineDenoiser(lambda z, t: z[:, :1])(x, sigma)
    with pytest.raises(ValueError, match=r"sum between 2 and 100.*beta_max = 0\.02"):
        VPDenoiser(Network(), beta_min=1e-4, beta_max=0.02)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        CosineDenoiser(Network(), sigma_min=3.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="sigma_data must be above 0"):
        EDMDenoiser(Network(), 0.0)


@pytest.mark.parametrize("wrap", ["", "guided", "in float64"])
@pytest.mark.parametrize(
    ("cls", "arguments", "level", "spacing"),
    [
        (DiscreteDenoiser, (ALPHAS,), discrete_level, {"spacing": "leading"}),
        (DiscreteDenoiser, (ALPHAS,), discrete_level, {"spacing": "trailing"}),
        (VPDenoiser, (), linear_level, {}),
        (CosineDenoiser, (), lambda t: (math.pi / 2 * t).tan(), {}),
    ],
)
def test_calibration_stays_within_the_levels_of_the_network(cls, arguments, level, spacing, wrap):
    """Also of the last step, to 0; the target is refined there down to the lowest level."""
    network = cls(exact_network("epsilon", Gaussian(0.0, 0.5), level), *arguments)
    denoiser, extra = network, None
    if wrap == "guided":
        denoiser, extra = ClassifierFreeGuidance(network, 1.0), {"positive": {}}
    elif wrap == "in float64":
        denoiser = InDtype(network, torch.float64)
    sigmas = network.sigmas(6, **spacing)
    x = noise(4, 8) * sigmas[0]
    rule = ods.calibrate(denoiser, x, sigmas, extra_args=extra, max_runs=20)
    solution = ods.BDIA(ods.Euler(), rule).sample(denoiser, x, sigmas, extra_args=extra)
    plain = ods.Euler().sample(denoiser, x, sigmas, extra_args=extra)
    right = Gaussian(0.0, 0.5).flow(x, sigmas[0].item(), 0.0)
    assert relative(solution.x, right) < relative(plain.x, right)
