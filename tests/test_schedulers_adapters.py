"""Pipelines with LoRA or IP-Adapter, and modular ones, go to noise and back by the scheduler."""

import pytest
import torch

from odesolvers.schedulers import InvertibleScheduler

from .tiny_pipelines import load_pipeline, noise, run, save_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, diffusers):
    path = tmp_path_factory.mktemp("adapters") / "1.x"
    save_pipeline(path, "1.x")
    return path


@pytest.fixture
def load(folder):
    def load():
        pipeline = load_pipeline(folder)
        pipeline.scheduler = InvertibleScheduler.from_config(pipeline.scheduler.config)
        return pipeline

    return load


def check_there_and_back(pipeline, plain, **options):
    picture = run(pipeline, "1.x", noise("1.x"), **options)
    assert relative(picture, run(plain, "1.x", noise("1.x"))) > 1e-2  # the adapter counts
    pipeline.scheduler = pipeline.scheduler.inverse()
    assert relative(run(pipeline, "1.x", picture, **options), noise("1.x")) < 1e-7


def test_lora(diffusers, load, tmp_path):
    peft = pytest.importorskip("peft")
    trained = load()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    trained.unet.add_adapter(peft.LoraConfig(r=4, init_lora_weights=True, target_modules=targets))
    torch.manual_seed(0)
    for name, weight in trained.unet.named_parameters():
        if "lora_B" in name:  # 0 before a training
            weight.data.normal_(std=0.2)
    layers = peft.get_peft_model_state_dict(trained.unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipeline = load()
    pipeline.load_lora_weights(tmp_path)
    check_there_and_back(pipeline, load(), cross_attention_kwargs={"scale": 0.9})


def test_ip_adapter(load):
    pipeline = load()
    unet, width = pipeline.unet, pipeline.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(6)

    def weight(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    projection = {
        "proj.weight": weight(4 * width, 16),  # four tokens of an embedding of 16
        "proj.bias": weight(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    crossed = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    adapter = {
        f"{2 * k + 1}.to_{part}_ip.weight": weight(layer.to_k.out_features, width)
        for k, name in enumerate(crossed)
        for layer in [unet.get_submodule(name.removesuffix(".processor"))]
        for part in "kv"
    }
    weights = {"image_proj": projection, "ip_adapter": adapter}
    pipeline.load_ip_adapter([weights], subfolder="", weight_name="", image_encoder_folder=None)
    picture = [torch.randn(2, 1, 16, generator=generator)]  # without and with it, for guidance
    check_there_and_back(pipeline, load(), ip_adapter_image_embeds=picture)


def test_modular_pipeline(diffusers, tmp_path):
    save_pipeline(tmp_path, "xl")
    plain = load_pipeline(tmp_path)
    plain.scheduler = InvertibleScheduler.from_config(plain.scheduler.config)
    blocks = diffusers.modular_pipelines.StableDiffusionXLAutoBlocks()
    pipeline = blocks.init_pipeline()
    parts = {name: part for name, part in plain.components.items() if part is not None}
    known = {name: part for name, part in parts.items() if name in pipeline.components}
    pipeline.update_components(**known)
    pipeline.guider.guidance_scale = 3.0
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "num_inference_steps": 6, "height": 16, "width": 16}
    z = noise("xl")
    expected = plain(**call, guidance_scale=3.0, latents=z, output_type="latent").images
    picture = pipeline(**call, latents=z, output="latents")
    assert relative(picture, expected) < 1e-5
    pipeline.update_components(scheduler=pipeline.scheduler.inverse())
    assert relative(pipeline(**call, latents=picture, output="latents"), z) < 1e-7
