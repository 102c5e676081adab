"""The training of the network of emoji, on drawings made of noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tqdm")

from benchmarks.emoji import train
from benchmarks.emoji.data import Emoji
from benchmarks.emoji.muon import Muon, orthogonal, split
from odesolvers.models.edm import load_edm


@pytest.fixture
def emoji(monkeypatch):
    rng, n = np.random.default_rng(0), 24
    columns = [np.arange(n) % 2, np.zeros(n, int), np.zeros(n, int), np.arange(n) // 2]
    found = Emoji(
        rng.integers(0, 255, (n, 4, 32, 32), dtype=np.uint8),
        np.eye(n, 12, dtype=np.float32),
        *columns,
        np.arange(n) % 8 == 0,
        names=("",) * n,
        groups=("",),
        subgroups=("",),
    )
    monkeypatch.setattr(train, "load_emoji", lambda: found)
    return found


def settings(out, images, *more):
    small = ["--channels", "8", "--mult", "1", "1", "--batch", "4", "--every", "8"]
    return train.parser().parse_args(["--out", str(out), "--images", str(images), *small, *more])


class TestTraining:
    @pytest.mark.parametrize("kind", ["edm", "vp", "ve", "iddpm"])
    def test_an_interruption_changes_nothing(self, emoji, tmp_path, kind):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        train.train(settings(whole, 24, "--preconditioning", kind))
        for images in (8, 16, 24):
            train.train(settings(parts, images, "--preconditioning", kind))
        one, other = (load_edm(folder / "emoji.safetensors") for folder in (whole, parts))
        x, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.1, 10.0])
        assert torch.equal(one(x, sigma), other(x, sigma))
        # What is stored is what was trained, but for the precision of its weights.
        averaged = torch.load(whole / "checkpoint.pt", weights_only=True)["averaged"]
        for name, value in one.state_dict().items():
            torch.testing.assert_close(value, averaged[name], rtol=1e-3, atol=1e-6)

    def test_it_learns(self, emoji, tmp_path):
        train.train(settings(tmp_path, 64, "--averaged", "0.2", "--lr", "0.1"))
        network = load_edm(tmp_path / "emoji.safetensors")
        seen = np.flatnonzero(~emoji.held_out)
        fresh = train.make_network(settings(tmp_path, 8), 12)
        after, before = (
            np.mean(train.losses_by_level(model.eval(), emoji, seen)[1])
            for model in (network, fresh)
        )
        assert after < 0.9 * before


class TestMuon:
    @pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
    def test_singular_values_of_about_one_in_the_directions_of_the_gradient(self, shape):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        inside = u.T @ orthogonal(gradient) @ v.T
        values = inside.diagonal()
        assert ((values > 0.6) & (values < 1.3)).all()
        assert (inside - values.diag()).abs().max() < 1e-4

    def test_the_first_step_is_as_long_as_adams(self):
        # Of root mean square 0.2 times the rate, whatever the shape and the size of the gradient.
        for shape in ((32, 16, 3, 3), (64, 128)):
            weight = nn.Parameter(torch.zeros(shape))
            weight.grad = 1e3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
            Muon([weight], lr=1e-2).step()
            assert weight.square().mean().sqrt().item() == pytest.approx(2e-3, rel=0.25)

    def test_it_steps_the_inner_weights_of_blocks(self):
        network = train.make_network(settings("", 8), 12)
        inner, others = split(network)
        every = list(network.parameters())
        assert {id(p) for p in every} == {id(p) for p in [*inner, *others]}
        assert len(inner) + len(others) == len(every)
        names = {id(p): name for name, p in network.named_parameters()}
        assert all("norm" not in names[id(p)] and p.ndim >= 2 for p in inner)
        left = {names[id(p)].split(".")[-2] for p in others if p.ndim >= 2}
        assert left == {"32x32_conv", "32x32_aux_conv", "map_label", "map_layer0", "map_layer1"}
