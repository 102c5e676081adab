"""Trains a network on the emoji, in the format of NVlabs' EDM: ``python -m benchmarks.emoji.train``.

A run that was interrupted continues where its last checkpoint stands, and a larger ``--images``
continues a run that ended. Equal settings give equal images, noise and labels, however often a run was
interrupted. The learning rate and the averaging of weights depend on no length of the run (Karras et
al. 2024, arXiv 2312.02696, sections 2 and 3), so that any checkpoint is the end of a shorter run.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from odesolvers.models.edm import (
    EDMPrecond,
    IDDPMPrecond,
    Preconditioner,
    SongConfig,
    SongUNet,
    VEPrecond,
    VPPrecond,
    load_edm,
    save_edm,
)

from .data import Emoji, load_emoji
from .muon import Muon, split

SIGMA_DATA: Final = 0.79
"""Root mean square of the pixels of the training set, on white."""

LOG_SIGMA: Final = (-0.2, 1.5)
"""Mean and deviation of log σ in training: higher and wider than for photographs (Karras et al. 2022,
table 1), for what a picture shows is decided above σ = 1."""

LABELS_DROPPED: Final = 0.1
EVALUATED: Final = 64
"""Held-out drawings that are looked at."""


def parser() -> argparse.ArgumentParser:
    """The options; their defaults are the settings of the network in the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/emoji"), help="output folder")
    parser.add_argument("--images", type=int, default=2_000_000, help="images to train on")
    parser.add_argument(
        "--start",
        type=Path,
        help="a network, its log beside it, to go on from where there is no checkpoint; its averaged "
        "weights stand for the current ones, and the optimizer begins afresh",
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate before it falls")
    parser.add_argument("--falls", type=float, default=10_000, help="steps after which it falls")
    parser.add_argument(
        "--averaged", type=float, default=0.08, help="relative width of the average"
    )
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--mult", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument(
        "--preconditioning",
        choices=("edm", "vp", "ve", "iddpm"),
        default="edm",
        help="with the noise levels and the weights of its own training; ve is an NCSN++",
    )
    parser.add_argument("--every", type=int, default=8_000, help="images between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser


def make_network(args: argparse.Namespace, labels: int) -> Preconditioner:
    """An untrained DDPM++ or NCSN++ under a preconditioning, initialised as NVlabs do."""
    ncsn: dict[str, Any] = {
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "resample_filter": (1, 3, 3, 1),
    }
    config = SongConfig(
        img_resolution=32,
        in_channels=3,
        out_channels=6 if args.preconditioning == "iddpm" else 3,  # the other half is no use here
        label_dim=labels,
        model_channels=args.channels,
        channel_mult=tuple(args.mult),
        num_blocks=args.blocks,
        attn_resolutions=(8,),
        dropout=0.0,  # drawing its masks takes a fourteenth of the time on a CPU
        label_dropout=LABELS_DROPPED,
        **(ncsn if args.preconditioning == "ve" else {}),
    )
    torch.manual_seed(args.seed)
    network = SongUNet(config)
    for name, part in network.named_modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
            if name.endswith(("conv1", "proj", "aux_conv")):  # each block begins as the identity
                part.weight.data *= 1e-5
    if args.preconditioning == "edm":
        return EDMPrecond(network, sigma_data=SIGMA_DATA)
    return {"vp": VPPrecond, "ve": VEPrecond, "iddpm": IDDPMPrecond}[args.preconditioning](network)


def train(args: argparse.Namespace) -> None:
    """Train with the settings in `args`, evaluate at intervals and write the results."""
    from tqdm import tqdm

    args.out.mkdir(parents=True, exist_ok=True)
    emoji = load_emoji()
    seen, unseen = np.flatnonzero(~emoji.held_out), np.flatnonzero(emoji.held_out)
    model = make_network(args, emoji.labels.shape[1])
    model.to(args.device, memory_format=torch.channels_last)  # a seventh faster on a CPU
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    inner, others = split(model)
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        Muon(inner, lr=args.lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01),
    )
    log: dict[str, Any] = {"settings": {}, "history": []}
    step, seconds, checkpoint = 0, 0.0, args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=args.device)
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, log = saved["step"], json.loads(saved["log"])
        seconds = log["history"][-1]["seconds"]
    elif args.start:
        state = load_edm(args.start).state_dict()
        model.load_state_dict(state)
        averaged.load_state_dict(state)
        log = json.loads(args.start.with_suffix(".json").read_text())
        step, seconds = log["history"][-1]["images"] // args.batch, log["history"][-1]["seconds"]
        log["begun"] = step
    log["settings"] = {
        k: v for k, v in vars(args).items() if k not in ("out", "device", "images", "start")
    }
    power = _power(args.averaged)
    steps, every = args.images // args.batch, max(1, args.every // args.batch)
    losses: list[Tensor] = []
    start = time.perf_counter() - seconds
    with tqdm(total=args.images, initial=step * args.batch, unit="img", smoothing=0.02) as bar:
        while step < steps:
            rate = (
                args.lr
                * min(1, (step - log.get("begun", 0) + 1) / 500)
                / math.sqrt(max(1, step / args.falls))
            )
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            torch.manual_seed(args.seed * 2**32 + step)  # of dropped labels
            images, noise, sigma, labels = _batch(args, model, emoji, seen, step)
            loss = _loss(model, images, noise, sigma, labels).mean()
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            with torch.no_grad():
                keep = (1 - 1 / step) ** (power + 1)
                for slow, fast in zip(averaged.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 1 - keep)
            losses.append(loss.detach())
            bar.update(args.batch)
            if step % every == 0 or step == steps:
                entry = {
                    "images": step * args.batch,
                    "seconds": round(time.perf_counter() - start),
                    "train": float(torch.stack(losses).mean()),
                    "held_out": float(
                        np.mean(losses_by_level(averaged, emoji, unseen[:EVALUATED])[1])
                    ),
                    "known": float(np.mean(losses_by_level(averaged, emoji, seen[:EVALUATED])[1])),
                }
                losses.clear()
                log["history"].append(entry)
                bar.set_postfix(train=f"{entry['train']:.4f}", held_out=f"{entry['held_out']:.4f}")
                _write(args.out, model, averaged, optimizers, step, log)


def losses_by_level(
    model: Preconditioner, emoji: Emoji, rows: NDArray[np.int64], levels: int = 8
) -> tuple[list[float], list[float]]:
    """The mean loss at evenly spaced quantiles of the training noise levels, for one fixed noise.

    Returns:
        The noise levels, and the mean loss at each.
    """
    device = next(model.parameters()).device
    images, labels = (
        emoji.on_ground(rows).to(device),
        torch.as_tensor(emoji.labels[rows]).to(device),
    )
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).to(device)
    sigmas = _sigmas(model, (torch.arange(levels) + 0.5) / levels)
    with torch.inference_mode():
        losses = [
            _loss(model, images, noise, sigma.expand(len(rows)), labels).mean().item()
            for sigma in sigmas.to(device)
        ]
    return sigmas.tolist(), losses


def _loss(
    model: Preconditioner, images: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor
) -> Tensor:
    """The squared error of the raw network for each image, ``(B,)``; about 1 for a network of zeros."""
    denoised = model(images + sigma[:, None, None, None] * noise, sigma, labels)
    return (denoised - images).square().mean((1, 2, 3)) / model.coefficients(sigma).out ** 2


def _batch(
    args: argparse.Namespace,
    model: Preconditioner,
    emoji: Emoji,
    rows: NDArray[np.int64],
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The images, noise, noise levels and labels of a step, determined by the seed and the step."""
    rng = np.random.default_rng((args.seed, step))
    sizes = np.bincount(emoji.motif[rows])[emoji.motif[rows]]
    chances = 1 / np.sqrt(sizes)  # a motif in five skin tones twice as often as one in none
    chosen = rng.choice(rows, args.batch, p=chances / chances.sum())
    images = emoji.on_ground(chosen)
    noise = torch.as_tensor(rng.standard_normal(images.shape, dtype=np.float32))
    # Stratified sampling: one noise level from each of `batch` equal parts of the distribution.
    quantiles = (rng.permutation(args.batch) + rng.random(args.batch)) / args.batch
    labels = torch.as_tensor(emoji.labels[chosen])
    parts = images, noise, _sigmas(model, torch.as_tensor(quantiles)), labels
    return tuple(part.to(args.device) for part in parts)  # type: ignore[return-value]


def _sigmas(model: Preconditioner, quantiles: Tensor) -> Tensor:
    """The noise levels at `quantiles` of the training distribution, as each was published."""
    if isinstance(model, VPPrecond):  # uniform in time
        t = model.epsilon_t + quantiles * (1 - model.epsilon_t)
        return torch.expm1(model.beta_d * t**2 / 2 + model.beta_min * t).sqrt().float()
    if isinstance(model, VEPrecond):  # uniform in log σ
        return (model.sigma_min * (model.sigma_max / model.sigma_min) ** quantiles).float()
    if isinstance(model, IDDPMPrecond):  # any of the levels
        return model.u[(quantiles * model.M).long().to(model.u.device)].float()
    mean, deviation = LOG_SIGMA
    normal = math.sqrt(2) * torch.erfinv((2 * quantiles - 1).double())
    return torch.exp(mean + deviation * normal).float()


def _power(width: float) -> float:
    """The power γ of an average of weights with profile t^γ and a relative width (equation 123)."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(np.real(roots).max())


def _write(
    out: Path,
    model: Preconditioner,
    averaged: Preconditioner,
    optimizers: tuple[torch.optim.Optimizer, ...],
    step: int,
    log: dict[str, Any],
) -> None:
    """Write the checkpoint, and the averaged weights in float16 as `load_edm` reads them."""
    partial = out / "checkpoint.partial"
    torch.save(
        {
            "model": model.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "log": json.dumps(log),
        },
        partial,
    )
    partial.replace(out / "checkpoint.pt")
    stored = copy.deepcopy(averaged).cpu()
    stored.model.compute_in(torch.float16)  # and not what noise levels are computed with
    save_edm(stored, out / "emoji.safetensors")
    (out / "emoji.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    train(parser().parse_args())
