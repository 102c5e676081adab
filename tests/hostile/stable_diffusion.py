"""Hostile folders, single files and archives of Stable Diffusion."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes

from odesolvers.models import load_stable_diffusion, save_tiny_stable_diffusion

from ..models.original_layout import original_layout
from .bend import (
    TEXTS,
    WILD,
    bent_archive,
    bent_bytes,
    bent_json,
    bent_safetensors,
    changed,
    places,
)
from .corpus import file, saved
from .watch import Case, Loader

CODE = """import os, sys
open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "RAN"), "w").close()
os.system("touch RAN")
from diffusers import *
from transformers import *
class Evil(StableDiffusionPipeline): pass
class AutoencoderKL(AutoencoderKL): pass
"""
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class Bomb:
    """Pickles as a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch RAN",)


@cache
def home() -> Path:
    """The genuine folder, beside a single file and an archive of it."""
    folder = Path(tempfile.mkdtemp(prefix="genuine"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_tiny_stable_diffusion(folder / "folder")
        weights = original_layout(load_stable_diffusion(folder / "folder").pipeline)
    (folder / "a.safetensors").write_bytes(saved(weights))
    torch.save({"state_dict": weights}, folder / "a.ckpt")
    return folder


def load(path: Path) -> object:
    """Load a folder, or a single file with the genuine configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {} if path.is_dir() else {"config": home() / "folder"}
        return load_stable_diffusion(path, **options)  # type: ignore[arg-type]


def load_with_config(path: Path) -> object:
    """Load the genuine single file with a hostile configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_stable_diffusion(home() / "a.safetensors", config=path)


LOADERS = {
    "sd": Loader(load, (ValueError, FileNotFoundError)),
    "config": Loader(load_with_config, (ValueError, FileNotFoundError)),
}


def folder(label: str, change: Callable[[Path], object], loader: str = "sd") -> Case:
    """A case of a changed copy of the genuine folder."""

    def write(place: Path) -> Path:
        path = place / "m"
        shutil.copytree(home() / "folder", path)
        change(path)
        return path

    return Case(f"{loader}: {label}", loader, write)


def written(name: str, content: Any) -> Callable[[Path], object]:
    """Writes a file of the folder: bytes, text, or JSON."""

    def change(path: Path) -> None:
        data = content(path) if callable(content) else content
        if not isinstance(data, bytes):
            data = (data if isinstance(data, str) else json.dumps(data)).encode(errors="replace")
        (path / name).write_bytes(data)

    return change


def content(name: str) -> Any:
    return json.loads((home() / "folder" / name).read_text())


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: [change(path) for change in changes]


def code(path: Path) -> None:
    """Puts code under all names that libraries look for."""
    for part in ("", *PARTS):
        for name in (
            "evil",
            "pipeline",
            "modeling",
            "tokenization",
            "__init__",
            "diffusers",
            "CLIPTextModel",
        ):
            (path / part / f"{name}.py").write_text(CODE)


JSONS = (
    "model_index.json",
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
)
ENTRIES: tuple[Any, ...] = (
    *(
        ["evil", "AutoencoderKL"],
        ["os", "system"],
        ["diffusers", "evil.Evil"],
        ["builtins", "eval"],
    ),
    *(
        ["diffusers", "DiffusionPipeline"],
        ["transformers", "pipeline"],
        ["transformers", "AutoModel"],
    ),
    *(["diffusers.models", "AutoencoderKL"], ["..evil", "Evil"], ["pipelines", "Evil"], ["", ""]),
    *(
        ["diffusers"],
        ["diffusers", None],
        [None, "Evil"],
        "evil",
        7,
        {},
        {"evil": "Evil"},
        [["a"], "b"],
    ),
)
REMOTE = {
    "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil"),
    "custom_pipeline": "evil",
    "trust_remote_code": True,
    "_attn_implementation": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "use_kernels": True,
    "quantization_config": {"quant_method": "evil", "modules_to_not_convert": ["evil"]},
    "tokenizer_class": "evil.Evil",
    "chat_template": "{{ ''.__class__.__mro__ }}",
    "dtype": "load",
    "torch_dtype": "load",
}


def stable_diffusion() -> Iterator[Case]:
    """Folders with code, links, damaged and endless content; single files; archives."""
    index = content("model_index.json")
    for loader in ("sd", "config"):
        for part in (*PARTS, "safety_checker", "another"):
            for entry in ENTRIES:
                label = f"index {part} = {entry}"
                yield folder(
                    label, both(code, written("model_index.json", {**index, part: entry})), loader
                )
        for kind in (
            ["pipeline", "Evil"],
            ["evil", "Evil"],
            "Evil",
            "evil.Evil",
            "DiffusionPipeline",
            7,
            None,
        ):
            bad = {**index, "_class_name": kind}
            yield folder(f"pipeline {kind}", both(code, written("model_index.json", bad)), loader)
        for name in JSONS:
            for key, value in REMOTE.items():
                bad = {**content(name), key: value}
                yield folder(f"{name} with {key}", both(code, written(name, bad)), loader)
        yield from damaged(loader)
    yield folder("an adapter", both(code, written("text_encoder/adapter_config.json", ADAPTER)))
    yield folder("an adapter of the unet", written("unet/adapter_config.json", ADAPTER))
    yield folder(
        "a LoRA beside", written("pytorch_lora_weights.safetensors", saved({"a": torch.ones(2)}))
    )
    yield from weights()
    for path, bend in (
        (home() / "a.safetensors", bent_safetensors),
        (home() / "a.ckpt", bent_archive),
    ):
        for label, data in bend(path.read_bytes()):  # type: ignore[operator]
            yield file("sd", f"single file {label}", path.name, data)
    lora = {f"lora_unet_{k}.lora_down.weight": torch.ones(2, 2) for k in range(3)}
    yield file("sd", "a LoRA alone", "lora.safetensors", saved(lora))
    for zipped in (True, False):
        for what in (
            Bomb(),
            {"state_dict": Bomb()},
            {"state_dict": {"model.diffusion_model.a": Bomb()}},
        ):
            yield Case("sd: pickled command", "sd", pickled("a.ckpt", what, zipped))
    yield from loud()


CONTROL = "\x1b[2J\x1b]0;evil\x07"


def loud() -> Iterator[Case]:
    """Names that are control characters, and tokens of which the libraries have something to say."""
    for whole in STEMS:
        weights = load_bytes((home() / "folder" / whole).read_bytes())
        first, *_ = sorted(weights)
        for label, bad in (
            ("added", weights | {CONTROL: torch.ones(2)}),
            ("renamed", {CONTROL if n == first else n: w for n, w in weights.items()}),
            ("twice", weights | {f"text_model.{first}": weights[first].clone()}),
            ("many", weights | {f"{CONTROL}{k}": torch.ones(1) for k in range(100)}),
        ):
            yield folder(f"{whole} loud, {label}", written(whole, saved(bad)))
    weights = load_bytes((home() / "a.safetensors").read_bytes())
    for name in (
        "",
        "model.diffusion_model.",
        "first_stage_model.",
        "cond_stage_model.",
        "v_pred.",
    ):
        data = saved(weights | {name + CONTROL: torch.ones(2)})
        yield file("sd", f"single file loud, {name}", "a.safetensors", data)
    token = {"__type": CONTROL, "content": "<|endoftext|>", "special": True, CONTROL: CONTROL}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        for key in ("bos_token", "eos_token", "unk_token", "pad_token", CONTROL):
            for value in (token, token | {"content": CONTROL}, CONTROL, "", 7):
                path = f"tokenizer/{name}"
                old = content(path) if (home() / "folder" / path).exists() else {}
                yield folder(f"{name} {key!a} = {value!a:.30}", written(path, old | {key: value}))


STEMS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)

ADAPTER = {
    "base_model_name_or_path": "../../evil",
    "peft_type": "LORA",
    "auto_mapping": {"a": "evil"},
}


def pickled(name: str, what: Any, zipped: bool) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(what, folder / name, _use_new_zipfile_serialization=zipped)
        return folder / name

    return write


def damaged(loader: str) -> Iterator[Case]:
    """Folders whose JSON is wild or no JSON, and with links and devices in place of files."""
    for name in (*JSONS, "tokenizer/merges.txt"):
        for text in TEXTS:
            yield folder(f"{name} {text[:8]!r}", written(name, text), loader)
        for target in ("/dev/zero", "/etc/passwd", "../../x", "nothing", "config.json"):
            yield folder(
                f"{name} -> {target}", lambda p, n=name, t=target: linked(p / n, t), loader
            )  # type: ignore[misc]
        yield folder(
            f"{name} a pipe", lambda p, n=name: (os.unlink(p / n), os.mkfifo(p / n)), loader
        )  # type: ignore[misc]
        yield folder(f"without {name}", lambda p, n=name: os.unlink(p / n), loader)  # type: ignore[misc]
    for name in JSONS[:-1]:
        for path in places(content(name), 1):
            for value in (*WILD, ...):
                bad = changed(content(name), path, value)
                yield folder(f"{name} {path[0]} = {ascii(value)[:20]}", written(name, bad), loader)
    for part in PARTS:
        yield folder(f"{part} elsewhere", lambda p, n=part: moved(p, n), loader)  # type: ignore[misc]
        yield folder(f"{part} a file", lambda p, n=part: replaced(p / n), loader)  # type: ignore[misc]
    tokenizer = content("tokenizer/tokenizer.json")
    for value in WILD:
        for key in ("vocab", "merges"):
            bad = {**tokenizer, "model": {**tokenizer["model"], key: value}}
            change = both(
                written("tokenizer/tokenizer.json", bad),
                lambda p: os.unlink(p / "tokenizer/vocab.json"),
            )
            yield folder(f"tokenizer.json {key} = {ascii(value)[:20]}", change, loader)


def linked(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def moved(path: Path, name: str) -> None:
    (path / name).rename(path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")


def replaced(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def weights() -> Iterator[Case]:
    """Weights that are commands in pickles, shards of other names, links, or too few."""
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        whole = f"{part}/{stem}.safetensors"
        data = (home() / "folder" / whole).read_bytes()

        def gone(path: Path, whole: str = whole) -> None:
            os.unlink(path / whole)

        for zipped in (True, False):
            for name in (stem, "pytorch_model"):
                write = pickled(f"{part}/{name}.bin", {"a": Bomb()}, zipped)
                yield folder(f"{part} pickled command", both(gone, write))
        for label, bent in bent_safetensors(data):
            yield folder(f"{part} weights {label}", written(whole, bent))
        for target in ("/dev/zero", "/etc/passwd", f"../../../{stem}.safetensors"):
            yield folder(
                f"{part} weights -> {target}", lambda p, n=whole, t=target: linked(p / n, t)
            )  # type: ignore[misc]
        for shard in ("../../evil.safetensors", "/etc/passwd", "evil.bin", "", 7, None, "a" * 5000):
            shards = {
                "metadata": {},
                "weight_map": {"a": shard, "b": f"{stem}-00001-of-00002.safetensors"},
            }
            change = both(gone, written(f"{whole}.index.json", shards))
            yield folder(f"{part} shard {str(shard)[:30]}", change)
        for name in (f"{stem}-00001-of-00002", f"{stem}-00001-of-99999", f"{stem}.fp16"):
            yield folder(
                f"{part} only {name}", both(gone, written(f"{part}/{name}.safetensors", data))
            )
        yield folder(f"{part} empty weights", written(whole, saved({"a": torch.zeros(0)})))


def bent(rng: random.Random) -> Case:
    """A folder, single file or archive with random changes."""
    what = rng.choice((*JSONS, *JSONS, "weights", "single", "archive"))
    if what in ("single", "archive"):
        path = home() / ("a.safetensors" if what == "single" else "a.ckpt")
        return file("sd", f"bent {what}", path.name, bent_bytes(path.read_bytes(), rng))
    if what == "weights":
        names = (
            "unet/diffusion_pytorch_model",
            "vae/diffusion_pytorch_model",
            "text_encoder/model",
        )
        name = f"{rng.choice(names)}.safetensors"
        data = bent_bytes((home() / "folder" / name).read_bytes(), rng)
        return folder(f"bent {name}", written(name, data))
    label, bad = next(bent_json(content(what), rng, 1))
    return folder(f"{what} {label}", written(what, bad), rng.choice(("sd", "sd", "config")))
