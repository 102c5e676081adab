"""Pipelines of diffusers as denoisers, against the pipelines themselves under their own schedulers."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers

from odesolvers import BDIA, DDIM, EDICT, DampedStepRatio, FixedPoint, FlowEuler, HeunEDM
from odesolvers.editing import detect, edit, embed, interpolate
from odesolvers.models import ClassifierFreeGuidance, load_stable_diffusion
from odesolvers.pipelines import PipelineDenoiser

from .tiny_pipelines import conditions, load_pipeline, run, save_pipeline

FAMILIES = ("1.x", "2.x-v", "xl", "sd3", "flux")
PLAIN = {
    "1.x": "DDIMScheduler",
    "2.x-v": "DDIMScheduler",
    "xl": "EulerDiscreteScheduler",
    "sd3": "FlowMatchEulerDiscreteScheduler",
    "flux": "FlowMatchEulerDiscreteScheduler",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {family: tmp_path_factory.mktemp("pipelines") for family in FAMILIES}
    for family, folder in found.items():
        save_pipeline(folder, family)
    return found


@pytest.fixture
def opened(folders: dict[str, Any]) -> Any:
    """The denoiser of a family, and the arguments of a call."""

    def find(family: str) -> tuple[PipelineDenoiser, dict[str, Any]]:
        call = {k: v for k, v in conditions(family).items() if k not in ("height", "width")}
        return PipelineDenoiser(load_pipeline(folders[family]), (16, 16)), call

    return find


def start(denoiser: PipelineDenoiser, sigmas: Any, n: int = 1) -> Any:
    return denoiser.noise(n, float(sigmas[0]), torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_latents_are_those_of_the_pipeline_under_its_own_scheduler(
    opened: Any, folders: dict[str, Any], family: str
) -> None:
    denoiser, call = opened(family)
    sigmas = denoiser.sigmas(6, **call)
    x = start(denoiser, sigmas)
    ours = DDIM().sample(denoiser, x, sigmas, extra_args=call).x
    pipeline = load_pipeline(folders[family])
    kind = getattr(diffusers, PLAIN[family])
    settings = {"clip_sample": False} if kind is diffusers.DDIMScheduler else {}
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
    latents = x / ((1 + sigmas[0]) if "Flow" in PLAIN[family] else (1 + sigmas[0] ** 2).sqrt())
    if family == "xl":  # the pipeline multiplies by init_noise_sigma
        pipeline.scheduler.set_timesteps(6)
        latents = x / pipeline.scheduler.init_noise_sigma
    theirs = run(pipeline, family, latents.float())
    ours = ours / (1 + sigmas[-1] ** 2).sqrt()  # the last level of some is that of timestep 0
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_is_exact_and_the_pipeline_is_as_before(opened: Any, family: str) -> None:
    denoiser, call = opened(family)
    before = dict(vars(denoiser.pipeline))
    sigmas = denoiser.sigmas(4, **call)
    x = start(denoiser, sigmas)
    solver = BDIA(DDIM(), DampedStepRatio())
    there = solver.sample(denoiser, x, sigmas, extra_args=call)
    back = solver.invert(denoiser, there.state, sigmas, extra_args=call)
    assert (back.x - x).norm() < 1e-10 * x.norm()
    for name in ("scheduler", "_progress_bar_config"):
        assert vars(denoiser.pipeline)[name] is before[name]
    assert {"encode_prompt", "maybe_free_model_hooks"}.isdisjoint(vars(denoiser.pipeline))


def test_the_outputs_are_those_of_stable_diffusion_here(folders: dict[str, Any]) -> None:
    model = load_stable_diffusion(folders["1.x"])
    denoiser = PipelineDenoiser(model.pipeline)
    assert torch.equal(denoiser.sigmas(5), model.sigmas(5))
    x = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((2,), 1.7)
    prompts = model.encode_prompt("a cat", "a dog")
    guided = ClassifierFreeGuidance(model, 4.0)(x, sigma, **prompts)
    call = denoiser.guided(4.0, {"prompt": "a cat"}, {"prompt": "a dog"})
    assert torch.allclose(denoiser(x, sigma, **call), guided, atol=1e-4)
    plain = denoiser(x, sigma, prompt="a cat")  # unguided unless asked for
    assert torch.allclose(plain, model(x, sigma, **prompts["positive"]), atol=1e-5)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(denoiser.encode(picture), model.encode(picture))
    assert torch.equal(denoiser.decode(x), model.decode(x))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_latents_are_shifted_and_packed_as_the_pipeline_does(opened: Any, family: str) -> None:
    denoiser, _ = opened(family)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = denoiser.encode(picture)
    vae = denoiser.pipeline.vae
    raw = vae.encode(picture).latent_dist.mode()
    plain = (raw - vae.config.shift_factor) * vae.config.scaling_factor
    if family == "flux":
        plain = denoiser.pipeline._pack_latents(plain, 1, 4, 8, 8)
    assert torch.allclose(latents, plain, atol=1e-6)
    shown = denoiser.decode(latents)
    assert torch.allclose(shown, vae.decode(raw).sample, atol=1e-5)
    assert denoiser.noise(2, 1.0, torch.Generator()).shape == (2, *latents.shape[1:])


def test_prompts_are_encoded_once_and_models_stay_until_the_end(folders: dict[str, Any]) -> None:
    pipeline = load_stable_diffusion(folders["1.x"]).pipeline
    calls = {"encode_prompt": 0, "maybe_free_model_hooks": 0}
    for name in calls:
        original = getattr(type(pipeline), name)

        def counted(self: Any, *args: Any, name: str = name, do: Any = original, **kw: Any) -> Any:
            calls[name] += 1
            return do(self, *args, **kw)

        setattr(pipeline, name, types.MethodType(counted, pipeline))
    denoiser = PipelineDenoiser(pipeline)
    sigmas = denoiser.sigmas(5)
    x = start(denoiser, sigmas)
    solution = DDIM().sample(denoiser, x, sigmas, extra_args={"prompt": "a cat"})
    assert calls == {"encode_prompt": 1, "maybe_free_model_hooks": 0}
    denoiser.decode(solution.x)
    assert calls["maybe_free_model_hooks"] == 1


def test_the_applications_take_a_pipeline(folders: dict[str, Any]) -> None:
    pipeline = load_stable_diffusion(folders["xl"]).pipeline
    denoiser = PipelineDenoiser(pipeline)
    sigmas = denoiser.sigmas(6)
    picture = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    a, b = denoiser.encode(picture).split(1)
    solver = BDIA(DDIM(), DampedStepRatio(), FixedPoint())
    a = solver.arithmetic.snap(a)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    options: Any = {"source": {"prompt": "a cat"}, "target": {"prompt": "a dog"}, "guidance": 4.0}
    found = edit(solver, pipeline, a, sigmas, mask=mask, **options)
    assert torch.equal(found.x[..., 4:], a[..., 4:])
    assert (found.x - a)[..., :4].abs().max() > 1e-2
    plain = edit(EDICT(), pipeline, a, sigmas, strength=0.5, **options)
    assert (plain.x - a).abs().max() > 1e-3
    frames = interpolate(solver, pipeline, a, solver.arithmetic.snap(b), sigmas, frames=3)
    assert torch.equal(frames[0].x, a)
    made = embed(solver, denoiser, start(denoiser, sigmas), sigmas, "key")
    assert detect(solver, pipeline, made.x, sigmas, "key").p_value.shape == (1,)


def test_two_stage_methods_run_on_a_pipeline(opened: Any) -> None:
    """At levels between the training levels, where timesteps are fractional."""
    for family, solver in (("1.x", HeunEDM()), ("sd3", BDIA(FlowEuler()))):
        denoiser, call = opened(family)
        sigmas = denoiser.sigmas(4, **call)
        x = start(denoiser, sigmas)
        fine = DDIM().sample(denoiser, x, denoiser.sigmas(100, **call), extra_args=call).x
        coarse = DDIM().sample(denoiser, x, sigmas, extra_args=call).x
        if family == "1.x":
            mid = (sigmas[1] * sigmas[2]).sqrt().float().reshape(1)
            assert denoiser(x.float(), mid, **call).isfinite().all()
        found = solver.sample(denoiser, x, sigmas, extra_args=call).x
        assert (found - fine).norm() < 3 * (coarse - fine).norm()


def test_what_is_no_pipeline_or_size_is_refused(folders: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be one of diffusers with a VAE, got object"):
        PipelineDenoiser(object())
    pipeline = load_stable_diffusion(folders["1.x"]).pipeline
    with pytest.raises(ValueError, match="multiples of 2 pixels, got 16 x 15"):
        PipelineDenoiser(pipeline, (16, 15))
    denoiser = PipelineDenoiser(pipeline)
    with pytest.raises(ValueError, match=r"size 16 x 16 of this denoiser, got \(1, 3, 8, 8\)"):
        denoiser.encode(torch.zeros(1, 3, 8, 8))
    pipeline.scheduler = diffusers.FlowMatchLCMScheduler()
    with pytest.raises(ValueError, match="not known to say how its network is trained"):
        PipelineDenoiser(pipeline)
