"""k-diffusion's wrappers, unchanged, under every solver; parity with k-diffusion's own samplers."""

import sys
import types

import pytest
import torch
from torch import nn

import odesolvers as ods
from odesolvers.models import InDtype, import_k_diffusion, wrapper_sigmas

needs_k_diffusion = pytest.mark.usefixtures("k_diffusion")
WRAPPERS = [
    "DiscreteEpsDDPMDenoiser",
    "DiscreteVDDPMDenoiser",
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "OpenAIDenoiser",
    "VDenoiser",
    "Denoiser",
]
DISCRETE = WRAPPERS[:5]
METHODS = [
    ods.Euler(),
    ods.DDIM(),
    ods.FlowEuler(),
    ods.HeunEDM(),
    ods.Midpoint(),
    ods.DPMSolverPP2S(),
    ods.RK3(),
    ods.RK4(),
]
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)


class Network(nn.Module):
    """A small convolution that depends on the time and on a condition."""

    def __init__(self, period, out_channels=2):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 8, 3, padding=1)
            self.last = nn.Conv2d(8, out_channels, 3, padding=1)
        self.period = period

    def forward(self, x, t, cond=None):
        t = (t.to(x.dtype) / self.period).reshape(-1, 1, 1, 1)
        h = torch.tanh(self.first(x) + t)
        return self.last(h if cond is None else h + cond.reshape(-1, 1, 1, 1).to(x.dtype))


class CompVisModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Network(1000)
        self.register_buffer("alphas_cumprod", ALPHAS.clone())

    def apply_model(self, x, t, cond=None):
        return self.network(x, t, cond)


def make(name, quantize=False):
    K = import_k_diffusion()
    if name == "Denoiser":
        return K.layers.Denoiser(Network(80.0), sigma_data=0.5)
    cls = getattr(K.external, name)
    if name == "VDenoiser":
        return cls(Network(1.0))
    if name.startswith("CompVis"):
        return cls(CompVisModel(), quantize=quantize)
    if name == "OpenAIDenoiser":  # half of the channels are learned variances
        diffusion = types.SimpleNamespace(alphas_cumprod=ALPHAS.numpy())
        return cls(Network(1000, out_channels=4), diffusion, quantize=quantize)
    return cls(Network(1000), ALPHAS, quantize=quantize)


def arguments(name, device="cpu"):
    """CompVisVDenoiser has no default for its condition; the others take one all the same."""
    return {"cond": torch.tensor([0.3, -0.5], device=device)}


def noise(sigmas, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, generator=generator)
    return (x * sigmas[0]).to(device, dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@needs_k_diffusion
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_round_trip_under_every_solver(name, quantize, device):
    if quantize and name not in DISCRETE:
        pytest.skip("a continuous wrapper")
    wrapper = make(name, quantize).double().to(device)
    sigmas = wrapper_sigmas(wrapper, 8)[:-1]
    x, extra = noise(sigmas, device=device), arguments(name, device)
    for method in METHODS:
        base = method.sample(wrapper, x, sigmas, extra_args=extra)
        assert base.x.shape == x.shape
        assert base.x.isfinite().all()
        solver = ods.BDIA(method, gamma=ods.StepRatio(1))
        solution = solver.sample(wrapper, x, sigmas, extra_args=extra)
        assert relative(solution.x, base.x) > 0, "BDIA did nothing"
        back = solver.invert(wrapper, solution.state, sigmas, extra_args=extra)
        assert relative(back.x, x) < 1e-10, (method, relative(back.x, x))


@needs_k_diffusion
@pytest.mark.parametrize("name", WRAPPERS)
def test_equal_to_the_samplers_of_k_diffusion(name):
    K = import_k_diffusion()
    wrapper = make(name).double()
    sigmas = wrapper_sigmas(wrapper, 9)
    x, extra = noise(sigmas), arguments(name)
    for method, sampler in [
        (ods.Euler(), K.sampling.sample_euler),
        (ods.HeunEDM(), K.sampling.sample_heun),
        (ods.Midpoint(), K.sampling.sample_dpm_2),
    ]:
        with torch.no_grad():
            theirs = sampler(wrapper, x, sigmas, extra_args=extra, disable=True)
        ours = method.sample(wrapper, x, sigmas, extra_args=extra).x
        assert relative(ours, theirs) < 1e-10, sampler.__name__


@needs_k_diffusion
@pytest.mark.parametrize("name", WRAPPERS)
def test_full_precision_state_over_float32_network(name):
    wrapper = make(name).float()
    if name in DISCRETE:
        assert wrapper.sigmas.dtype == torch.float32
    sigmas = wrapper_sigmas(wrapper, 8)[:-1]
    x, extra = noise(sigmas), arguments(name)
    solver = ods.BDIA(ods.DDIM(), gamma=ods.StepRatio(1))
    with pytest.raises((TypeError, RuntimeError)):  # never mixed silently
        solver.sample(wrapper, x, sigmas, extra_args=extra)
    denoiser = InDtype(wrapper, torch.float32)
    solution = solver.sample(denoiser, x, sigmas, extra_args=extra)
    assert solution.x.dtype == torch.float64
    back = solver.invert(denoiser, solution.state, sigmas, extra_args=extra)
    assert relative(back.x, x) < 1e-10


@needs_k_diffusion
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DiscreteEpsDDPMDenoiser", "VDenoiser", "Denoiser"])
def test_half_precision_network_inside_a_wrapper(name, dtype, device):
    wrapper = make(name).double().to(device)
    sigmas = wrapper_sigmas(wrapper, 8)[:-1]
    x, extra = noise(sigmas, device=device), arguments(name, device)
    solver = ods.BDIA(ods.DDIM(), gamma=ods.StepRatio(1))
    full = solver.sample(wrapper, x, sigmas, extra_args=extra)
    wrapper.inner_model = InDtype(wrapper.inner_model.to(dtype), dtype)
    solution = solver.sample(wrapper, x, sigmas, extra_args=extra)
    assert 0 < relative(solution.x, full.x) < 0.1
    back = solver.invert(wrapper, solution.state, sigmas, extra_args=extra)
    assert relative(back.x, x) < 1e-10, "the state keeps its own precision"


@needs_k_diffusion
@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_grids(name):
    wrapper = make(name)
    torch.testing.assert_close(
        wrapper_sigmas(wrapper, 20), wrapper.get_sigmas(20).double(), rtol=0, atol=0
    )
    torch.testing.assert_close(
        wrapper_sigmas(wrapper), wrapper.get_sigmas().double(), rtol=0, atol=0
    )
    levels = wrapper_sigmas(wrapper, 20, quantize=True)
    training = wrapper.sigmas.double()
    assert len(levels) == 21
    assert levels[0] == training[-1]
    assert levels[-2] == training[0]
    assert levels[-1] == 0
    assert torch.isin(levels[:-1], training).all()
    index = torch.searchsorted(training, levels[:-1].contiguous())
    assert (index - torch.linspace(999, 0, 20)).abs().max() <= 0.5, "not the nearest timesteps"
    assert not torch.isin(wrapper_sigmas(wrapper, 20)[1:-2], training).all()
    # Made quantised, a wrapper has the quantised grid, and asks its network at exactly these times.
    quantised = make(name, quantize=True)
    torch.testing.assert_close(wrapper_sigmas(quantised, 20), levels, rtol=0, atol=0)
    times = quantised.sigma_to_t(levels[:-1].to(quantised.sigmas.dtype))
    torch.testing.assert_close(
        quantised.sigmas[times].double(), levels[:-1], rtol=0, atol=0, check_dtype=False
    )


@needs_k_diffusion
def test_continuous_grids():
    karras = ods.karras_sigmas(12, 0.01, 50.0)
    found = wrapper_sigmas(make("Denoiser"), 12, sigma_min=0.01, sigma_max=50.0)
    torch.testing.assert_close(found, karras, rtol=0, atol=0)
    wrapper = make("VDenoiser")
    sigmas = wrapper_sigmas(wrapper, 12, sigma_min=0.01, sigma_max=50.0)
    times = wrapper.sigma_to_t(sigmas[:-1])
    torch.testing.assert_close(times.diff(), times.diff()[:1].expand(11))
    torch.testing.assert_close(wrapper.t_to_sigma(times), sigmas[:-1])
    assert sigmas[0].item() == pytest.approx(50.0)
    assert sigmas[-2].item() == pytest.approx(0.01)
    assert sigmas[-1] == 0


@needs_k_diffusion
def test_bad_input():
    discrete, continuous = make("DiscreteEpsDDPMDenoiser"), make("VDenoiser")
    with pytest.raises(TypeError, match=r"one of k-diffusion's, got Network"):
        wrapper_sigmas(Network(1.0), 10)
    with pytest.raises(ValueError, match=r"between 1 and the 1000 training timesteps, got 1001"):
        wrapper_sigmas(discrete, 1001)
    with pytest.raises(ValueError, match=r"leave out sigma_min"):
        wrapper_sigmas(discrete, 10, sigma_min=0.1)
    with pytest.raises(ValueError, match=r"give n, and leave out quantize"):
        wrapper_sigmas(continuous)
    with pytest.raises(ValueError, match=r"0 < sigma_min < sigma_max"):
        wrapper_sigmas(continuous, 10, sigma_min=2.0, sigma_max=1.0)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "k_diffusion", None)
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    with pytest.raises(ImportError, match=r"pip install k-diffusion 'setuptools<82'"):
        import_k_diffusion()
    with pytest.raises(ImportError, match=r"pip install k-diffusion 'setuptools<82'"):
        wrapper_sigmas(object(), 10)
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(ImportError, match=r"needs numpy<2, .*: use Python 3\.10 to 3\.12"):
        import_k_diffusion()


def test_missing_pkg_resources(monkeypatch, tmp_path):
    (tmp_path / "k_diffusion.py").write_text("import pkg_resources\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "k_diffusion", raising=False)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    with pytest.raises(ImportError, match=r"pip install 'setuptools<82'"):
        import_k_diffusion()


def test_an_infinite_level_is_refused(k_diffusion):
    alphas = torch.cat([torch.linspace(0.99, 0.01, 9), torch.zeros(1)])
    wrapper = k_diffusion.external.DiscreteEpsDDPMDenoiser(lambda x, t: x, alphas, quantize=False)
    for n in (None, 4):
        with pytest.raises(ValueError, match=r"zero terminal SNR.*clamp\(min=2\*\*-40\)"):
            wrapper_sigmas(wrapper, n)
    clamped = alphas.double().clamp(min=2**-40)
    wrapper = k_diffusion.external.DiscreteEpsDDPMDenoiser(lambda x, t: x, clamped, quantize=False)
    assert wrapper_sigmas(wrapper, 4)[0] == pytest.approx(2.0**20)
