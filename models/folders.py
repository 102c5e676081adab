"""Folders of diffusers pipelines from strangers, copied without what could run code or grow.

diffusers and transformers import the classes that the files of a folder name, and follow references to
modules, kernels and adapters; which ones depends on their versions. So they never see such a folder, but
a copy: the index with classes from the table below, of each configuration the settings of its class, the
words of each tokenizer, and links to weights in safetensors. Anything else is left out or refused.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .archives import read_archive
from .edm.checks import brief
from .reading import MissingFile, read_header, read_json
from .schedules import DISCRETE, EDM, FLOW
from .tokenizers import copy_tokenizer

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
    "feature_extractor": ("transformers", ("CLIPFeatureExtractor", "CLIPImageProcessor")),
    "image_encoder": ("transformers", ("CLIPVisionModelWithProjection",)),
}
"""Those of parts that a folder may have, and that are not loaded."""

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""The supported pipeline classes of diffusers."""

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""The names of weights, without ending, that each library gives."""

CLIP = (
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps"),
    *("attention_dropout", "initializer_range", "initializer_factor"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
"""The settings of a text encoder."""

BLOCKS = 500
"""The most blocks of a network by the product of its settings; Stable Diffusion XL has 60."""

TIMESTEPS = 100_000
"""The highest whole number among the settings of a scheduler, which make tables of that length."""


def copy_folder(
    folder: Path, into: Path, *, variant: str | None = None, held: int | None = None
) -> dict[str, Any]:
    """Write the clean copy of a folder, and return its index.

    Args:
        folder: a folder in diffusers' layout.
        into: an empty folder.
        variant: variant of the weights, such as "fp16".
        held: how many numbers the weights have that belong to the configurations, in another file; None
            for those of the folder, to which the copy has links.

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
        settings = _settings(part, index[part][1], read_json(inside(folder, part, name)))
        (into / part / name).write_text(json.dumps(settings), encoding="utf-8")
        if part == "scheduler":
            continue
        here = _link_weights(folder, part, into / part, variant) if held is None else held
        _check_size(part, index[part], settings, here)
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
        clean["force_zeros_for_empty_prompt"] = (
            index.get("force_zeros_for_empty_prompt", True) is True
        )
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


def _settings(part: str, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a configuration that the class has, checked in their forms and sizes."""
    named = config.get("_class_name")
    if LOADED[part][0] == "diffusers":
        import diffusers

        if named is not None and named != kind:
            raise ValueError(
                f"its {part} is a {kind} by the index and {brief(named)} by its own file"
            )
        names: Iterable[str] = inspect.signature(getattr(diffusers, kind).__init__).parameters
    else:
        names = CLIP
    settings = {name: config[name] for name in names if name in config}
    most = TIMESTEPS if part == "scheduler" else 2**31
    for name, value in settings.items():
        values = list(_flat(value))
        if len(values) > (TIMESTEPS if name == "trained_betas" else 100):
            raise ValueError(f"its {part} has a setting {name} of {len(values)} numbers")
        for item in values:
            if isinstance(item, (dict, list)) or (isinstance(item, str) and len(item) > 100):
                raise ValueError(f"its {part} has a setting {name} of another form, {brief(item)}")
            if type(item) is int and abs(item) > most:
                raise ValueError(f"its {part} has a setting {name} = {brief(item)}, above {most}")
    _check_blocks(part, settings)
    return settings


def _flat(value: Any) -> Iterable[Any]:
    """The values in a list, or in lists in it; a value itself that is no list."""
    for item in value if isinstance(value, list) else [value]:
        yield from item if isinstance(item, list) else [item]


def _check_blocks(part: str, settings: Mapping[str, Any]) -> None:
    """Refuse networks of so many blocks that their construction would take minutes."""

    def most(*names: str) -> int:
        numbers = (n for name in names for n in _flat(settings.get(name)))
        return max((n for n in numbers if type(n) is int), default=1)

    depth = most("transformer_layers_per_block", "reverse_transformer_layers_per_block")
    blocks = len(list(_flat(settings.get("block_out_channels"))))
    layers = most(
        "layers_per_block", "num_hidden_layers", "num_encoder_blocks", "num_decoder_blocks"
    )
    if blocks * max(layers, 1) * max(depth, 1) > BLOCKS:
        raise ValueError(f"its {part} has more than {BLOCKS} blocks by its configuration")


def _link_weights(folder: Path, part: str, into: Path, variant: str | None) -> int:
    """Link the weights of a part into a folder, under the names that both libraries look for.

    Pickles are read as data, and written as safetensors. Returns how many numbers there are.
    """
    stem = STEMS[LOADED[part][0]]
    files = _weight_files(folder, part, variant)
    shards: dict[str, str] = {}
    held = 0
    for k, path in enumerate(files, 1):
        name = (
            f"{stem}-{k:05}-of-{len(files):05}.safetensors"
            if len(files) > 1
            else f"{stem}.safetensors"
        )
        if path.suffix == ".bin":
            write_tensors(read_archive(inside(folder, part, path.name)), into / name)
        else:
            _link(inside(folder, part, path.name), into / name)
        _, entries = read_header(into / name)
        shards |= dict.fromkeys(entries, name)
        held += sum(entry.numel for entry in entries.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": held}, "weight_map": shards}
        (into / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return held


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
        )
    return [folder / part / name for name in whole[:1] or parts]


def _link(path: Path, into: Path) -> None:
    for link in (os.symlink, os.link, shutil.copyfile):  # Windows may have no links
        try:
            link(path, into)
        except OSError:
            continue
        return
    raise OSError(f"{path} cannot be copied to {into}")


def _check_size(part: str, kind: list[str], settings: dict[str, Any], held: int) -> None:
    """Check that a part, which is built without its numbers, has no more of them than its weights.

    Twice as many are let through, for a part that lacks some weights is refused with their names.
    """
    import diffusers
    import transformers

    with torch.device("meta"):
        if kind[0] == "diffusers":
            model = getattr(diffusers, kind[1])(**settings)
        else:
            model = getattr(transformers, kind[1])(transformers.CLIPTextConfig(**settings))
    asked = sum(parameter.numel() for parameter in model.parameters())
    if asked > 2 * held + 2**20:
        raise ValueError(
            f"weights of the {part} are missing: its configuration asks for {asked} numbers, its files "
            f"have {held}"
        )


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to safetensors that diffusers and transformers read."""
    import safetensors.torch

    safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
