"""Flow-matching models against diffusers' FlowMatchEulerDiscreteScheduler and in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import odesolvers as ods
from odesolvers.models import (
    FLOW_SIGMA_MAX,
    ClassifierFreeGuidance,
    FlowDenoiser,
    Gaussian,
    flow_sigmas,
    flow_times,
)


class Velocity(nn.Module):
    """A small convolution that depends on the time and on a condition; records its times."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 16, 3, padding=1)
            self.last = nn.Conv2d(16, 2, 3, padding=1)
        self.times = []

    def forward(self, z, t, cond=None):
        self.times.append(t)
        h = torch.tanh(2 * self.first(z) + t.to(z.dtype).reshape(-1, 1, 1, 1))
        return 3 * self.last(h if cond is None else h + cond.reshape(-1, 1, 1, 1).to(h.dtype))


def noise(*shape, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def scheduler_run(scheduler, velocity, z):
    """The sampling loop of diffusers' flow pipelines."""
    for t in scheduler.timesteps:
        time = t.expand(z.shape[0]) / scheduler.config.num_train_timesteps
        z = scheduler.step(velocity(z, time), t, z, return_dict=False)[0]
    return z


@pytest.mark.parametrize("method", [ods.FlowEuler(), ods.Euler(), ods.DDIM()])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_the_scheduler_of_diffusers(diffusers, method, shift, device):
    velocity = Velocity().to(device)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(20, device=device)
    z = noise(2, 2, 6, 5, dtype=torch.float32, device=device)
    theirs = scheduler_run(scheduler, velocity, z)
    their_times = torch.stack(velocity.times)
    velocity.times.clear()
    sigmas = flow_sigmas(scheduler.sigmas)
    ours = method.sample(FlowDenoiser(velocity), z * (1 + sigmas[0].item()), sigmas)
    assert relative(theirs, z) > 0.1
    assert relative(ours.x, theirs) < 1e-5
    torch.testing.assert_close(torch.stack(velocity.times), their_times, rtol=2e-7, atol=0)
    assert velocity.times[0].tolist() == [1.0, 1.0], "the network is asked at t = 1 itself"


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("n", [1, 2, 20, 28])
def test_times_are_those_of_the_scheduler(diffusers, n, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    times = flow_times(n, shift=shift)
    torch.testing.assert_close(times.float(), scheduler.sigmas, rtol=1e-6, atol=0)
    assert flow_times(n, shift=shift, start=0.9)[0].item() == pytest.approx(0.9, rel=1e-12)


def test_sd3_transformer(diffusers):
    """The real code path of SD3, guided: its transformer against its pipeline's loop."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()
    nn.init.normal_(transformer.proj_out.weight, std=0.2)

    def velocity(z, t, **extra_args):
        return transformer(hidden_states=z, timestep=1000 * t, return_dict=False, **extra_args)[0]

    def branch(seed):
        g = torch.Generator().manual_seed(seed)
        return {
            "encoder_hidden_states": torch.randn(2, 5, 16, generator=g),
            "pooled_projections": torch.randn(2, 12, generator=g),
        }

    positive, negative = branch(1), branch(2)

    def guided_velocity(z, t):
        towards, away = velocity(z, t, **positive), velocity(z, t, **negative)
        return away + 4.0 * (towards - away)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    z = noise(2, 4, 8, 8, dtype=torch.float32)
    theirs = scheduler_run(scheduler, guided_velocity, z)
    denoiser = ClassifierFreeGuidance(FlowDenoiser(velocity), 4.0)
    sigmas = flow_sigmas(flow_times(8, shift=3.0))
    x = z * (1 + sigmas[0].item())
    extra = {"positive": positive, "negative": negative}
    ours = ods.FlowEuler().sample(denoiser, x, sigmas, extra_args=extra).x
    assert relative(theirs, z) > 0.1
    assert relative(ours, theirs) < 1e-4


def test_flux_transformer(diffusers):
    """The real code path of FLUX: packed latents, dynamic shift, times already in [0, 1]."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    nn.init.normal_(transformer.proj_out.weight, std=0.2)
    conditions = {
        "encoder_hidden_states": noise(2, 5, 16, dtype=torch.float32),
        "pooled_projections": noise(2, 12, dtype=torch.float32),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((2,), 3.5),
    }

    def velocity(z, t, **extra_args):
        return transformer(hidden_states=z, timestep=t, return_dict=False, **extra_args)[0]

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=0.9)
    z = noise(2, 16, 8, dtype=torch.float32)
    theirs = scheduler_run(scheduler, lambda z, t: velocity(z, t, **conditions), z)
    sigmas = flow_sigmas(scheduler.sigmas)
    x = z * (1 + sigmas[0].item())
    ours = ods.FlowEuler().sample(FlowDenoiser(velocity), x, sigmas, extra_args=conditions).x
    assert relative(theirs, z) > 0.1
    assert relative(ours, theirs) < 1e-4

    # Under guidance, as FluxPipeline(true_cfg_scale=...) has it: ids have no batch.
    batched = {k: conditions.pop(k) for k in ("encoder_hidden_states", "pooled_projections")}
    negative = {k: -v for k, v in batched.items()}

    def guided_velocity(z, t):
        towards, away = (velocity(z, t, **b, **conditions) for b in (batched, negative))
        return away + 3.0 * (towards - away)

    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=0.9)
    theirs = scheduler_run(scheduler, guided_velocity, z)
    guided = ClassifierFreeGuidance(FlowDenoiser(velocity), 3.0, shared=["img_ids", "txt_ids"])
    extra = {"positive": batched, "negative": negative, **conditions}
    solution = ods.FlowEuler().sample(guided, x, sigmas, extra_args=extra)
    assert relative(solution.x, theirs) < 1e-4
    guided = ClassifierFreeGuidance(FlowDenoiser(velocity), 3.0)
    with pytest.raises(ValueError, match=r"img_ids must have the batch .* shared=\['img_ids'\]"):
        ods.FlowEuler().sample(guided, x, sigmas, extra_args=extra)


def test_denoiser_and_flow_in_closed_form():
    """Gaussian data N(m, s²): its velocity field, its denoiser and its flow are all known."""
    mean, std = 0.7, 0.4
    closed = Gaussian(mean, std)

    def velocity(z, t):  # E[noise - x0 | z]
        t = t.reshape(-1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        excess = z - (1 - t) * mean
        return t * excess / variance - (mean + (1 - t) * std**2 * excess / variance)

    denoiser = FlowDenoiser(velocity)
    sigma = torch.tensor([0.0, 1e-3, 0.5, 7.0, 1e3], dtype=torch.float64)
    x = noise(5, 3) * (1 + sigma[:, None])
    torch.testing.assert_close(denoiser(x, sigma), closed(x, sigma), rtol=1e-9, atol=1e-9)
    # From t = 1 to data, converging at first order to the exact flow from infinity.
    z, exact = noise(4, 3), mean + std * noise(4, 3)
    errors = []
    for n in (100, 200, 400):
        sigmas = flow_sigmas(torch.linspace(1, 0, n + 1, dtype=torch.float64))
        x = ods.FlowEuler().sample(denoiser, z * (1 + sigmas[0]), sigmas).x
        errors.append((x - exact).abs().max().item())
    assert errors[0] < 0.05
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("method", [ods.FlowEuler(), ods.Euler()])
def test_time_from_noise_to_data(method):
    """As torchcfm and flow_matching sample: torchdiffeq from 0 to 1 over x0 - noise."""
    odeint = pytest.importorskip("torchdiffeq", reason="the solver of these packages").odeint
    velocity = Velocity().double()
    z, times = noise(2, 2, 6, 5), torch.linspace(0, 1, 13, dtype=torch.float64)
    with torch.no_grad():
        theirs = odeint(lambda t, z: velocity(z, t.expand(2)), z, times, method="euler")[-1]
    denoiser, sigmas = FlowDenoiser(velocity, noise_at=0), flow_sigmas(1 - times)
    velocity.times.clear()
    ours = method.sample(denoiser, z * (1 + sigmas[0]), sigmas).x
    assert relative(theirs, z) > 0.1
    assert relative(ours, theirs) < 1e-5
    torch.testing.assert_close(torch.stack(velocity.times)[:, 0], times[:-1], rtol=0, atol=1e-12)
    other = FlowDenoiser(lambda z, t: -velocity(z, 1 - t))  # the same, told by hand
    x, sigma = noise(2, 2, 6, 5), torch.tensor([0.3, 7.0], dtype=torch.float64)
    torch.testing.assert_close(denoiser(x, sigma), other(x, sigma))


def test_gamma_applies_to_the_state_of_the_flow():
    """BDIA over FlowEuler in x is the paper's recurrence written in z, with the model's own step."""
    velocity, gamma = Velocity().double(), 0.6
    t = flow_times(8, shift=3.0)
    sigmas = flow_sigmas(t)
    z = noise(2, 2, 6, 5)
    with torch.no_grad():
        level = [torch.full((2,), time, dtype=torch.float64) for time in t.tolist()]
        older, newer = z, z + (t[1] - t[0]) * velocity(z, level[0])
        for k in range(1, 8):
            v = velocity(newer, level[k])
            ahead, behind = (t[k + 1] - t[k]) * v, (t[k - 1] - t[k]) * v
            following = older - (1 - gamma) * (older - newer) - gamma * behind + ahead
            older, newer = newer, following
    solver = ods.BDIA(ods.FlowEuler(), gamma)
    solution = solver.sample(FlowDenoiser(velocity), z * (1 + sigmas[0]), sigmas)
    assert relative(solution.x, newer) < 1e-5  # t = 1 is 2^-20 away
    other = ods.BDIA(ods.DDIM(), gamma).sample(FlowDenoiser(velocity), z * (1 + sigmas[0]), sigmas)
    assert relative(other.x, newer) > 1e-3, "the state scale makes no difference"


@pytest.mark.parametrize(
    ("method", "start"),
    [
        (ods.FlowEuler(), 1.0),
        (ods.DDIM(), 1.0),
        (ods.DPMSolverPP2S(), 1.0),
        (ods.FlowEuler(), 0.99),
        # In the unscaled state a constant gamma would weigh 2^20 times noise against data.
        (ods.HeunEDM(), 0.99),
        (ods.Midpoint(), 0.99),
        (ods.RK4(), 0.99),
    ],
)
def test_round_trip(method, start, device):
    velocity = Velocity().double().to(device)
    denoiser = FlowDenoiser(velocity)
    sigmas = flow_sigmas(flow_times(10, shift=3.0, start=start))
    z, cond = noise(2, 2, 6, 5, device=device), torch.tensor([0.2, -0.4], device=device)
    x = z * (1 + sigmas[0].item())
    solver = ods.BDIA(method)
    solution = solver.sample(denoiser, x, sigmas, extra_args={"cond": cond})
    back = solver.invert(denoiser, solution.state, sigmas, extra_args={"cond": cond})
    assert relative(back.x, x) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_network_in_another_precision(dtype, device):
    velocity = Velocity().to(device)
    sigmas = flow_sigmas(flow_times(10, shift=3.0))
    x = noise(2, 2, 6, 5, device=device) * (1 + sigmas[0].item())
    solver = ods.BDIA(ods.FlowEuler(), ods.StepRatio(1))
    full = solver.sample(FlowDenoiser(Velocity().double().to(device)), x, sigmas)
    denoiser = FlowDenoiser(velocity.to(dtype), dtype)
    solution = solver.sample(denoiser, x, sigmas)
    assert solution.x.dtype == torch.float64
    assert 0 < relative(solution.x, full.x) < (1e-5 if dtype == torch.float32 else 0.1)
    back = solver.invert(denoiser, solution.state, sigmas)
    assert relative(back.x, x) < 1e-10
    assert all(t.dtype == torch.float32 for t in velocity.times)


def test_noise_keeps_its_digits_at_the_first_level():
    z = noise(1000, dtype=torch.float32)
    factor = 1 + flow_sigmas(flow_times(4))[0].item()
    torch.testing.assert_close(z * factor / factor, z, rtol=2.5e-7, atol=0)


# Bad input


def test_bad_times():
    with pytest.raises(ValueError, match=r"flow times must lie in \[0, 1\], got 1000"):
        flow_sigmas([1000.0, 500.0, 0.0])
    with pytest.raises(ValueError, match="decrease strictly"):
        flow_sigmas([1.0, 0.2, 0.5])
    with pytest.raises(ValueError, match=r"rise from 0: .*invert_sigmas.*1 - scheduler.sigmas"):
        flow_sigmas([0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="not negative"):
        flow_sigmas([1.0, -0.5])
    for options in (
        {"n": 0},
        {"n": 5, "start": 1.5},
        {"n": 5, "start": 0.0},
        {"n": 5, "shift": 0.0},
    ):
        with pytest.raises(ValueError, match="needs n >= 1"):
            flow_times(**options)
    with pytest.raises(ValueError, match=r"start = 0\.001 is not above the lowest time"):
        flow_times(5, start=0.001)


@pytest.mark.parametrize("sigma", [-1.0, 2 * FLOW_SIGMA_MAX, math.inf, math.nan])
def test_sigma_out_of_range(sigma):
    with pytest.raises(ValueError, match="FLOW_SIGMA_MAX = 1048576, which stands for t = 1, got"):
        FlowDenoiser(Velocity())(torch.zeros(1, 2, 4, 4), torch.tensor([sigma]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_sigma_out_of_range_on_a_gpu():
    x = torch.ones(1, 2, 4, 4, device="cuda")
    with pytest.raises(FloatingPointError, match="sigma outside its range"):
        ods.Euler().sample(FlowDenoiser(Velocity().cuda()), x, [2 * FLOW_SIGMA_MAX, 1.0])


def test_bad_networks():
    x, sigma = torch.zeros(1, 2, 4, 4), torch.ones(1)
    with pytest.raises(TypeError, match="velocity must be callable, got str"):
        FlowDenoiser("sd3")
    with pytest.raises(TypeError, match="dtype must be a floating point dtype"):
        FlowDenoiser(Velocity(), torch.int64)
    with pytest.raises(ValueError, match=r"noise_at must be 1 or 0, .* got 0\.5"):
        FlowDenoiser(Velocity(), noise_at=0.5)
    with pytest.raises(TypeError, match=r"a tensor, got tuple; with diffusers, .* return_dict"):
        FlowDenoiser(lambda z, t: (z,))(x, sigma)
    with pytest.raises(ValueError, match="the shape of the state"):
        FlowDenoiser(lambda z, t: z[:, :1])(x, sigma)
