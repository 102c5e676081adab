"""The words of CLIP's tokenizers, copied from files of strangers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .edm.checks import brief
from .reading import JSON, SETTINGS, MissingFile, parse_json, read_text

END = "<|endoftext|>"
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": None}
"""The special tokens, and what they are where the files do not say it. Prompts of Stable Diffusion 1 are
padded with the end; those of 2 and of the second encoder of XL with "!"."""

USUAL = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
"""Settings by which a tokenizer could lay out prompts, and the values of all of Stable Diffusion."""

FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
TOKENS = 2**20
"""The most tokens; CLIP has 49,408."""

LENGTH = 10_000
"""The most tokens of a prompt; CLIP has 77."""

WORD_END = "</w>"
"""The end of tokens that end a word."""


def letters() -> list[str]:
    """The 256 bytes as printable characters, in the order of CLIP's vocabulary (and of GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + k) for k in range(256 - len(printable))]


def copy_tokenizer(find: Callable[[str], Path], into: Path) -> None:
    """Write the vocabulary, the merges and the special tokens of a CLIP tokenizer into a folder.

    As transformers reads them, special_tokens_map.json goes before tokenizer_config.json, unless that
    numbers added tokens: then it is not read. The published Stable Diffusion 2 pads by the former.

    Args:
        find: the path of a file of the tokenizer by its name; a ValueError if there is none.
        into: an empty folder.

    Raises:
        ValueError: if a file is missing or damaged, or there are not the words by which CLIP reads text.
    """
    config, special, added = (
        _read(find, name, optional=True)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    whole: dict[str, Any] = {}
    separate = _has(find, "vocab.json")
    if separate:
        vocabulary, merges = _read(find, "vocab.json"), read_text(find("merges.txt"))
    if not separate or _has(find, "tokenizer.json"):  # newer versions of the library write it alone
        whole = _read(find, "tokenizer.json")
        words, pairs = _model(whole)
        if separate and (words, pairs) != (vocabulary, _pairs(merges)):
            raise ValueError(
                "its tokenizer.json has other words than its vocab.json and merges.txt: one of them is "
                "left over from another tokenizer; remove it"
            )
        vocabulary, merges = words, "#version: 0.2\n" + "".join(f"{pair}\n" for pair in pairs)
    _check_vocabulary(vocabulary)
    _check_vocabulary(added)
    _check_layout(config, whole)
    special = _special(config) | _special({} if "added_tokens_decoder" in config else special)
    clean: dict[str, Any] = {
        key: {"__type": "AddedToken", **token} if isinstance(token, dict) else token
        for key, token in special.items()
    }
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
    numbered = [token["content"] for token in clean.get("added_tokens_decoder", {}).values()]
    _check_words(vocabulary, merges, {*added, *numbered}, special)
    # Prompts are padded to this length. Text encoders refuse more tokens than they have positions.
    clean |= {"model_max_length": min(int(length), LENGTH) if length < 2**60 else 77}
    clean["tokenizer_class"] = "CLIPTokenizer"
    content: dict[str, Any] = {"tokenizer_config.json": clean, "vocab.json": vocabulary}
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


def _model(whole: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """The words and the merges of a file that holds a whole tokenizer."""
    model = whole.get("model")
    model = model if isinstance(model, dict) else {}
    return model.get("vocab", {}), [_pair(pair) for pair in _list(model.get("merges"))]


def _pairs(merges: str) -> list[str]:
    """The merges in a file of their own."""
    return [line for line in merges.splitlines() if line and not line.startswith("#version")]


def _pair(value: Any) -> str:
    words = value.split(" ") if isinstance(value, str) else value
    texts = isinstance(words, list) and all(isinstance(word, str) and word for word in words)
    if not texts or len(words) != 2 or any(c in word for word in words for c in " \n"):
        raise ValueError(f"its tokenizer is damaged: {brief(value)} is no pair of tokens")
    return " ".join(words)


def _check_layout(config: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """Check that prompts are padded and cut at the end."""
    said = [(name, config.get(name), usual) for name, usual in USUAL.items()]
    for name in ("padding", "truncation"):
        part = whole.get(name)
        if isinstance(part, dict):
            said.append((f"{name} direction", part.get("direction"), "Right"))
    for name, value, usual in said:
        if value not in (None, usual):
            raise ValueError(
                f"its tokenizer has {name} = {brief(value)}, and those of Stable Diffusion have "
                f"{usual!r}: it is that of another model, or was changed; set it to that"
            )


def _check_vocabulary(words: Any) -> None:
    numbers = words.values() if isinstance(words, dict) else [None]
    if not all(type(n) is int and 0 <= n < TOKENS for n in numbers):
        raise ValueError("its tokenizer is damaged: its vocabulary does not number words")


def _check_words(
    vocabulary: Mapping[str, int], merges: str, added: Collection[str], special: Mapping[str, Any]
) -> None:
    """Check that all text has tokens, and that the vocabulary and the merges belong together.

    The library gives special tokens that have no number the next one, which another may have already.
    """
    for key, usual in SPECIAL.items():
        token = special.get(key, usual)
        word = token["content"] if isinstance(token, dict) else token
        if word is None:
            raise ValueError(
                f"its tokenizer names no {key}, and models differ in it: state it in its "
                f"tokenizer_config.json ({END!r} for Stable Diffusion 1 and the first of XL, '!' for "
                "Stable Diffusion 2 and the second of XL)"
            )
        if word not in vocabulary and word not in added:
            raise ValueError(
                f"its tokenizer has no number for its {key}, {brief(word)}: its vocabulary of "
                f"{len(vocabulary)} words is not that of CLIP"
            )
    single = {letter + end for letter in letters() for end in ("", WORD_END)}
    absent = sorted(single - vocabulary.keys())
    if absent:
        raise ValueError(
            f"its tokenizer has no number for {len(absent)} of the 512 letters of CLIP, such as "
            f"{brief(absent[0])}, so it cannot read every text: its vocabulary is not that of CLIP"
        )
    made = {"".join(pair.split(" ")) for pair in _pairs(merges)}
    words = {token["content"] if isinstance(token, dict) else token for token in special.values()}
    odd = sorted(vocabulary.keys() - single - made - words - {*SPECIAL.values()} - {*added})
    if odd:
        raise ValueError(
            f"its tokenizer has {len(odd)} words that its merges do not make, such as {brief(odd[0])}: "
            "its vocabulary and its merges are of different models, or one is damaged"
        )


def _special(values: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens among settings."""
    return {key: _token(values[key]) for key in SPECIAL if values.get(key) is not None}


def _token(value: Any) -> Any:
    """A special token, as its text or with the flags that it may have."""
    if isinstance(value, str) and 0 < len(value) <= 1000:
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {key: value[key] for key in FLAGS if type(value.get(key)) is bool}
        return {"content": _token(value["content"]), **flags}
    raise ValueError(f"its tokenizer is damaged: {brief(value)} is no token")


def _decoder(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or len(value) > TOKENS:
        raise ValueError(f"its tokenizer is damaged: {brief(value)} in place of numbered tokens")
    tokens = {}
    for key, token in value.items():
        if not (key.isdecimal() and len(key) < 9 and int(key) < TOKENS and isinstance(token, dict)):
            raise ValueError(f"its tokenizer is damaged: {brief(key)} is no number of a token")
        tokens[key] = _token(token)
    return tokens
