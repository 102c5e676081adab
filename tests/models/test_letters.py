"""The bundled letters: their pictures, their network and what it learned."""

import json
import sys

import numpy as np
import pytest
import torch

from odesolvers import BDIA, Euler, HeunEDM, StepRatio, karras_sigmas
from odesolvers.models import InDtype, load_letters, random_letters, render_letter
from odesolvers.models.letters import LETTERS, Style, network as letters_network
from odesolvers.models.letters.data import FONTS, random_colours, render_mask
from odesolvers.models.letters.network import WEIGHTS, training_log

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])]


@pytest.fixture(scope="module")
def letters():
    return load_letters()


@pytest.fixture(scope="module")
def held_out():
    return random_letters(64, seed=1)


@pytest.fixture(scope="module")
def principal_axes():
    data = random_letters(1000, seed=9)[0].flatten(1)
    _, deviations, axes = torch.linalg.svd(data - data.mean(0), full_matrices=False)
    return data.mean(0), deviations**2 / len(data), axes.T


def noised(images, sigma, seed=0):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return images + sigma * noise, torch.full(images.shape[:1], sigma)


class TestPictures:
    def test_form(self):
        images, labels = random_letters(5, seed=3)
        assert images.shape == (5, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.min() >= -1
        assert images.max() <= 1
        assert labels.dtype == torch.int64

    def test_the_same_seed_gives_the_same_letters(self):
        first, again, other = (random_letters(4, seed)[0] for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_a_letter_and_its_label_are_the_same(self):
        assert torch.equal(render_letter("C"), render_letter(2))

    def test_all_letters_and_all_fonts_differ(self):
        letters = {render_mask(k, Style()).tobytes() for k in range(len(LETTERS))}
        fonts = {render_mask(17, Style(font=k)).tobytes() for k in range(len(FONTS))}
        assert len(letters) == len(LETTERS)
        assert len(fonts) == len(FONTS)

    def test_colour_does_not_depend_on_the_letter(self):
        style = Style(ink=(1.0, 0.5, 0.0), paper=(0.0, 0.0, 0.5))
        for letter in "AMQ":
            image = (render_letter(letter, style) + 1) / 2
            assert torch.allclose(image[:, 0, 0], torch.tensor(style.paper))
            assert image[0].max() == 1

    @pytest.mark.parametrize(
        ("x", "y"), [(4.0, 0.0), (-3.0, 0.0), (0.0, 5.0), (0.0, -4.0), (2.0, 3.0)]
    )
    def test_position_moves_the_letter(self, x, y):
        centred, moved = (centre(render_mask(7, s)) for s in (Style(), Style(x=x, y=y)))
        assert np.allclose(moved - centred, [x, y], atol=0.05)

    def test_slant_leans_to_the_right_and_weight_thickens(self):
        upright, slanted = (render_mask(8, Style(slant=s)).astype(float) for s in (0, 0.3))
        assert centre(slanted[:16])[0] > centre(upright[:16])[0] + 0.5
        assert centre(slanted[16:])[0] < centre(upright[16:])[0] - 0.5
        assert render_mask(8, Style(weight=0.8)).sum() > 1.2 * render_mask(8, Style()).sum()

    def test_ink_stands_apart_from_paper(self):
        ink, paper = random_colours(np.random.default_rng(0), 500)
        assert ((ink - paper) @ [0.299, 0.587, 0.114]).min() >= 0.4

    @pytest.mark.parametrize("letter", ["a", "AB", "", 26, -1, 1.0])
    def test_other_characters_are_refused(self, letter):
        with pytest.raises(ValueError, match="capital from A to Z or a label from 0 to 25"):
            render_letter(letter)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"font": 99}, "index from 0 to 20, got 99"),
            ({"height": 50}, "height must be 4 to 32"),
            ({"weight": -1}, "weight 0 or more"),
            ({"ink": (0.0, 2.0, 0.0)}, "ink must be three numbers"),
            ({"paper": (0.0, 0.0)}, "paper must be three numbers"),
        ],
    )
    def test_impossible_styles_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Style(**settings)


def centre(mask):
    mass = mask / mask.sum()
    rows, columns = np.indices(mask.shape)
    return np.array([(mass * columns).sum(), (mass * rows).sum()])


class TestNetwork:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_returns_the_dtype_and_device_of_the_state(self, letters, dtype, device):
        model = letters if device == "cpu" else load_letters(device)
        x = torch.randn(2, 3, 32, 32, dtype=dtype, device=device)
        sigma = torch.ones(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        out = model(x, sigma.to(device), class_labels=torch.tensor([0, -1], device=device))
        assert (out.dtype, out.shape, out.device) == (dtype, x.shape, x.device)
        assert out.isfinite().all()

    @pytest.mark.parametrize("labelled", [True, False])
    def test_is_deterministic(self, letters, held_out, labelled):
        images, labels = held_out
        x, sigma = noised(images[:4], 1.0)
        first, again = (letters(x, sigma, labels[:4] if labelled else None) for _ in range(2))
        assert torch.equal(first, again)

    def test_no_labels_is_the_null_label(self, letters, held_out):
        x, sigma = noised(held_out[0][:4], 1.0)
        null = letters(x, sigma, class_labels=torch.full((4,), -1))
        assert torch.equal(letters(x, sigma), null)
        assert not torch.equal(null, letters(x, sigma, class_labels=torch.zeros(4).long()))

    def test_equal_to_k_diffusions_network_with_the_same_weights(
        self, k_diffusion, letters, held_out
    ):
        inner = k_diffusion.models.ImageDenoiserModelV1(
            c_in=3,
            feats_in=128,
            depths=[1, 1, 1],
            channels=[64, 96, 128],
            self_attn_depths=[False, True, True],
            mapping_cond_dim=27,
            patch_size=2,
        )
        inner.load_state_dict(letters.network.state_dict())
        theirs = k_diffusion.layers.Denoiser(inner, sigma_data=0.67).double()
        ours = load_letters(dtype=torch.float64)
        images, labels = held_out
        x, noise = images[:4].double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
        sigma = torch.tensor([0.02, 0.5, 3.0, 80.0], dtype=torch.float64)
        rows = torch.nn.functional.one_hot(labels[:4] + 1, 27).double()
        noisy = x + sigma[:, None, None, None] * noise
        torch.testing.assert_close(
            ours(noisy, sigma, labels[:4]), theirs(noisy, sigma, mapping_cond=rows)
        )
        torch.testing.assert_close(
            ours.loss(x, noise, sigma, labels[:4]), theirs.loss(x, noise, sigma, mapping_cond=rows)
        )

    def test_preconditioning_is_that_of_the_paper(self, letters, held_out):
        # D = x at σ -> 0, and F = (D - c_skip x) / c_out does not depend on the scale of anything else.
        images = held_out[0][:2].double()
        tiny = letters(images, torch.full((2,), 1e-6, dtype=torch.float64))
        assert (tiny - images).abs().max() < 1e-4

    def test_a_half_precision_network_is_close(self, letters, held_out):
        images, labels = held_out
        x, sigma = noised(images[:8], 0.5)
        exact = letters(x, sigma, labels[:8])
        rough = load_letters(dtype=torch.bfloat16)(x, sigma, labels[:8])
        assert rough.dtype == torch.float32
        assert 0 < (rough - exact).abs().mean() < 0.05

    @pytest.mark.parametrize("half", [False, True])
    def test_round_trip(self, letters, half):
        denoiser = InDtype(letters, torch.bfloat16) if half else letters
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64) * 80
        labels = {"class_labels": torch.tensor([3, 20])}
        sigmas = karras_sigmas(10, 0.02, 80.0)
        for solver in (BDIA(HeunEDM(), 1.0), BDIA(Euler(), StepRatio(1))):
            down = solver.sample(denoiser, x, sigmas, extra_args=labels)
            back = solver.invert(denoiser, down.state, sigmas, extra_args=labels)
            assert (back.x - x).norm() / x.norm() < 1e-12

    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            (
                torch.tensor([1, 2, 3]),
                ValueError,
                r"shape \(2,\), one for each picture, got \(3,\)",
            ),
            (torch.tensor(1), ValueError, r"got \(\)"),
            (torch.tensor([0, 26]), ValueError, r"0 to 25, or -1 for no label, got \[0, 26\]"),
            (torch.tensor([-2, 0]), ValueError, "-1 for no label"),
            (torch.tensor([0.0, 1.0]), TypeError, "integers"),
        ],
    )
    def test_wrong_labels_are_refused(self, letters, labels, error, message):
        with pytest.raises(error, match=message):
            letters(torch.zeros(2, 3, 32, 32), torch.ones(2), class_labels=labels)

    def test_where_labels_cannot_be_read_wrong_ones_give_nan(self, letters, monkeypatch):
        monkeypatch.setattr(letters_network, "values_readable", lambda x: False)
        x, sigma = torch.randn(2, 3, 32, 32), torch.ones(2)
        out = letters(x, sigma, torch.tensor([0, 26]))
        assert bool(out[1].isnan().all())
        torch.testing.assert_close(out[0], letters(x, sigma, torch.tensor([0, 3]))[0])

    @pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 64, 64), (3, 32, 32)])
    def test_other_pictures_are_refused(self, letters, shape):
        with pytest.raises(ValueError, match=r"of shape \(B, 3, 32, 32\), got"):
            letters(torch.zeros(shape), torch.ones(shape[0]))

    def test_integer_pictures_are_refused(self, letters):
        with pytest.raises(TypeError, match="floating point"):
            letters(torch.zeros(2, 3, 32, 32).byte(), torch.ones(2))


class TestWhatItLearned:
    @pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
    def test_beats_the_best_linear_denoiser(self, letters, held_out, principal_axes, sigma):
        # The Wiener filter: what would be best if pictures were Gaussian.
        images, labels = held_out
        x, s = noised(images, sigma)
        mean, variances, axes = principal_axes
        gain = variances / (variances + sigma**2)
        wiener = mean + ((x.flatten(1) - mean) @ axes * gain) @ axes.T
        best = (wiener - images.flatten(1)).square().mean()
        loss = (letters(x, s, labels) - images).square().mean()
        assert loss < 0.7 * best

    def test_labels_help(self, letters, held_out):
        images, labels = held_out
        x, sigma = noised(images, 2.0)
        right, none, wrong = (
            (letters(x, sigma, given) - images).square().mean().item()
            for given in (labels, None, (labels + 3) % 26)
        )
        assert right < 0.98 * none
        assert none < wrong

    def test_the_log_describes_the_weights(self, letters):
        # The weights are stored as float16; the log was written from float32.
        from odesolvers.models.letters.train import held_out_loss

        log = training_log()
        loss = np.mean(held_out_loss(letters, *random_letters(128, 1))[1])
        assert loss == pytest.approx(log["history"][-1]["held_out"], rel=5e-3)

    def test_size_of_the_file(self):
        assert WEIGHTS.stat().st_size <= 4 * 2**20


class TestLoading:
    def test_a_damaged_file_is_refused(self, tmp_path):
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(WEIGHTS.read_bytes()[:1000])
        with pytest.raises(ValueError, match="does not hold the weights of the letters"):
            load_letters(path=path)

    def test_other_weights_are_refused(self, tmp_path):
        from safetensors.torch import save_file

        path = tmp_path / "other.safetensors"
        save_file({"weight": torch.zeros(3)}, path)
        with pytest.raises(ValueError, match="does not hold the weights of the letters"):
            load_letters(path=path)

    def test_an_integer_dtype_is_refused(self):
        with pytest.raises(TypeError, match=r"floating point dtype, got torch\.int64"):
            load_letters(dtype=torch.int64)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: torch.full_like(w, torch.nan), "not finite"),
            (lambda w: w.index_fill(0, torch.tensor(0), torch.inf), "not finite"),
            (lambda w: w.to(torch.int8), "a tensor of I8"),
            (lambda w: w.to(torch.complex64), "a tensor of 'C64'"),
            (lambda w: w.to(torch.float8_e4m3fn), "a tensor of F8_E4M3"),
            (lambda w: w[:1].clone(), "has shape"),
        ],
    )
    def test_weights_that_are_no_finite_numbers_are_refused(self, tmp_path, change, message):
        from safetensors.torch import load_file, save_file

        weights = load_file(WEIGHTS)
        weights["proj_out.bias"] = change(weights["proj_out.bias"])
        save_file(weights, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=f"does not hold the weights .*{message}"):
            load_letters(path=tmp_path / "w.safetensors")

    def test_no_library_is_needed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        assert load_letters().network.proj_out.bias.isfinite().all()


def test_training_resumes_where_it_stopped(tmp_path):
    """And gives the same weights each time, in the files that `load_letters` reads."""
    from odesolvers.models.letters import train

    def run(out, images, *more):
        args = ["--masks", "20", "--batch", "4", "--every", "4", "--held-out", "2"]
        args += ["--out", str(out), "--images", str(images), *more]
        train.train(train.parser().parse_args(args))
        return load_letters(path=out / "letters.safetensors").state_dict()

    whole = run(tmp_path / "whole", 8)
    again = run(tmp_path / "again", 8)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert not torch.equal(
        whole["network.proj_out.bias"],
        run(tmp_path / "other", 8, "--seed", "1")["network.proj_out.bias"],
    )
    run(tmp_path / "again", 12, "--resume")
    log = json.loads((tmp_path / "again" / "letters.json").read_text())
    assert [entry["images"] for entry in log["history"]] == [4, 8, 12]
    assert [entry["from_image"] for entry in log["runs"]] == [0, 8]

    done = training_log()["history"]
    images = done[-1]["images"] + 4
    run(tmp_path / "package", images, "--resume")
    log = json.loads((tmp_path / "package" / "letters.json").read_text())
    assert log["history"][:-1] == done
    assert log["history"][-1]["images"] == images
