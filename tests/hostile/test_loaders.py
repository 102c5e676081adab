"""Files from strangers: every loader under a clock, a limit of memory and an ear for what is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from odesolvers.models import load_stable_diffusion

from . import stable_diffusion
from .stable_diffusion import CODE, both, code, content, written
from .watch import Report, in_child

# Of every kind about as many files as take a few seconds; `make fuzz` reads others.
SHARES = {
    "edm": 40,
    "states": 60,
    "calibrations": 15,
    "stable-diffusion": 700,
    "burdens": 90,
}


def check(report: Report) -> None:
    assert not report.broken, "\n".join(report.broken)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
class TestCorpus:
    @pytest.mark.parametrize("kind", SHARES)
    def test_a_part_of_the_files(self, kind: str) -> None:
        check(in_child(kind, SHARES[kind]))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", SHARES)
    def test_all_files(self, kind: str) -> None:
        check(in_child(kind, 1))

    @pytest.mark.slow
    def test_there_are_enough_of_every_kind(self) -> None:
        from .__main__ import KINDS

        counts = {kind: sum(1 for _ in cases()) for kind, cases in KINDS.items()}
        assert min(counts.values()) > 100, counts
        assert sum(counts.values()) > 5000, counts


def loads(path: Path) -> object:
    return path.read_bytes()


def runs(path: Path) -> object:
    exec(compile(path.read_text(), str(path), "exec"))
    return None


def unpickles(path: Path) -> object:
    import pickle

    return pickle.loads(b"cos\nsystem\n.")


def asks(path: Path) -> object:
    return input()


def grows(path: Path) -> object:
    return bytearray(700 * 2**20)


def raises(path: Path) -> object:
    raise KeyError(path)


def shouts(path: Path) -> object:
    raise ValueError("\x1b[2J")


def prints(path: Path) -> object:
    os.write(1, b"Ignored\n")
    raise ValueError("it is damaged")


def logs(path: Path) -> object:
    print("LOAD REPORT: \x1b[2J", file=sys.stderr)
    raise ValueError("it is damaged")


def mutters(path: Path) -> object:
    raise ValueError("it is damaged") from OSError("\x1b[2J")


BROKEN: dict[Callable[[Path], object], str] = {
    loads: "loaded",
    runs: "ran something",
    unpickles: "ran something",
    asks: "ran something",
    grows: "MB beyond its size",
    raises: "KeyError",
    shouts: "a traceback that prints",
    prints: "printed 'Ignored",
    logs: "printed 'LOAD REPORT",
    mutters: "a traceback that prints",
}

WATCH = """
from tests.hostile.test_loaders import BROKEN
from tests.hostile.watch import Case, Loader, watched

def write(folder):
    (folder / "a").write_text("1")
    return folder / "a"

loaders = {load.__name__: Loader(load, (ValueError,)) for load in BROKEN}
watched([Case(name, name, write) for name in loaders], loaders)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_the_watch_notices_every_broken_promise() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCH],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    outcomes = [json.loads(line)[0] for line in done.stdout.splitlines() if line[0] == "["]
    assert len(outcomes) == len(BROKEN), done.stderr
    for expected, outcome in zip(BROKEN.values(), outcomes, strict=True):
        assert expected in outcome


@pytest.mark.parametrize(
    "entry",
    [
        {"vae": ["evil", "AutoencoderKL"]},
        {"unet": ["evil", "UNet2DConditionModel"]},
        {"scheduler": ["evil", "PNDMScheduler"]},
        {"text_encoder": ["evil", "CLIPTextModel"]},
        {"text_encoder": ["transformers", "AutoModel"]},
        {"tokenizer": ["transformers", "AutoTokenizer"]},
        {"safety_checker": ["evil", "Evil"]},
        {"another": ["evil", "Evil"]},
        {"_class_name": ["pipeline", "Evil"]},
        {"_class_name": "evil.Evil"},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["folder", "configuration"])
def test_no_library_sees_a_folder_that_names_other_classes(
    entry: dict[str, object], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that versions that would import what it names have nothing to import."""
    diffusers = pytest.importorskip("diffusers")
    import transformers

    stable_diffusion.home()  # loads a genuine one

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a library was asked to load the folder")

    for place in (
        diffusers.DiffusionPipeline,
        diffusers.ModelMixin,
        diffusers.SchedulerMixin,
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
    ):
        monkeypatch.setattr(place, "from_pretrained", loaded)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", loaded)
    case = stable_diffusion.folder(
        "evil", both(code, written("model_index.json", {**content("model_index.json"), **entry}))
    )
    path = case.write(tmp_path)
    single = stable_diffusion.home() / "a.safetensors"
    with pytest.raises(ValueError, match=r"which is not loaded|it is a .*; supported are"):
        load_stable_diffusion(path if how == "folder" else single, config=path)
    assert not list(tmp_path.rglob("RAN"))


def test_libraries_see_a_copy_without_what_they_do_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code beside genuine parts, and requests for remote code in every configuration, are left out."""
    diffusers = pytest.importorskip("diffusers")
    seen: dict[str, str] = {}
    genuine = diffusers.UNet2DConditionModel.from_pretrained.__func__

    def spy(cls: type, place: Path, *args: object, **options: object) -> object:
        root = Path(place).parent
        seen.update({str(p.relative_to(root)): "" for p in root.rglob("*") if p.is_file()})
        seen.update({str(p.relative_to(root)): p.read_text() for p in root.rglob("*.json")})
        return genuine(cls, place, *args, **options)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", classmethod(spy))
    names = [name for name in stable_diffusion.JSONS if "vocab" not in name]
    remote = [written(name, {**content(name), **stable_diffusion.REMOTE}) for name in names[1:]]
    path = stable_diffusion.folder("remote", both(code, *remote)).write(tmp_path)
    load_stable_diffusion(path)
    assert "unet/config.json" in seen
    assert not [name for name in seen if name.endswith(".py")]
    assert "evil" not in "".join(seen.values())
    assert not list(tmp_path.rglob("RAN"))


def test_the_code_of_the_corpus_would_have_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(
        CODE.partition("from diffusers")[0].replace("os.system", "str")
    )
    exec(
        compile((tmp_path / "evil.py").read_text(), "evil", "exec"),
        {"__file__": str(tmp_path / "a")},
    )
    assert (tmp_path / "RAN").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "a.ckpt"])
def test_pickles_of_weights_are_data(name: str, zipped: bool, tmp_path: Path) -> None:
    bomb = stable_diffusion.pickled(name, {"a": stable_diffusion.Bomb()}, zipped)
    if name == "a.ckpt":
        path = bomb(tmp_path)
    else:
        gone = "unet/diffusion_pytorch_model.safetensors"
        path = stable_diffusion.folder("b", both(lambda p: os.unlink(p / gone), bomb)).write(
            tmp_path
        )
    with pytest.raises(
        ValueError, match=r"objects of other libraries beside tensors \(posix\.system"
    ):
        stable_diffusion.load(path)
    assert not Path("RAN").exists()


def test_links_may_lead_to_other_places_of_the_folder_alone(tmp_path: Path) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"

    def within(path: Path) -> None:
        (path / weights).rename(path / "shared")
        (path / weights).symlink_to("../shared")

    def outside(path: Path) -> None:
        (path / weights).rename(path.parent / "elsewhere")
        (path / weights).symlink_to(path.parent / "elsewhere")

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    stable_diffusion.load(stable_diffusion.folder("in", within).write(tmp_path / "a"))
    with pytest.raises(ValueError, match="is a link to another place: put a copy of the file"):
        stable_diffusion.load(stable_diffusion.folder("out", outside).write(tmp_path / "b"))
