"""Trains the letters network from scratch, in about an hour on one CPU core.

``python -m odesolvers.models.letters.train`` writes ``letters.safetensors`` and ``letters.json``. With
``--resume`` it continues from the last evaluation of an interrupted run or, given a larger
``--images``, of a finished run; if the folder has no checkpoint, it continues from the weights and the
log in the package. Equal settings and seeds give equal images, noise and labels.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import LETTERS, SIZE, Style, paint, random_colours, random_letters, render_mask
from .network import UNCONDITIONAL, LettersDenoiser, load_letters, training_log

# The distribution of noise levels is log-normal, wider and higher than that for photographs (Karras et
# al. 2022, table 1), because the colours of an image are determined above σ = 5.
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -0.2, 1.5
HELD_OUT_SEED = 1


def parser() -> argparse.ArgumentParser:
    """The argument parser; its defaults are the settings of the weights in the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/letters"), help="output folder")
    parser.add_argument("--images", type=int, default=300_000, help="images to train on")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="maximum learning rate")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument(
        "--dropout", type=float, default=0.1, help="fraction of images without label"
    )
    parser.add_argument("--masks", type=int, default=65_536, help="masks to render")
    parser.add_argument("--every", type=int, default=10_000, help="images between evaluations")
    parser.add_argument("--held-out", type=int, default=128, help="letters to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    return parser


def train(args: argparse.Namespace) -> None:
    """Train with the settings in `args`, evaluate at intervals and write the results."""
    from tqdm import tqdm

    args.out.mkdir(parents=True, exist_ok=True)
    labels, masks = _masks(args)
    torch.manual_seed(args.seed)
    model = LettersDenoiser()
    # Label embeddings start as large as those of the noise level. With the default initialisation,
    # six times smaller, the network learns to ignore them.
    torch.nn.init.normal_(model.network.mapping_cond.weight)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.95, 0.999))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume")}
    log: dict[str, Any] = {"runs": [], "history": []}
    step, seconds = 0, 0.0
    checkpoint = args.out / "checkpoint.safetensors"
    if args.resume and checkpoint.exists():
        step = _restore(checkpoint, model, averaged, optimizer)
        log = json.loads((args.out / "letters.json").read_text())
    elif args.resume:
        weights = load_letters().state_dict()
        model.load_state_dict(weights)
        averaged.load_state_dict(weights)
        log = training_log()
        step = log["history"][-1]["images"] // args.batch
    if args.resume:
        seconds = log["history"][-1]["seconds"]
    log["runs"].append({"from_image": step * args.batch, **settings})

    held_out = random_letters(args.held_out, HELD_OUT_SEED)
    steps, every = args.images // args.batch, max(1, args.every // args.batch)
    losses: list[float] = []
    start = time.perf_counter() - seconds
    with tqdm(total=steps * args.batch, initial=step * args.batch, unit="img") as bar:
        while step < steps:
            rate = args.lr * min(1, (step + 1) / 400) * (1 + math.cos(math.pi * step / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):  # 1.5 times as fast as float32
                loss = model.loss(*_batch(args, labels, masks, step)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            with torch.no_grad():
                keep = min(args.ema, step / (step + 9))
                for slow, fast in zip(averaged.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 1 - keep)
            losses.append(loss.item())
            bar.update(args.batch)
            if step % every == 0 or step == steps:
                entry = {
                    "images": step * args.batch,
                    "seconds": round(time.perf_counter() - start),
                    "train": float(np.mean(losses)),
                    "held_out": float(np.mean(held_out_loss(averaged, *held_out)[1])),
                }
                losses.clear()
                log["history"].append(entry)
                bar.set_postfix(held_out=f"{entry['held_out']:.4f}")
                _keep(checkpoint, model, averaged, optimizer, step)
                write(averaged, log, args.out)
    letters, letter_labels = random_letters(4 * args.held_out, HELD_OUT_SEED)
    for name, given in (("held_out", letter_labels), ("held_out_without_label", None)):
        sigmas, by_sigma = held_out_loss(averaged, letters, given)
        log["by_sigma"] = log.get("by_sigma", {}) | {"sigma": sigmas, name: by_sigma}
    write(averaged, log, args.out)


def held_out_loss(
    model: LettersDenoiser, images: Tensor, labels: Tensor | None, levels: int = 8
) -> tuple[list[float], list[float]]:
    """Evaluate the mean loss at evenly spaced quantiles of the training noise levels.

    The noise is the same in every call, so that losses are comparable.

    Returns:
        The noise levels, and the mean loss at each.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    sigmas = _sigmas((torch.arange(levels) + 0.5) / levels)
    losses = []
    with torch.inference_mode():
        for sigma in sigmas:
            loss = model.loss(images, noise, sigma.expand(len(images)), labels)
            losses.append(loss.mean().item())
    return sigmas.tolist(), losses


def write(model: LettersDenoiser, log: dict[str, Any], out: Path) -> None:
    """Write the weights, in float16, and the log."""
    from safetensors.torch import save_file

    weights = model.network.state_dict()
    save_file({k: v.half().contiguous() for k, v in weights.items()}, out / "letters.safetensors")
    (out / "letters.json").write_text(json.dumps(log, indent=1) + "\n")


def _keep(
    path: Path,
    model: LettersDenoiser,
    averaged: LettersDenoiser,
    optimizer: torch.optim.AdamW,
    step: int,
) -> None:
    """Write all that a training continues from: tensors named ``model.*``, ``averaged.*``, and so on."""
    from safetensors.torch import save_file

    moments = optimizer.state_dict()["state"]
    parts: dict[str, dict[str, Tensor]] = {
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        **{f"optimizer.{k}": tensors for k, tensors in moments.items()},
        "training": {"step": torch.tensor(step)},
    }
    tensors = {f"{part}.{k}": v for part, named in parts.items() for k, v in named.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def _restore(
    path: Path, model: LettersDenoiser, averaged: LettersDenoiser, optimizer: torch.optim.AdamW
) -> int:
    """Read what `_keep` wrote, and return the step."""
    from safetensors.torch import load_file

    tensors = load_file(path)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    averaged.load_state_dict(part("averaged."))
    moments = {k: part(f"optimizer.{k}.") for k in range(len(list(model.parameters())))}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(tensors["training.step"])


def _batch(
    args: argparse.Namespace, labels: NDArray[np.int64], masks: NDArray[np.uint8], step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The images, noise, noise levels and labels of a step, determined by the seed and the step."""
    rng = np.random.default_rng((args.seed, step))
    chosen = rng.integers(len(masks), size=args.batch)
    images = paint(masks[chosen], *random_colours(rng, args.batch))
    noise = torch.as_tensor(rng.standard_normal(images.shape, dtype=np.float32))
    # Stratified sampling: one noise level from each of `batch` equal parts of the distribution.
    quantiles = (np.arange(args.batch) + rng.random(args.batch)) / args.batch
    dropped = rng.random(args.batch) < args.dropout
    given = np.where(dropped, UNCONDITIONAL, labels[chosen])
    return images, noise, _sigmas(torch.as_tensor(quantiles)), torch.as_tensor(given)


def _sigmas(quantiles: Tensor) -> Tensor:
    """The noise levels at `quantiles` of the training distribution."""
    normal = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    return torch.exp(LOG_SIGMA_MEAN + LOG_SIGMA_STD * normal).float()


def _masks(args: argparse.Namespace) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """The labels and masks of the training set, rendered once and cached in the output folder."""
    from tqdm import tqdm

    rng = np.random.default_rng((args.seed, args.masks))
    labels = rng.integers(len(LETTERS), size=args.masks)
    path = args.out / f"masks-{args.seed}-{args.masks}.npy"
    if not path.exists():
        masks = np.empty((args.masks, SIZE, SIZE), dtype=np.uint8)
        for k in tqdm(range(args.masks), desc="rendering"):
            masks[k] = render_mask(int(labels[k]), Style.random(rng))
        np.save(path, masks)
    return labels, np.load(path)


if __name__ == "__main__":
    train(parser().parse_args())
