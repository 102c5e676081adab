"""The bundled network of emoji: its labels, its drawings and what it learned."""

import sys

import pytest
import torch

from odesolvers import BDIA, Euler, FixedPoint, StepRatio, karras_sigmas
from odesolvers.models import ClassifierFreeGuidance
from odesolvers.models.emoji import (
    STYLES,
    TONES,
    emoji_drawings,
    emoji_groups,
    emoji_labels,
    load_emoji,
    training_log,
)

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])]


@pytest.fixture(scope="module")
def emoji():
    return load_emoji()


@pytest.fixture(scope="module")
def drawings():
    return emoji_drawings()


def noised(images, sigma):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return images + sigma * noise, torch.full(images.shape[:1], sigma)


class TestLabels:
    def test_a_row_names_style_group_subgroup_and_tone(self):
        row = emoji_labels("hand-fingers-open", "twemoji", "dark")[0]
        style, group, subgroup, tone = row.split(
            [2, len(emoji_groups()), len(row) - 8 - len(emoji_groups()), 6]
        )
        assert STYLES[int(style.argmax())] == "twemoji"
        assert list(emoji_groups())[int(group.argmax())] == "People & Body"
        listed = sorted(name for names in emoji_groups().values() for name in names)
        assert listed[int(subgroup.argmax())] == "hand-fingers-open"
        assert TONES[int(tone.argmax())] == "dark"
        assert row.sum() == 4

    def test_one_row_for_each_subgroup(self):
        rows = emoji_labels(["cat-face", "food-fruit"])
        assert torch.equal(rows, torch.cat([emoji_labels("cat-face"), emoji_labels("food-fruit")]))

    def test_two_tones_share(self):
        both = emoji_labels("family", tone=["light", "dark"])
        each = [emoji_labels("family", tone=tone) for tone in ("light", "dark")]
        assert torch.equal(both, (each[0] + each[1]) / 2)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("cat",), "unknown subgroup cat; known: .*cat-face"),
            (("cat-face", "google"), "unknown style google; known: noto, twemoji"),
            (("cat-face", "noto", "grey"), "unknown skin tone grey; known: none, light"),
            ((["cat-face", "x" * 500],), "unknown subgroup x{80};"),
        ],
    )
    def test_unknown_names(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            emoji_labels(*arguments)

    def test_the_labels_of_the_drawings_are_these(self, drawings):
        at = drawings.names.index("PINEAPPLE")
        for k, style in enumerate(STYLES):
            assert torch.equal(drawings.labels[2 * at + k], emoji_labels("food-fruit", style)[0])


class TestDrawings:
    def test_pairs_of_which_one_was_withheld(self, drawings):
        images, labels, names, withheld = drawings
        assert images.shape == (2 * len(names), 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.aminmax() == (-1, 1)
        assert torch.equal(withheld.view(-1, 2).sum(1), torch.ones(len(names)))
        assert torch.equal(labels[::2, 2:], labels[1::2, 2:])  # but for the style
        assert (images[::2] - images[1::2]).flatten(1).norm(dim=1).min() > 1


class TestNetwork:
    def test_it_is_loaded_with_torch_and_numpy_alone(self, monkeypatch):
        for name in ("PIL", "safetensors", "matplotlib", "sklearn", "diffusers", "k_diffusion"):
            monkeypatch.setitem(sys.modules, name, None)
        assert load_emoji().training is False
        assert emoji_drawings().images.isfinite().all()

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_returns_the_dtype_and_device_of_the_state(self, emoji, drawings, dtype, device):
        network = emoji if device == "cpu" else load_emoji(device)
        x = torch.randn(2, 3, 32, 32, dtype=dtype, device=device)
        sigma = torch.ones(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        out = network(x, sigma.to(device), drawings.labels[:2].to(device))
        assert (out.dtype, out.shape, out.device) == (dtype, x.shape, x.device)
        assert out.isfinite().all()

    def test_no_labels_are_zeros(self, emoji, drawings):
        x, sigma = noised(drawings.images[:2], 1.0)
        none = emoji(x, sigma)
        assert torch.equal(none, emoji(x, sigma, torch.zeros_like(drawings.labels[:2])))
        assert not torch.equal(none, emoji(x, sigma, drawings.labels[:2]))

    def test_a_half_precision_network_is_close(self, emoji, drawings):
        x, sigma = noised(drawings.images[:4], 0.5)
        exact = emoji(x, sigma, drawings.labels[:4])
        rough = load_emoji(dtype=torch.bfloat16)(x, sigma, drawings.labels[:4])
        assert rough.dtype == torch.float32
        assert 0 < (rough - exact).abs().mean() < 0.05
        with pytest.raises(TypeError, match=r"floating point dtype, got torch\.int64"):
            load_emoji(dtype=torch.int64)

    @pytest.mark.parametrize("shape", [(2, 114), (3, 115), (115,)])
    def test_labels_of_another_shape_are_refused(self, emoji, shape):
        with pytest.raises(ValueError, match=r"\(2, 115\).*got"):
            emoji(torch.zeros(2, 3, 32, 32), torch.ones(2), torch.zeros(shape))

    def test_it_denoises_drawings_it_has_not_seen(self, emoji, drawings):
        images, labels = drawings.images[drawings.withheld], drawings.labels[drawings.withheld]
        for sigma, most in ((0.1, 0.06), (0.5, 0.16), (2.0, 0.4)):
            x, sigmas = noised(images, sigma)
            error = (emoji(x, sigmas, labels) - images).square().mean().sqrt()
            assert error < most

    def test_labels_help_where_shapes_are_decided(self, emoji, drawings):
        x, sigmas = noised(drawings.images, 8.0)
        right, none, wrong = (
            (emoji(x, sigmas, labels) - drawings.images).square().mean()
            for labels in (drawings.labels, None, drawings.labels.roll(20, 0))
        )
        assert right < 0.92 * none
        assert right < 0.82 * wrong

    def test_round_trips(self, emoji, drawings):
        images, labels = drawings.images[:4], drawings.labels[:4]
        arguments = {"class_labels": labels}
        sigmas = karras_sigmas(8, sigma_min=0.02, append_zero=False)
        for solver, tolerance in (
            (BDIA(Euler(), StepRatio(1)), 5e-4),
            (BDIA(Euler(), StepRatio(1), FixedPoint()), 0),
        ):
            code = solver.invert(emoji, images, sigmas, extra_args=arguments)
            back = solver.sample(emoji, code.state, sigmas, extra_args=arguments).x
            assert (back - images).abs().max() <= tolerance

    def test_guidance_without_labels_is_zeros(self, emoji, drawings):
        x, sigmas = noised(drawings.images[:2], 1.0)
        guided = ClassifierFreeGuidance(emoji, 3.0)
        labels = drawings.labels[:2]
        out = guided(
            x,
            sigmas,
            positive={"class_labels": labels},
            negative={"class_labels": torch.zeros_like(labels)},
        )
        given, none = emoji(x, sigmas, labels), emoji(x, sigmas)
        assert torch.allclose(out, none + 3 * (given - none), atol=1e-5)

    def test_the_log_tells_its_training(self):
        log = training_log()
        assert log["history"][-1]["held_out"] < log["history"][0]["held_out"]
        assert log["settings"]["preconditioning"] == "edm"
