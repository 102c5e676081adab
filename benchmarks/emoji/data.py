"""Emoji in two complete drawings, with labels: every motif of Noto has its counterpart in Twemoji.

The pictures come from two packages of the npm registry, which are downloaded once and checked:

- `emoji-datasource-google` 16.0.0: Noto Emoji, copyright Google LLC, Apache License 2.0.
- `emoji-datasource-twitter` 16.0.0: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/); here reduced in size.

The lists of names and groups in both, by Cal Henderson, are under the MIT licence.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CACHE: Final = Path(__file__).parents[1] / "cache" / "emoji"
STYLES: Final = ("google", "twitter")
TONES: Final = ("none", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
VERSION: Final = "16.0.0"
INTEGRITY: Final = {
    "google": "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQ"
    "Qlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "twitter": "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4"
    "pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
}
"""The SHA-512 of each package, in base64, as the registry gives it."""

HELD_OUT: Final = 0.1
"""The fraction of motifs of which one drawing is withheld from training."""


@dataclass(frozen=True)
class Emoji:
    """Pictures and labels, a row for each drawing of each variant of each motif.

    Attributes:
        images: uint8 ``(N, 4, size, size)``: red, green, blue, each times alpha / 255, and alpha.
        labels: float32 ``(N, label_dim)``: style, group, subgroup and skin tone, one-hot each; a pair
            of persons has half of each tone.
        style, group, subgroup, motif: int64 ``(N,)``; variants in skin tone are one motif.
        held_out: bool ``(N,)``; the other drawing of the motif is in the training set.
        names: the name of each row.
        groups, subgroups: the names of the numbers.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.float32]
    style: NDArray[np.int64]
    group: NDArray[np.int64]
    subgroup: NDArray[np.int64]
    motif: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    names: tuple[str, ...]
    groups: tuple[str, ...]
    subgroups: tuple[str, ...]

    def on_ground(
        self, rows: NDArray[np.int64], ground: NDArray[np.float32] | float = 1.0
    ) -> Tensor:
        """The pictures of `rows` on a plain ground.

        Args:
            rows: ``(B,)``.
            ground: a colour for all or ``(B, 3)``, from -1 to 1; white by default.

        Returns:
            float32 ``(B, 3, size, size)``, from -1 to 1.
        """
        chosen = self.images[rows].astype(np.float32) / 255
        colour, alpha = 2 * chosen[:, :3], chosen[:, 3:]
        behind = np.broadcast_to(np.float32(ground), (len(rows), 3))[:, :, None, None]
        return torch.as_tensor(colour - alpha + (1 - alpha) * behind)


def load_emoji(size: int = 32) -> Emoji:
    """All emoji that have both drawings, downloaded once to ``benchmarks/cache``.

    Args:
        size: 32 or 64 pixels.

    Raises:
        ConnectionError: if a package cannot be downloaded, or is not what it was.
        ValueError: for another size.
    """
    if size not in (32, 64):
        raise ValueError(f"size must be 32 or 64, got {size}")
    packages = {style: _package(style) for style in STYLES}
    rows = _rows(json.loads(packages["google"]["emoji.json"]))
    groups = tuple(sorted({group for _, group, *_ in rows}))
    subgroups = tuple(sorted({subgroup for _, _, subgroup, *_ in rows}))
    motifs = {image: k for k, image in enumerate(sorted({motif for *_, motif, _ in rows}))}
    rng = np.random.default_rng(0)
    withheld = rng.permutation(len(motifs))[: round(HELD_OUT * len(motifs))]
    without = {int(motif): k % 2 for k, motif in enumerate(withheld)}
    cached = CACHE / f"{size}.npy"
    images = np.load(cached) if cached.exists() else None
    pictures, labels, columns, names = [], [], [], []
    for style, name in enumerate(STYLES):
        for title, group, subgroup, tones, motif, image in rows:
            if images is None:
                pictures.append(_picture(packages[name][f"img/{name}/64/{image}"], size))
            label = np.zeros((4, max(len(groups), len(subgroups))), np.float32)
            label[0, style] = label[1, groups.index(group)] = label[
                2, subgroups.index(subgroup)
            ] = 1
            for tone in tones:
                label[3, TONES.index(tone)] += 1 / len(tones)
            sizes = (len(STYLES), len(groups), len(subgroups), len(TONES))
            labels.append(np.concatenate([row[:n] for row, n in zip(label, sizes, strict=True)]))
            number = motifs[motif]
            columns.append(
                (
                    style,
                    groups.index(group),
                    subgroups.index(subgroup),
                    number,
                    without.get(number) == style,
                )
            )
            names.append(title)
    if images is None:
        images = np.stack(pictures)
        np.save(cached, images)
    table = np.array(columns, np.int64).T
    return Emoji(
        images, np.stack(labels), *table[:4], table[4].astype(bool), tuple(names), groups, subgroups
    )


def _rows(listed: list[dict[str, Any]]) -> list[tuple[str, str, str, tuple[str, ...], str, str]]:
    """The name, group, subgroup, skin tones, motif and file of each emoji with both drawings."""
    rows = []
    for emoji in listed:
        if emoji["category"] == "Component":  # the tones themselves
            continue
        variants = {"none": emoji, **emoji.get("skin_variations", {})}
        for tones, variant in variants.items():
            if variant["has_img_google"] and variant["has_img_twitter"]:
                kind = emoji["category"], emoji["subcategory"]
                name = emoji["name"] or emoji["short_name"].upper()
                rows.append(
                    (name, *kind, tuple(tones.split("-")), emoji["image"], variant["image"])
                )
    return rows


def _picture(data: bytes, size: int) -> NDArray[np.uint8]:
    """A picture as ``(4, size, size)``, its colours times alpha, so that averages are right."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("RGBA"), np.float64)
    if pixels.shape[:2] != (64, 64):
        raise ValueError(f"the pictures have 64 x 64 pixels, got {pixels.shape}")
    pixels[..., :3] *= pixels[..., 3:] / 255
    k = 64 // size
    averages = pixels.reshape(size, k, size, k, 4).mean((1, 3))
    return averages.round().astype(np.uint8).transpose(2, 0, 1)


def _package(style: str) -> dict[str, bytes]:
    """The files of a package that are used here, by their paths."""
    name = f"emoji-datasource-{style}"
    path = CACHE / f"{name}-{VERSION}.tgz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
        url = f"{registry}/{name}/-/{path.name}"
        print(f"downloading {url} (about 70 MB)", flush=True)
        with urllib.request.urlopen(url, timeout=60) as answer:
            data = answer.read(2**28)
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(path)
    data = path.read_bytes()
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != INTEGRITY[style]:
        raise ConnectionError(
            f"{path} is not the package that was published: delete it and try again"
        )
    wanted = f"package/img/{style}/64/"
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        return {
            member.name.removeprefix("package/"): files.extractfile(member).read()  # type: ignore[union-attr]
            for member in files
            if member.name.startswith(wanted) or member.name == "package/emoji.json"
        }
