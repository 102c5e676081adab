"""Tokenizers of folders: the tokens of transformers itself, or an error when the folder is loaded."""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from odesolvers.models import load_stable_diffusion
from odesolvers.models.reading import MissingFile
from odesolvers.models.tokenizers import copy_tokenizer, letters

from .conftest import load_pipeline
from .pipelines import refused

TEXTS = ["", "a cat", "at AT\n\u00e9 \u732b 12!?", "<cat> a<cat>"]
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
END = "<|endoftext|>"


@pytest.fixture
def words(edited):
    """The folder with other words in its vocabulary: by one file, or by two."""

    def make(change, files="two", merges="#version: 0.2\na t</w>\n"):
        folder = edited("1.x", "tokenizer")
        place = folder / "tokenizer"
        if files == "two":
            (place / "tokenizer.json").unlink()
            path = place / "vocab.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(change(content)), encoding="utf-8")
            (place / "merges.txt").write_text(merges, encoding="utf-8")
        else:
            (place / "vocab.json").unlink()
            path = place / "tokenizer.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            model = content["model"]
            model["vocab"] = change(model["vocab"])
            model["merges"] = [line.split() for line in merges.splitlines()[1:]]
            content["added_tokens"] = []
            path.write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


def without(*gone):
    return lambda words: {word: n for word, n in words.items() if word not in gone}


@pytest.mark.parametrize("files", ["one", "two"])
def test_vocabularies_that_cannot_be_those_of_clip(words, files):
    """Each made prompts of other tokens, or failed at the first prompt."""
    genuine = load_stable_diffusion(words(dict, files)).pipeline.tokenizer
    assert genuine("a cat")["input_ids"] == [513, 320, 66, 512, 514]
    for change, match in (
        (lambda words: {}, "no number for its bos_token, .* of 0 words"),
        (without("<|startoftext|>"), "no number for its bos_token, '<.startoftext.>'"),
        (without(END), "no number for its eos_token, '<.endoftext.>'"),
        (without("!"), "no number for 1 of the 512 letters of CLIP, such as '!'"),
        (without("a</w>", "b"), "no number for 2 of the 512 letters of CLIP, such as 'a</w>'"),
        (lambda words: {**words, "cat</w>": 515}, "1 words that its merges do not make, .* 'cat"),
    ):
        refused(words(change, files), f"its tokenizer has {match}")
    refused(words(dict, files, merges="#version: 0.2\n"), "1 words that its merges do not make")


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_without_a_number(edited, name, file):
    """The library gives them the number of words, which another may have already."""
    folder = edited("1.x", "tokenizer", file="tokenizer_config.json", **{name: "<none>"})
    if file == "special_tokens_map.json":
        folder = edited("1.x", "tokenizer", file="tokenizer_config.json", **{name: ...})
        path = folder / "tokenizer" / file
        path.write_text(json.dumps({name: {"content": "<none>"}}), encoding="utf-8")
    refused(folder, f"its tokenizer has no number for its {name}, '<none>'")


@pytest.mark.parametrize(("family", "part"), [("1.x", "tokenizer"), ("xl", "tokenizer_2")])
def test_padding_must_be_said(edited, folders, family, part):
    """Stable Diffusion 1 pads with the end of the text, 2 and the second encoder of XL with "!"."""
    refused(
        edited(family, part, file="tokenizer_config.json", pad_token=...),
        "its tokenizer names no pad",
    )
    folder = edited(family, part, file="tokenizer_config.json", pad_token="!")
    theirs = type(getattr(load_pipeline(folders[family]), part)).from_pretrained(folder / part)
    ours = getattr(load_stable_diffusion(folder).pipeline, part)
    for text in TEXTS:
        found, expected = (t(text, padding="max_length")["input_ids"] for t in (ours, theirs))
        assert found == expected
        assert found[-1] == 0


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("flags", [None, {"special": True, "normalized": False}])
def test_padding_that_two_files_say(edited, folders, flags, whole, numbered):
    """As transformers reads them: the published Stable Diffusion 2 says "!" in one file alone."""
    files = ("vocab.json", "tokenizer_config.json")
    vocabulary, config = (
        json.loads((folders["2.x"] / "tokenizer" / file).read_text(encoding="utf-8"))
        for file in files
    )
    assert config["pad_token"] == END
    added = {str(vocabulary[word]): {"content": word, "special": True} for word in ("!", END)}
    more = {"added_tokens_decoder": added} if numbered else {"errors": "replace"}
    folder = edited("2.x", "tokenizer", file="tokenizer_config.json", **more)
    if not whole:
        (folder / "tokenizer" / "tokenizer.json").unlink()
    special = {"pad_token": "!" if flags is None else {"content": "!", **flags}}
    path = folder / "tokenizer" / "special_tokens_map.json"
    path.write_text(json.dumps(special), encoding="utf-8")
    theirs = type(load_pipeline(folders["2.x"]).tokenizer).from_pretrained(folder / "tokenizer")
    ours = load_stable_diffusion(folder).pipeline.tokenizer
    for text in TEXTS:
        found, expected = (t(text, padding="max_length")["input_ids"] for t in (ours, theirs))
        assert found == expected
        assert (found[-1] == 0) is not numbered


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("padding_side", "left"), ("truncation_side", "left"), ("split_special_tokens", True)),
        *(("padding_side", ["right"]), ("truncation_side", 1)),
    ],
)
def test_prompts_laid_out_otherwise(edited, name, value):
    for family, part in (("1.x", "tokenizer"), ("xl", "tokenizer_2")):
        folder = edited(family, part, file="tokenizer_config.json", **{name: value})
        refused(folder, f"its tokenizer has {name} = ")


@pytest.mark.parametrize("name", ["padding", "truncation"])
def test_prompts_laid_out_otherwise_by_the_whole_tokenizer(edited, name):
    for direction in ("Left", "Right"):
        folder = edited(
            "1.x", "tokenizer", file="tokenizer.json", **{name: {"direction": direction}}
        )
        if direction == "Left":
            refused(folder, f"its tokenizer has {name} direction = 'Left'")
        else:
            load_stable_diffusion(folder)


def test_the_published_vocabulary_of_clip(tmp_path):
    """That of OpenAI's package, which the tokenizers of all families share, in both forms of folders."""
    place = find_spec("clip")
    path = place and Path(place.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    if not path or not path.exists():
        pytest.skip("the package clip has it")
    merges = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    single = letters()
    made = ["".join(line.split()) for line in merges]
    words = [*single, *(c + "</w>" for c in single), *made, "<|startoftext|>", END]
    vocabulary = {word: k for k, word in enumerate(words)}
    assert len(vocabulary) == 49408
    config = {"pad_token": END, "model_max_length": 77, "bos_token": token("<|startoftext|>")}
    model = {"vocab": vocabulary, "merges": [line.split() for line in merges]}
    two = {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges]),
    }
    for number, files in enumerate((two, {"tokenizer.json": json.dumps({"model": model})})):
        folder, into = tmp_path / f"{number}", tmp_path / f"{number} copied"
        folder.mkdir()
        into.mkdir()
        files = {**files, "tokenizer_config.json": json.dumps(config)}
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")

        def find(name, folder=folder):
            if not (folder / name).exists():
                raise MissingFile(name)
            return folder / name

        copy_tokenizer(find, into)
        assert json.loads((into / "vocab.json").read_text(encoding="utf-8")) == vocabulary
        copied = (into / "merges.txt").read_text(encoding="utf-8")
        assert copied.splitlines()[1:] == merges


def token(text):
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": text, "normalized": True, **flags}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_with_flags(edited, folders, capfd, file):
    """As in the published folders; the library printed a line for each of them."""
    folder = edited("1.x", "tokenizer")
    path = folder / "tokenizer" / file
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    marked = {**dict.fromkeys(SPECIAL, token(END)), "bos_token": token("<|startoftext|>")}
    path.write_text(json.dumps({**content, **marked}), encoding="utf-8")
    tokenizer = load_stable_diffusion(folder).pipeline.tokenizer
    assert capfd.readouterr().out == ""
    plain = load_pipeline(folders["1.x"]).tokenizer
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]


@pytest.mark.parametrize("over", [True, False])
def test_tokens_that_were_added(edited, folders, over):
    """Saved over the folder of the tokenizer that had them not, and alone."""
    pipeline = load_pipeline(folders["1.x"])
    pipeline.tokenizer.add_tokens(["<cat>"])
    pipeline.text_encoder.resize_token_embeddings(516)
    folder = edited("1.x", "tokenizer")
    if not over:
        for path in (folder / "tokenizer").iterdir():
            path.unlink()
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    found = load_stable_diffusion(folder).pipeline.tokenizer
    for text in TEXTS:
        assert found(text)["input_ids"] == pipeline.tokenizer(text)["input_ids"]
    assert found("<cat>")["input_ids"] == [513, 515, 514]


@pytest.mark.parametrize("key", ["vocab", "merges"])
def test_two_tokenizers_in_a_folder(edited, key):
    folder = edited("1.x", "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if key == "vocab":
        model["vocab"] |= {"a": model["vocab"]["b"], "b": model["vocab"]["a"]}
    else:
        model["merges"] = [["b", "t</w>"]]
    path.write_text(json.dumps(content), encoding="utf-8")
    refused(folder, r"its tokenizer\.json has other words than its vocab\.json and merges\.txt")
