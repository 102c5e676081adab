"""The words of CLIP's tokenizers, copied from files of strangers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .edm.checks import brief
from .reading import JSON, SETTINGS, MissingFile, parse_json, read_text

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
TOKENS = 2**20
"""The most tokens; CLIP has 49,408."""

LENGTH = 10_000
"""The most tokens of a prompt; CLIP has 77."""


def copy_tokenizer(find: Callable[[str], Path], into: Path) -> None:
    """Write the vocabulary, the merges and the special tokens of a CLIP tokenizer into a folder.

    Args:
        find: the path of a file of the tokenizer by its name; a ValueError if there is none.
        into: an empty folder.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    config, special, added = (
        _read(find, name, optional=True)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    whole: dict[str, Any] = {}
    if _has(find, "vocab.json"):
        vocabulary = _read(find, "vocab.json")
        merges = read_text(find("merges.txt"))
    else:
        whole = _read(find, "tokenizer.json")
        model = whole.get("model")
        model = model if isinstance(model, dict) else {}
        vocabulary = model.get("vocab", {})
        pairs = _list(model.get("merges"))
        merges = "#version: 0.2\n" + "".join(f"{_pair(pair)}\n" for pair in pairs)
    _check_vocabulary(vocabulary)
    _check_vocabulary(added)
    clean = {key: _token(config[key]) for key in SPECIAL if config.get(key) is not None}
    length = config.get("model_max_length", 77)
    if type(length) not in (int, float) or not length >= 2:
        raise ValueError(f"its tokenizer has a model_max_length of {brief(length)}")
    decoder = config.get("added_tokens_decoder")
    if decoder is None and "added_tokens" in whole:
        decoder = {
            str(entry.get("id")): {k: v for k, v in entry.items() if k != "id"}
            for entry in _list(whole["added_tokens"])
            if isinstance(entry, dict)
        }
    if decoder is not None:
        clean["added_tokens_decoder"] = _decoder(decoder)
    # Prompts are padded to this length. Text encoders refuse more tokens than they have positions.
    clean |= {"model_max_length": min(int(length), LENGTH) if length < 2**60 else 77}
    clean["tokenizer_class"] = "CLIPTokenizer"
    content: dict[str, Any] = {"tokenizer_config.json": clean, "vocab.json": vocabulary}
    if special:
        tokens = {key: _token(special[key]) for key in SPECIAL if special.get(key) is not None}
        content["special_tokens_map.json"] = tokens
    if added:
        content["added_tokens.json"] = added
    for name, value in content.items():
        (into / name).write_text(json.dumps(value), encoding="utf-8")
    (into / "merges.txt").write_text(merges, encoding="utf-8")


def _has(find: Callable[[str], Path], name: str) -> bool:
    try:
        find(name)
    except MissingFile:
        return False
    return True


def _read(find: Callable[[str], Path], name: str, *, optional: bool = False) -> dict[str, Any]:
    if optional and not _has(find, name):
        return {}
    most = (
        JSON if name in ("vocab.json", "tokenizer.json") else 4 * SETTINGS
    )  # words added have flags
    return parse_json(read_text(find(name), most), f"its {name}")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > TOKENS:
        raise ValueError(f"its tokenizer is damaged: {brief(value)} in place of a list of tokens")
    return value


def _pair(value: Any) -> str:
    words = value.split(" ") if isinstance(value, str) else value
    texts = isinstance(words, list) and all(isinstance(word, str) and word for word in words)
    if not texts or len(words) != 2 or any(c in word for word in words for c in " \n"):
        raise ValueError(f"its tokenizer is damaged: {brief(value)} is no pair of tokens")
    return " ".join(words)


def _check_vocabulary(words: Any) -> None:
    numbers = words.values() if isinstance(words, dict) else [None]
    if not all(type(n) is int and 0 <= n < TOKENS for n in numbers):
        raise ValueError("its tokenizer is damaged: its vocabulary does not number words")


def _token(value: Any) -> Any:
    """A special token, as its text or with the flags that it may have."""
    if isinstance(value, str) and 0 < len(value) <= 1000:
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {key: value[key] for key in FLAGS if type(value.get(key)) is bool}
        return {"__type": "AddedToken", "content": _token(value["content"]), **flags}
    raise ValueError(f"its tokenizer is damaged: {brief(value)} is no token")


def _decoder(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or len(value) > TOKENS:
        raise ValueError(f"its tokenizer is damaged: {brief(value)} in place of numbered tokens")
    tokens = {}
    for key, token in value.items():
        if not (key.isdecimal() and len(key) < 9 and int(key) < TOKENS and isinstance(token, dict)):
            raise ValueError(f"its tokenizer is damaged: {brief(key)} is no number of a token")
        tokens[key] = {k: v for k, v in _token(token).items() if k != "__type"}
    return tokens
