"""Commands that meet closed pipes, full disks, strange files and Ctrl-C."""

from __future__ import annotations

import io
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import odesolvers_command
from odesolvers import Calibrated, State, cli, opening

from .shell import DIGITS, Shell, files

SAMPLE = f"sample --count 2 --save{DIGITS}"
PICTURES = ["out/sample/000000.png", "out/sample/000001.png"]
WRITTEN = sorted(name.replace(".png", end) for name in PICTURES for end in (".png", ".safetensors"))


def ended(command: str) -> int:
    """The exit code of a command, 0 if it went well."""
    try:
        cli.main(shlex.split(command))
    except SystemExit as error:
        return int(str(error.code))
    return 0


# pipes and disks


@pytest.fixture(params=["pipe", "/dev/full"])
def broken(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A stream that nothing can be written to, though nobody knows before it is flushed."""
    if request.param == "pipe":
        read, write = os.pipe()
        os.close(read)
        stream = os.fdopen(write, "w")
    else:
        stream = open(request.param, "w")  # noqa: SIM115
    yield stream
    stream.close()  # raises if something of the output is still held back


@pytest.mark.parametrize("command", [SAMPLE, "list", "--help", "sample --help"])
def test_stdout_that_is_closed_costs_no_result(
    shell: Shell, broken: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", broken)
    assert ended(command) == 2
    *_, message = shell.capsys.readouterr().err.splitlines()
    assert message.startswith("Error: printing failed ([Errno ")
    if command == SAMPLE:
        assert files() == WRITTEN
        assert message.endswith("files that were finished are whole")


def test_stderr_that_is_closed_ends_nothing(
    shell: Shell, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (broken, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert "wrote 2 pictures" in shell.run(f"{SAMPLE} --again")
        assert ended("sample --steps none") == 2
    monkeypatch.undo()
    with pytest.raises(OSError, match="Errno"):
        broken.close()  # what is held back is lost


def test_an_encoding_without_greek_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "cp1252", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert ended("list") == 0
        assert b"DampedStepRatio" in stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "outputs"),
    [
        (SAMPLE, WRITTEN),
        (f"roundtrip --compare damped{DIGITS}", ["out/roundtrip/000000.png"]),
        (f"edit a.png --prompt 1 --to 2{DIGITS}", ["out/edit/a.png"]),
        (f"calibrate --again --count 1 --runs 2{DIGITS}", ["out/gamma.json"]),
    ],
)
def test_a_full_disk_leaves_the_old_files(shell: Shell, command: str, outputs: list[str]) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("a.png")
    for name in outputs:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        code = ended(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert (
        shell.capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("Error: [Errno 27] File too large")
    )
    assert [Path(name).read_bytes() for name in outputs] == [b"old"] * len(outputs)
    assert files() == sorted(["a.png", *outputs])


def test_places_that_cannot_be_written_to_are_named_before_the_run(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    Path("closed").mkdir(mode=0o500)
    monkeypatch.setitem(opening.BUNDLED, "digits", (None, ""))  # type: ignore[arg-type]
    ends = {
        "file/a": "file/a cannot be written: a file is where a folder should be",
        "x.xyz": "x.xyz ends as no picture",
        "a/b.png": "a/b.png is one picture, and there are 2",
    }
    if os.geteuid():  # root writes everywhere
        ends["closed"] = "closed cannot be written to"
    for out, words in ends.items():
        assert words in shell.refused(f"{SAMPLE} --out {out}"), out


# errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RecursionError("too deep"), "too deep"),
        (MemoryError(), "MemoryError"),
        (OverflowError(34, "out of range"), "(34, 'out of range')"),
        (SafetensorError("no header"), "no header"),
        (KeyError("labels"), "KeyError: 'labels'"),
        (AssertionError(), "AssertionError"),
        (torch.OutOfMemoryError("two\n  lines"), "two lines"),
        (Image.DecompressionBombError("large"), "large"),
        (ValueError("clears\x1b[2J the\x00 screen"), r"clears\x1b[2J the\x00 screen"),
        (RuntimeError("long " * 10_000), "long " * 199 + "lo..."),
    ],
)
def test_errors_of_every_kind_are_one_line(
    shell: Shell, error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise error

    monkeypatch.setitem(opening.BUNDLED, "digits", (fail, ""))  # type: ignore[arg-type]
    assert shell.refused("sample" + DIGITS) == f"Error: {line}"
    assert shell.error.count("\n") == 1


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ({"model": None}, "model: must be a string"),
        ({"model": ["digits"]}, "model: must be a string"),
        ({"prompt": 3}, "prompt: must be of type str"),
        ({"guidance": None}, "guidance: must be of type float"),
        ({"guidance": "x"}, "guidance: must be of type float"),
        ({"size": [1]}, "size: must be 2 values"),
        ({"size": "big"}, "size: must be of type list"),
    ],
)
def test_notes_of_another_kind_are_refused(shell: Shell, notes: dict[str, Any], words: str) -> None:
    state = State(torch.zeros(1, 1, 8, 8), None, 0, (2.0, 1.0, 0.0), "BDIA(Euler(), gamma=1.0)")
    known = {"model": "digits", "size": None, "prompt": None, "negative": None, "guidance": 1.0}
    state.save("s.safetensors", {**known, **notes})
    assert words in shell.refused("invert s.safetensors")


def test_a_state_does_not_choose_which_files_or_modules_are_read(shell: Shell) -> None:
    Calibrated("Euler()", (2.0, 1.0, 0.0), (0.5,)).save("gamma.json")
    known = {"size": None, "prompt": None, "negative": None, "guidance": 1.0}
    for solver, model, words in (
        ("BDIA(Euler(), load('gamma.json'))", "digits", "'load'"),
        ("BDIA(Euler(), gamma=1.0)", "antigravity:fly", "give --model antigravity:fly"),
        ("BDIA(Euler(), gamma=1.0)", "someone/pipeline", "give --model someone/pipeline"),
    ):
        state = State(torch.zeros(1, 1, 8, 8), None, 0, (2.0, 1.0, 0.0), solver)
        state.save("s.safetensors", {"model": model, **known})
        assert words in shell.refused("invert s.safetensors")


# signals


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Heard signals, also where a shell ignores them, and back what the command replaces."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["a run", "a picture", "a state"])
def test_a_signal_ends_a_command_with_one_line_and_no_half_file(
    shell: Shell, number: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WRITTEN:
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_bytes(b"old")

    def stop(*args: Any, **options: Any) -> Any:
        for stream in args:
            if hasattr(stream, "write"):
                stream.write(b"half")
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not heard")

    def again(*args: Any, **options: Any) -> None:
        for other in (signal.SIGINT, signal.SIGTERM) * 3:  # of someone who is impatient
            os.kill(os.getpid(), other)
        print(*args, **options)

    if place == "a run":
        monkeypatch.setitem(opening.BUNDLED, "digits", (stop, ""))  # type: ignore[arg-type]
    else:
        owner, method = (Image.Image, "save") if place == "a picture" else (os, "fsync")
        monkeypatch.setattr(owner, method, stop)
    monkeypatch.setattr(cli, "print", again, raising=False)
    monkeypatch.setattr(sys, "argv", ["odesolvers", *shlex.split(SAMPLE)])
    with pytest.raises(SystemExit) as caught:
        odesolvers_command.main()
    assert caught.value.code == 128 + number
    output, error = shell.capsys.readouterr()
    *_, line = error.splitlines()
    assert line.startswith("Interrupted. Finished files stay; the same command goes on from them.")
    assert "Traceback" not in error
    assert output == ""
    assert files() == WRITTEN
    assert Path(PICTURES[0]).read_bytes() == b"old"
    first = Path(PICTURES[0]).with_suffix(".safetensors").read_bytes()
    assert (first == b"old") == (place != "a picture")
    os.kill(os.getpid(), signal.SIGINT)  # while Python ends: not heard any more


def test_an_interrupted_command_goes_on(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the third of five pictures: two are there, and three are made by the next run."""
    saved = Image.Image.save
    count = 0

    def stop(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt(signal.SIGINT)
        return saved(self, *args, **options)

    command = f"sample --count 5 --batch 1{DIGITS}"
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", stop)
        assert ended(command) == 130
    assert files("out") == PICTURES
    before = [Path(name).stat().st_mtime_ns for name in PICTURES]
    assert (
        shell.run(command) == "2 of 5 are finished in out/sample\nwrote 3 pictures in out/sample\n"
    )
    assert [Path(name).stat().st_mtime_ns for name in PICTURES] == before


DURING_IMPORTS = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), int(sys.argv[2]))
sys.meta_path.insert(0, Finder())
import odesolvers_command
odesolvers_command.main()
"""


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_is_one_line(number: int) -> None:
    command = [sys.executable, "-c", DURING_IMPORTS, "torch", str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stderr == "Interrupted before the start; nothing is written.\n"
    assert (ended.stdout, ended.returncode) == ("", 128 + number)


AS_A_MODULE = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), int(os.environ["NUMBER"]))
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(
    ("options", "number", "at"),
    [
        (["-m", "odesolvers"], signal.SIGINT, "torch"),
        (["-modesolvers", "list"], signal.SIGTERM, "odesolvers.solver"),
        (["-m", "odesolvers", "list"], signal.SIGINT, "odesolvers.cli.parser"),
    ],
)
def test_a_signal_during_the_imports_of_the_module(
    tmp_path: Path, options: list[str], number: int, at: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AS_A_MODULE)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "AT": at, "NUMBER": str(int(number))}
    ended = subprocess.run([sys.executable, *options], capture_output=True, text=True, env=env)
    assert ended.stderr == "Interrupted before the start; nothing is written.\n"
    assert (ended.stdout, ended.returncode) == ("", 128 + number)


def test_modules_that_import_the_package_keep_their_handlers(tmp_path: Path) -> None:
    """Also while they are run by `python -m` themselves, with any arguments."""
    (tmp_path / "another").mkdir()
    code = "import signal, odesolvers; print(signal.getsignal(signal.SIGTERM))"
    (tmp_path / "another" / "__init__.py").write_text(code)
    (tmp_path / "another" / "__main__.py").touch()
    command = [sys.executable, "-m", "another", "-m", "odesolvers"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout.strip() == "0", ended.stderr  # SIG_DFL


def test_a_signal_that_the_caller_ignores_is_ignored() -> None:
    code = "import signal, odesolvers_command as o; print(o._is_heard(signal.SIGINT))"
    for handler, heard in ((signal.SIG_IGN, "False"), (signal.SIG_DFL, "True")):
        ended = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            preexec_fn=lambda handler=handler: signal.signal(signal.SIGINT, handler),  # type: ignore[misc]
        )
        assert ended.stdout.strip() == heard


@pytest.mark.parametrize(
    "command",
    [
        "edit photos/a.png --prompt A --to B --out photos",
        "edit photos --prompt A --to B --out photos/a.png",
        "edit photos/a.png --prompt A --to B --out link/a.png",
        "invert photos --out photos",
        "roundtrip photos --out photos",
        "invert photos/s.safetensors --out photos",
    ],
)
def test_no_result_replaces_what_it_is_made_of(shell: Shell, command: str) -> None:
    Path("photos").mkdir()
    Path("link").symlink_to("photos")
    Image.new("RGB", (32, 32), "red").save("photos/a.png")
    if "safetensors" in command:
        shell.run("invert photos --steps 3 --model emoji --out states")
        Path("states/a.safetensors").rename("photos/s.safetensors")
    before = {path: path.read_bytes() for path in Path("photos").iterdir()}
    assert "which it is made of" in shell.refused(command)
    assert {path: path.read_bytes() for path in Path("photos").iterdir()} == before
