"""Folders of diffusers pipelines from strangers, copied without what could run code or grow.

diffusers and transformers import the classes that the files of a folder name, and follow references to
modules, kernels and adapters; which ones depends on their versions. So they never see such a folder, but
a copy: the index with classes from the table below, of each configuration the settings of its class, the
words of each tokenizer, and links to weights in safetensors. Anything else is left out or refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from .archives import read_archive
from .configurations import clean_settings
from .edm.checks import brief
from .reading import MissingFile, read_header, read_json
from .schedules import DISCRETE, EDM, FLOW
from .tokenizers import copy_tokenizer
from .weights import bounded, check_dtypes, check_shapes

Classes: TypeAlias = Mapping[str, tuple[str, tuple[str, ...]]]

LOADED: Classes = {
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
    "scheduler": ("diffusers", (*DISCRETE, *EDM, *FLOW)),
    "text_encoder": ("transformers", ("CLIPTextModel", "CLIPTextModelWithProjection")),
    "text_encoder_2": ("transformers", ("CLIPTextModel", "CLIPTextModelWithProjection")),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "tokenizer_2": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
}
"""The library and the classes of each part of a pipeline."""

LEFT_OUT: Classes = {
    "safety_checker": ("stable_diffusion", ("StableDiffusionSafetyChecker",)),
    "feature_extractor": (
        "transformers",
        (
            "CLIPImageProcessor",
            "CLIPFeatureExtractor",
            "CLIPImageProcessorFast",
            "CLIPImageProcessorPil",
        ),
    ),
    "image_encoder": ("transformers", ("CLIPVisionModelWithProjection",)),
}
"""Those of parts that a folder may have, and that are not loaded."""

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""The supported pipeline classes of diffusers."""

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""The names of weights, without ending, that each library gives."""

TENSORS = 10_000
"""The most tensors in the files of a part; the network of Stable Diffusion XL has 1680."""


def copy_folder(
    folder: Path,
    into: Path,
    *,
    variant: str | None = None,
    held: Mapping[str, list[int]] | None = None,
) -> dict[str, Any]:
    """Write the clean copy of a folder, and return its index.

    Args:
        folder: a folder in diffusers' layout.
        into: an empty folder.
        variant: variant of the weights, such as "fp16".
        held: the sizes of the weights of each part, if they are in another file; None for those of the
            folder, to which the copy has links.

    Raises:
        ValueError: if the folder is damaged or incomplete, names an unknown class, has links to other
            places, or has settings or weights that do not belong together.
    """
    index = clean_index(read_json(inside(folder, "model_index.json")))
    (into / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for part in parts_of(index):
        (into / part).mkdir()
        if part.startswith("tokenizer"):
            copy_tokenizer(lambda name, part=part: inside(folder, part, name), into / part)  # type: ignore[misc]
            continue
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        library, kind = index[part]
        settings = clean_settings(part, library, kind, read_json(inside(folder, part, name)))
        (into / part / name).write_text(json.dumps(settings), encoding="utf-8")
        if part == "scheduler":
            continue
        if held is not None:
            _build(part, index[part], settings, held[part])
            continue
        shapes = _link_weights(folder, part, into / part, variant)
        model = _build(part, index[part], settings, [math.prod(n) for n in shapes.values()])
        check_shapes(part, model, shapes)
    return index


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """The parts of the pipeline of an index that are loaded."""
    second = index["_class_name"] == PIPELINES[1]
    return [part for part in LOADED if second or not part.endswith("_2")]


def clean_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """The index of a pipeline with what is loaded alone.

    Raises:
        ValueError: if it is another pipeline, lacks a part, or names a class that is not in the table.
    """
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        found = kind if isinstance(kind, str) else brief(kind).removeprefix("a ")
        raise ValueError(f"it is a {found}; supported are {' and '.join(PIPELINES)}")
    clean: dict[str, Any] = {"_class_name": kind}
    for name, value in index.items():
        null = value is None or value == [None, None]
        if not null and (name in (*LOADED, *LEFT_OUT) or isinstance(value, (list, dict))):
            _check_class(name, value)
    for part in parts_of(clean):
        if index.get(part) in (None, [None, None]):
            raise ValueError(
                f"its model_index.json names no {part}, so the pipeline was saved without it: save it "
                "with all parts, or give the parts to a pipeline and that to StableDiffusion"
            )
        clean[part] = index[part]
    if kind == PIPELINES[1]:
        zeros = index.get("force_zeros_for_empty_prompt", True)
        if not isinstance(zeros, bool):
            raise ValueError(
                f"its model_index.json has force_zeros_for_empty_prompt = {brief(zeros)}, where true or "
                "false belong"
            )
        clean["force_zeros_for_empty_prompt"] = zeros
    return clean


def _check_class(part: str, value: Any) -> None:
    pair = value if isinstance(value, list) and len(value) == 2 else [value, None]
    library, classes = {**LOADED, **LEFT_OUT}.get(part, ("nothing", ()))
    if pair[0] != library or not isinstance(pair[1], str) or pair[1] not in classes:
        known = f"; known are {', '.join(classes[:2])}{', ...' * (len(classes) > 2)} of {library}"
        raise ValueError(
            f"its model_index.json says that {brief(part)} is {brief(pair[1])} of {brief(pair[0])}, "
            f"which is not loaded, as it could be code of anyone's{known if classes else ''}"
        )


def inside(folder: Path, *names: str) -> Path:
    """The real path of a file in a folder.

    Links may lead to other places in the folder, and from a snapshot in the cache of the Hugging Face
    hub to the contents beside it.

    Raises:
        MissingFile: if there is no such file.
        ValueError: if a link leads elsewhere.
    """
    path = folder.joinpath(*names)
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not os.path.lexists(path):
        raise MissingFile(f"it has no {'/'.join(names)}")
    real = path.resolve()
    if not any(real.is_relative_to(home) for home in homes):
        raise ValueError(
            f"its {'/'.join(names)} is a link to another place: put a copy of the file in the folder"
        )
    return real


def _link_weights(
    folder: Path, part: str, into: Path, variant: str | None
) -> dict[str, tuple[int, ...]]:
    """Link the weights of a part into a folder, under the names that both libraries look for.

    Pickles are read as data, and written as safetensors. Returns the shapes of all weights.
    """
    stem = STEMS[LOADED[part][0]]
    files = _weight_files(folder, part, variant)
    shards: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for k, path in enumerate(files, 1):
        name = (
            f"{stem}-{k:05}-of-{len(files):05}.safetensors"
            if len(files) > 1
            else f"{stem}.safetensors"
        )
        if path.suffix == ".bin":
            write_tensors(read_archive(inside(folder, part, path.name)).tensors, into / name)
        else:
            _link(inside(folder, part, path.name), into / name)
        _, entries = read_header(into / name)
        check_dtypes(part, entries)
        twice = shapes.keys() & entries.keys()
        if twice:
            raise ValueError(f"its {part} has {brief(min(twice))} in two files")
        shards |= dict.fromkeys(entries, name)
        shapes |= {key: entry.shape for key, entry in entries.items()}
        if len(shapes) > TENSORS:
            raise ValueError(f"its {part} has more than {TENSORS} tensors")
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": shards}
        (into / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return shapes


def weight_patterns(
    folder: Path, parts: Iterable[str], variant: str | None, ending: str
) -> list[str]:
    """The patterns of the names of weights, of those parts that have none in the folder yet."""
    patterns = []
    for part in parts:
        stems = {STEMS[LOADED[part][0]], *(["pytorch_model"] if ending == "bin" else [])}
        if part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            try:
                _weight_files(folder, part, variant)
            except ValueError:
                middle, shard = "" if variant is None else f".{variant}", "-?????-of-?????"
                for name in (middle, f"{middle}{shard}", f"{shard}{middle}"):
                    patterns += [f"{part}/{stem}{name}.{ending}" for stem in stems]
    return patterns


def _weight_files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The files of weights of a part: one, or all of its shards; safetensors if there are any."""
    stem, middle = STEMS[LOADED[part][0]], "" if variant is None else re.escape(f".{variant}")
    shard = r"(-\d{5}-of-(\d{5}))?"
    there = sorted(os.listdir(folder / part)) if (folder / part).is_dir() else []
    for ending, start in (("safetensors", stem), ("bin", stem), ("bin", "pytorch_model")):
        # diffusers writes the variant before the number, transformers after it.
        names = re.compile(f"{start}(?:{middle}{shard}|{shard}{middle})\\.{ending}")
        found = [m for name in there if (m := names.fullmatch(name))]
        if found:
            break
    whole = [m.string for m in found if not (m[1] or m[3])]
    total = {m[2] or m[4] for m in found} - {None}
    parts = [m.string for m in found if m[1] or m[3]]
    if not whole and total != {f"{len(parts):05}"}:
        raise ValueError(
            f"its {part} has {'not all' if found else 'no'} weights"
            + ("" if variant is None else f" of variant {variant}")
            + ("" if found else _other_variants(stem, there, variant))
        )
    return [folder / part / name for name in whole[:1] or parts]


def _other_variants(stem: str, there: list[str], variant: str | None) -> str:
    """What to do about weights of other variants than the one that is asked for."""
    kind = re.compile(rf"{stem}(\.([\w-]+?))?(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)")
    others = [m for name in there if (m := kind.fullmatch(name))]
    if not others:
        return ""
    if variant is None:
        return f", but some of variant {brief(others[0][2])}: pass variant="
    return (
        f", but {brief(others[0][0])}: variant= is of all parts. Leave it out if the others have such "
        f"weights too; if not, copy this file to {stem}.{variant}.{others[0][4]}"
    )


def _link(path: Path, into: Path) -> None:
    for link in (os.symlink, os.link, shutil.copyfile):  # Windows may have no links
        try:
            link(path, into)
        except OSError:
            continue
        return
    raise OSError(f"{path} cannot be copied to {into}")


def _build(part: str, kind: list[str], settings: dict[str, Any], held: list[int]) -> nn.Module:
    """Build a part without its numbers, and check that it has no more of them than its weights.

    Twice as many are let through, for a part that lacks some weights is refused with their names.
    """
    import diffusers
    import transformers

    with bounded(part, held), torch.device("meta"):
        if kind[0] == "diffusers":
            model: nn.Module = getattr(diffusers, kind[1])(**settings)
        else:
            model = getattr(transformers, kind[1])(transformers.CLIPTextConfig(**settings))
    asked = sum(parameter.numel() for parameter in model.parameters())
    if asked > 2 * sum(held) + 2**20:
        raise ValueError(
            f"weights of the {part} are missing: its configuration asks for {asked} numbers, its files "
            f"have {sum(held)}"
        )
    return model


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, **metadata: str) -> None:
    """Write tensors to safetensors that diffusers and transformers read."""
    import safetensors.torch

    safetensors.torch.save_file(dict(tensors), path, metadata={**metadata, "format": "pt"})
