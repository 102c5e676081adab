"""Solvers as schedulers in the pipelines of diffusers."""

import json
import subprocess
import sys

import pytest
import torch

from odesolvers import BDIA, DDIM, DampedStepRatio, FixedPoint, parse
from odesolvers.models import ClassifierFreeGuidance, FlowDenoiser, load_stable_diffusion
from odesolvers.schedulers import InvertibleScheduler

from .tiny_pipelines import FAMILIES, conditions, load_pipeline, noise, run, save_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SOLVER = "BDIA(DDIM(), gamma=DampedStepRatio())"


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="session")
def saved(tmp_path_factory, diffusers):
    root = tmp_path_factory.mktemp("schedulers")
    for family in FAMILIES:
        save_pipeline(root / family, family)
    return root


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pipeline(saved, family):
    return load_pipeline(saved / family)


def give(pipeline, solver=SOLVER, **settings):
    pipeline.scheduler = InvertibleScheduler.from_config(
        pipeline.scheduler.config, solver=solver, **settings
    )


def there_and_back(pipeline, family, latents, **options):
    """Latents of the picture, and those of the noise again."""
    picture = run(pipeline, family, latents, **options)
    pipeline.scheduler = pipeline.scheduler.inverse()
    return picture, run(pipeline, family, picture, **options)


def test_eulers_method_is_the_scheduler_of_diffusers(diffusers, pipeline, family):
    published = {
        "1.x": (diffusers.DDIMScheduler, {"clip_sample": False}),
        "2.x-v": (diffusers.DDIMScheduler, {}),
        "xl": (diffusers.EulerDiscreteScheduler, {}),
        # Under "trailing" it steps to a level beside its next timestep, if the steps do not divide 1000.
        "cogvideox": (diffusers.CogVideoXDDIMScheduler, {"timestep_spacing": "leading"}),
    }
    kind, settings = published.get(family, (diffusers.FlowMatchEulerDiscreteScheduler, {}))
    if family == "wan":  # its UniPC is of a higher order
        settings = {"shift": 3.0}
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
    theirs = run(pipeline, family, noise(family))
    for solver in ("Euler()", "BDIA(DDIM(), gamma=PerStep((0, 0, 0, 0, 0)))"):
        give(pipeline, solver)
        assert relative(run(pipeline, family, noise(family)), theirs) < 1e-5


@pytest.mark.parametrize("solver", [SOLVER, "BDIA(HeunEDM(), gamma=HeunStepRatio())", "EDICT()"])
@pytest.mark.parametrize("family", ["1.x", "2.x-v", "xl"])
def test_a_solver_is_its_own_run_on_stable_diffusion(saved, solver, family):
    model = load_stable_diffusion(saved / family)
    arguments = conditions(family)
    prompt = {
        name: {"encoder_hidden_states": arguments[f"{sign}prompt_embeds"]}
        for name, sign in (("positive", ""), ("negative", "negative_"))
    }
    if family == "xl":
        ids = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])
        for name, sign in (("positive", ""), ("negative", "negative_")):
            pooled = arguments[f"{sign}pooled_prompt_embeds"]
            prompt[name]["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    pipeline = load_pipeline(saved / family)
    give(pipeline, solver)
    mine = run(pipeline, family, noise(family), n=4)
    sigmas = torch.tensor(pipeline.scheduler.state.sigmas)
    x = noise(family).double() * (1 + sigmas[0] ** 2).sqrt()
    guided = ClassifierFreeGuidance(model, 3.0)
    own = parse(solver).sample(guided, x, sigmas, extra_args=prompt).x
    assert relative(mine, own / (1 + sigmas[-1] ** 2).sqrt()) < 1e-5


def test_a_solver_is_its_own_run_under_flow_matching(saved):
    pipeline = load_pipeline(saved / "sd3")
    give(pipeline)
    mine = run(pipeline, "sd3", noise("sd3"), n=6)
    arguments = conditions("sd3")

    def velocity(z, t):
        towards, away = (
            pipeline.transformer(
                z.float(),
                timestep=1000 * t,
                encoder_hidden_states=arguments[f"{sign}prompt_embeds"],
                pooled_projections=arguments[f"{sign}pooled_prompt_embeds"],
                return_dict=False,
            )[0].detach()
            for sign in ("", "negative_")
        )
        return (away + 3.0 * (towards - away)).to(z)

    sigmas = torch.tensor(pipeline.scheduler.state.sigmas, dtype=torch.float64)
    x = noise("sd3").double() * (1 + sigmas[0])
    solver = BDIA(DDIM(), gamma=DampedStepRatio())
    own = solver.sample(FlowDenoiser(velocity, torch.float64), x, sigmas).x
    assert relative(mine, own) < 1e-5


def test_the_noise_comes_back_under_guidance(pipeline, family):
    give(pipeline)
    picture, again = there_and_back(pipeline, family, noise(family))
    assert relative(picture, noise(family)) > 0.1
    assert relative(again, noise(family)) < 1e-7  # the state is in float64
    pipeline.scheduler = pipeline.scheduler.inverse()
    assert relative(run(pipeline, family, again), picture) < 1e-6


@pytest.mark.parametrize("family", ["1.x", "flux"])
def test_the_noise_comes_back_with_a_state_in_float32(pipeline, family):
    give(pipeline, state_dtype="float32")
    _, again = there_and_back(pipeline, family, noise(family))
    assert relative(again, noise(family)) < 1e-4


@pytest.mark.parametrize("family", ["2.x-v", "sd3"])
def test_the_noise_comes_back_to_the_bit_in_fixed_point(pipeline, family):
    bits = 32 if family == "sd3" else 40
    give(pipeline, BDIA(DDIM(), DampedStepRatio(), FixedPoint(bits)))
    picture, again = there_and_back(pipeline, family, noise(family))
    pipeline.scheduler = pipeline.scheduler.inverse()
    assert torch.equal(run(pipeline, family, again), picture)
    first = load_pipeline(pipeline.config._name_or_path)
    give(first, BDIA(DDIM(), DampedStepRatio(), FixedPoint(bits)))
    run(first, family, again)  # from the noise alone
    assert torch.equal(first.scheduler.state.current, pipeline.scheduler.state.current)
    assert torch.equal(first.scheduler.state.partner, pipeline.scheduler.state.partner)


@pytest.mark.parametrize("family", ["xl", "sd3", "wan"])
def test_the_noise_comes_back_in_half_precision(saved, family):
    pipeline = load_pipeline(saved / family, torch.bfloat16)
    give(pipeline)
    z = noise(family)  # which the pipeline keeps in float32 for video
    z = z if family == "wan" else z.bfloat16()
    picture, again = there_and_back(pipeline, family, z, dtype=torch.bfloat16)
    assert picture.dtype == z.dtype
    assert relative(again, z) < 1e-3


@pytest.mark.parametrize("family", ["1.x", "flux"])
def test_lone_latents_are_inverted_and_come_back(pipeline, family):
    photo = 0.3 * noise(family, seed=9)
    give(pipeline, inverted=True)
    code = run(pipeline, family, photo)
    assert 0.3 < code.std() < 3
    pipeline.scheduler = pipeline.scheduler.inverse()
    assert relative(run(pipeline, family, code), photo) < 1e-7


PROCESS = """
import json, sys, torch, diffusers
sys.path.insert(0, sys.argv[2])
from tests.tiny_pipelines import load_pipeline, noise, run
try:
    load_pipeline(sys.argv[1])
    refused = ""
except ValueError as error:
    refused = str(error)
import odesolvers.schedulers
pipeline = load_pipeline(sys.argv[1])
picture = run(pipeline, "xl", noise("xl"), n=4)
solver = repr(pipeline.scheduler.solver)
pipeline.scheduler = pipeline.scheduler.inverse()
again = run(pipeline, "xl", picture, n=4)
miss = float((again - noise("xl")).abs().max())
print(json.dumps({"refused": refused, "solver": solver, "picture": picture.tolist(), "miss": miss}))
"""


def test_a_saved_pipeline_goes_on_in_another_process(saved, tmp_path, pytestconfig):
    pipeline = load_pipeline(saved / "xl")
    give(pipeline, timestep_spacing="trailing")
    picture = run(pipeline, "xl", noise("xl"), n=4)
    pipeline.save_pretrained(tmp_path)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PROCESS,
        str(tmp_path),
        str(pytestconfig.rootpath),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert "odesolvers.schedulers" in found["refused"]  # it must be imported before
    assert found["solver"] == SOLVER
    assert relative(torch.tensor(found["picture"]), picture) < 1e-6
    assert found["miss"] < 1e-6


def test_images_per_prompt_and_their_seeds(saved):
    pipeline = load_pipeline(saved / "1.x")
    give(pipeline)
    z = noise("1.x", n=3)
    _, again = there_and_back(pipeline, "1.x", z, num_images_per_prompt=3)
    assert relative(again, z) < 1e-7
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    give(pipeline, inverted=False)
    arguments = conditions("1.x") | {"num_inference_steps": 4, "output_type": "latent"}
    drawn = pipeline(**arguments, generator=generator, height=16, width=16)[0]
    assert relative(run(pipeline, "1.x", latents, n=4), drawn) < 1e-6


def edits(diffusers, pipeline, task, scheduler):
    """A picture edited by a pipeline that changes latents, or begins in the middle."""
    pipeline.scheduler = scheduler
    arguments = conditions("1.x") | {"num_inference_steps": 5, "output_type": "latent"}
    arguments |= {"generator": torch.Generator().manual_seed(2)}
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    if task == "callback":

        def halve(pipe, step, timestep, tensors):
            return {"latents": tensors["latents"] * (0.5 if step == 1 else 1.0)}

        arguments |= {"latents": noise("1.x"), "callback_on_step_end": halve}
    elif task == "write":

        def write(pipe, step, timestep, tensors):
            tensors["latents"][:, :1] *= 0.5
            return {}

        arguments |= {"latents": noise("1.x"), "callback_on_step_end": write}
    elif task == "img2img":
        pipeline = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components)
        arguments |= {"image": picture, "strength": 0.6}
    else:
        pipeline = diffusers.StableDiffusionInpaintPipeline(**pipeline.components)
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., 8:] = 1
        arguments |= {
            "image": picture,
            "mask_image": mask,
            "strength": 1.0,
            "height": 16,
            "width": 16,
        }
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**arguments)[0]


@pytest.mark.parametrize("task", ["callback", "write", "img2img", "inpaint"])
def test_pipelines_that_edit_do_what_they_do_under_ddim(diffusers, saved, task):
    pipeline = load_pipeline(saved / "1.x")
    config = pipeline.scheduler.config
    ddim = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    theirs = edits(diffusers, pipeline, task, ddim)
    euler = InvertibleScheduler.from_config(config, solver="DDIM()")
    assert relative(edits(diffusers, pipeline, task, euler), theirs) < 1e-5
    refined = InvertibleScheduler.from_config(config)
    assert 1e-4 < relative(edits(diffusers, pipeline, task, refined), theirs) < 0.5


def test_a_pipeline_with_a_controlnet_goes_back(diffusers, saved):
    plain = load_pipeline(saved / "1.x")
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(
        plain.unet, conditioning_embedding_out_channels=(16, 32)
    )
    for weight in net.parameters():  # its last layers are 0 at first
        weight.data += 0.02 * torch.randn_like(weight)
    pipeline = diffusers.StableDiffusionControlNetPipeline(**plain.components, controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    give(pipeline)
    give(plain)
    image = torch.rand(1, 3, 16, 16)
    picture, again = there_and_back(pipeline, "1.x", noise("1.x"), image=image)
    assert relative(again, noise("1.x")) < 1e-7
    assert relative(run(plain, "1.x", noise("1.x")), picture) > 1e-3
    give(pipeline, inverted=False)  # and for the first half of the steps, the last half going up
    half = run(pipeline, "1.x", noise("1.x"), n=6, image=image, control_guidance_end=0.5)
    assert relative(half, picture) > 1e-3
    pipeline.scheduler = pipeline.scheduler.inverse()
    again = run(pipeline, "1.x", half, n=6, image=image, control_guidance_start=0.5 + 1 / 6)
    assert relative(again, noise("1.x")) < 1e-7


def test_a_base_and_a_refiner_hand_over_in_the_middle(diffusers, saved):
    base = load_pipeline(saved / "xl")
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**base.components)
    refiner.set_progress_bar_config(disable=True)
    config = base.scheduler.config

    def chain(make):
        base.scheduler, refiner.scheduler = make(), make()
        middle = run(base, "xl", noise("xl"), n=10, denoising_end=0.6)
        arguments = conditions("xl") | {"num_inference_steps": 10, "output_type": "latent"}
        return middle, refiner(**arguments, image=middle, denoising_start=0.6)[0]

    _, theirs = chain(lambda: diffusers.EulerDiscreteScheduler.from_config(config))
    _, mine = chain(lambda: InvertibleScheduler.from_config(config, solver="Euler()"))
    assert relative(mine, theirs) < 1e-5
    middle, _ = chain(lambda: InvertibleScheduler.from_config(config))
    base.scheduler = base.scheduler.inverse()  # from where it stands
    assert relative(run(base, "xl", middle, n=10), noise("xl")) < 1e-7
