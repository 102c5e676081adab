"""Autoencoders in half precision, against diffusers' own pipelines."""

import pytest
import torch

from odesolvers.models import StableDiffusion, load_stable_diffusion

from .pipelines import noise, relative


def image():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


def half_pipeline(folder, diffusers, *, large, upcast=True):
    """A pipeline in float16 whose VAE has activations beyond its range, as that of XL."""
    found = diffusers.StableDiffusionXLPipeline.from_pretrained(folder).to(torch.float16)
    found.set_progress_bar_config(disable=True)
    found.vae.register_to_config(force_upcast=upcast)
    if large:
        for part in (found.vae.decoder, found.vae.encoder):
            for block in part.mid_block.resnets:
                block.conv2.bias.data.fill_(6e4)
    return found


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers, about its own upcast_vae
def test_float16_with_force_upcast_is_float32(folders, diffusers, large):
    pipeline = half_pipeline(folders["xl"], diffusers, large=large)
    model = StableDiffusion(pipeline)
    before = {k: v.clone() for k, v in model.vae.state_dict().items()}
    z = noise(1)
    latents, decoded = model.encode(image()), model.decode(z)
    assert latents.isfinite().all()
    assert decoded.isfinite().all()
    for key, value in model.vae.state_dict().items():  # converted for the calls alone
        assert value.dtype == torch.float16
        assert torch.equal(value, before[key])
    theirs = pipeline("a", num_inference_steps=1, output_type="pt", latents=z.half()).images
    assert theirs.isfinite().all()
    vae = pipeline.vae.float()
    factor = vae.config.scaling_factor
    with torch.no_grad():
        torch.testing.assert_close(decoded, vae.decode(z / factor).sample)
        mode = vae.encode(image()).latent_dist.mode() * factor
    torch.testing.assert_close(latents, mode)


def test_an_overflow_is_no_black_picture(folders, diffusers):
    """Without the setting the same VAE gives NaN: the test above can fail."""
    model = StableDiffusion(half_pipeline(folders["xl"], diffusers, large=True, upcast=False))
    with pytest.raises(
        FloatingPointError, match=r"VAE's decode .* torch.float16.* vae.to\(torch.flo"
    ):
        model.decode(noise(1))
    with pytest.raises(FloatingPointError, match="VAE's encode returned NaN or infinity"):
        model.encode(image())
    model.vae.to(torch.float32)  # the advice
    assert model.decode(noise(1)).isfinite().all()
    assert model.encode(image()).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(model, value):
    latents = noise(2)
    latents[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="latents must be finite"):
        model.decode(latents)


def test_an_outer_autocast_does_not_undo_it(folders, diffusers):
    model = StableDiffusion(half_pipeline(folders["xl"], diffusers, large=True))
    whole = load_stable_diffusion(folders["xl"])
    expected = model.decode(noise(1)), model.encode(image()), whole.decode(noise(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.decode(noise(1)), model.encode(image()), whole.decode(noise(1))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_reach_the_latents(folders, diffusers):
    model = StableDiffusion(half_pipeline(folders["xl"], diffusers, large=False))
    z = noise(1).requires_grad_()
    model.decode(z).square().sum().backward()
    model.vae.float()
    again = noise(1).requires_grad_()
    model.decode(again).square().sum().backward()
    torch.testing.assert_close(z.grad, again.grad)


@pytest.mark.filterwarnings("ignore")  # of accelerate, about hooks
def test_offloaded_in_float16(folders, diffusers):
    import accelerate

    pipeline = half_pipeline(folders["xl"], diffusers, large=True)
    expected = StableDiffusion(pipeline).decode(noise(1))
    accelerate.cpu_offload_with_hook(pipeline.vae, torch.device("cpu"))
    torch.testing.assert_close(StableDiffusion(pipeline).decode(noise(1)), expected)
    assert pipeline.vae.dtype == torch.float16


def test_bfloat16_is_left_as_it_is(folders, diffusers):
    """Its range is that of float32, and the pipelines of diffusers decode in it, too."""
    pipeline = half_pipeline(folders["xl"], diffusers, large=False).to(torch.bfloat16)
    model = StableDiffusion(pipeline)
    z = noise(1)
    with torch.no_grad():
        theirs = pipeline.vae.decode((z / pipeline.vae.config.scaling_factor).bfloat16()).sample
    torch.testing.assert_close(model.decode(z), theirs.float())


def test_tiny_autoencoders_have_no_posterior(folders, diffusers):
    """`AutoencoderTiny` (TAESD) in place of the VAE, as in many fast pipelines."""
    pipeline = load_stable_diffusion(folders["1.x"]).pipeline
    options = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    options |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    pipeline.vae = diffusers.AutoencoderTiny(**options)
    model = StableDiffusion(pipeline)
    latents = model.encode(image())
    with torch.no_grad():
        torch.testing.assert_close(latents, pipeline.vae.encode(image()).latents)
        torch.testing.assert_close(model.decode(latents), pipeline.vae.decode(latents).sample)
    assert relative(model.encode(-image()), latents) > 0.01
