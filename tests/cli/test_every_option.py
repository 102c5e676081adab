"""Every option of every command changes what comes out of it, or is refused."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from odesolvers import State, cli, page
from odesolvers.cli.parser import COMMANDS, OPTIONS

from .shell import Shell, files, pixels

OWN = """
import torch

calls = []


class Denoiser(torch.nn.Module):
    shape = (1, 8, 8)
    sigma_min, sigma_max = 0.02, 20.0

    def __init__(self, mean=0.0):
        super().__init__()
        self.mean = mean

    def to(self, device):
        calls.append(f"to {device}")
        return self

    def forward(self, x, sigma, label=None):
        calls.append(f"{tuple(x.shape)} {x.dtype} {sigma[0]:.6g} {x.double().sum():.6g}")
        v = (sigma**2).reshape(-1, 1, 1, 1).to(x)
        mean = self.mean + label.reshape(-1, 1, 1, 1).to(x)
        return (0.09 * x + v * mean) / (0.09 + v)

    def condition(self, prompts):
        return {"label": torch.tensor([float(prompt or 0) for prompt in prompts])}


def load():
    return Denoiser()


def other():
    found = Denoiser(0.3)
    found.sigma_max = 21.0
    return found
"""
VALUES = {
    "--prompt": "0.4",
    "--to": "0.1",
    "--negative": "-0.5",
    "--guidance": "2",
    "--strength": "0.5",
    "--mask": "mask.png",
    "--frames": "3",
    "--key": "other",
    "--compare": "belm",
    "--base": "DDIM()",
    "--runs": "9",
    "--levels": "",
    "--model": "used_for_test:other",
    "--solver": "belm",
    "--count": "2",
    "--seed": "5",
    "--batch": "2",
    "--fit": "pad",
    "--size": "8 8",
    "--grid": "exponential",
    "--steps": "5",
    "--sigma-min": "0.05",
    "--sigma-max": "10",
    "--rho": "3",
    "--dtype": "float64",
    "--network": "bfloat16",
    "--device": "cpu:0",
    "--out": "elsewhere",
    "--save": "",
    "--again": "",
    "--port": "1234",
}
SAMPLED, CODE = "made/000000.safetensors", "code/000000.safetensors"
LINES = {
    "sample": [
        "--count 3",
        "--count 3 --prompt 0.2",
        "--save",
        SAMPLED,
        CODE,
        f"{CODE} --prompt 0.3",
    ],
    "invert": ["wide.png", "wide.png --prompt 0.2", SAMPLED, CODE, f"wide.png {SAMPLED}"],
    "edit": ["wide.png", "wide.png --prompt 0.2", SAMPLED, CODE],
    "interpolate": ["wide.png 1.png", "wide.png 1.png --prompt 0.2"],
    "watermark embed": ["--count 3", "--count 3 --prompt 0.2"],
    "watermark detect": ["wide.png", "wide.png 1.png --prompt 0.2"],
    "roundtrip": ["", "--prompt 0.2", "wide.png", "wide.png --prompt 0.2"],
    "calibrate": ["", "--prompt 0.2"],
    "report": [""],
    "list": [""],
    "app": [""],
}
"""Commands to which each option is added; what is required and the model come on top."""
REQUIRED = {"--to": "0.6", "--key": "secret"}
CASES = [
    (f"{name} {line}", option)
    for name, lines in LINES.items()
    for line in lines
    for option in COMMANDS[name][1].split()
    if option != "files"
]


def outcome(shell: Shell) -> Any:
    """Everything that a command leaves: lines, pictures, states, other files, calls of the network."""
    import used_for_test  # type: ignore[import-not-found]

    found: dict[str, Any] = {"said": shell.said, "calls": list(used_for_test.calls)}
    for name in files():
        if name.endswith(".png"):
            found[name] = pixels(name).tolist()
        elif name.endswith(".safetensors"):
            state, notes = State.load_with_notes(name)
            found[name] = state.current.tolist(), state.solver, notes
        elif name.endswith(".json"):
            found[name] = Path(name).read_text()
    used_for_test.calls.clear()
    return found


def ends(shell: Shell, command: str) -> Any:
    """The outcome of a command in a folder of its own, None where it is refused."""
    shell.capsys.readouterr()
    try:
        cli.main(shlex.split(command))
    except SystemExit as error:
        return None if error.code == 2 else pytest.fail(f"exit code {error.code}")
    shell.said = shell.capsys.readouterr().out
    return outcome(shell)


def test_every_option_has_a_value_here() -> None:
    options = {option for name in LINES for option in COMMANDS[name][1].split()}
    assert options - {"files"} == VALUES.keys()
    jobs = {name for name in COMMANDS if name.startswith("batch ")}  # of which their tests tell
    assert LINES.keys() == COMMANDS.keys() - jobs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", sorted({line for line, _ in CASES}))
def test_every_option_is_used_or_refused(
    shell: Shell, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("used_for_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(page, "launch", lambda *args: print(args))
    # "cpu:0" is the only device that differs from the default everywhere, by its name.
    monkeypatch.setitem(OPTIONS["--device"], "type", torch.device)  # type: ignore[arg-type]
    monkeypatch.delitem(__import__("sys").modules, "used_for_test", raising=False)
    ramp = np.linspace(0, 255, 8 * 12).reshape(8, 12).astype(np.uint8)
    model = " --model used_for_test:load"

    Path("made").mkdir()
    monkeypatch.chdir("made")
    Image.fromarray(ramp).save("wide.png")
    Image.fromarray(ramp[:, :8].T.copy()).save("1.png")
    Image.fromarray((ramp > 99).astype(np.uint8) * 255).save("mask.png")
    shell.run(f"sample --count 1 --prompt 0.2 --guidance 1 --save --out made{model}")
    shell.run(f"invert made/000000.safetensors --out code{model}")
    outcome(shell)

    def fresh(name: str) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copytree("made", name)
        monkeypatch.chdir(name)

    name = next(n for n in sorted(LINES, key=len, reverse=True) if line.startswith(n))
    options = COMMANDS[name][1].split()
    base = line + "".join(f" {o} {v}" for o, v in REQUIRED.items() if o in options)
    base += model if "--model" in options else ""
    base += " --count 3 --runs 5 --steps 4" if name == "calibrate" else ""
    fresh("base")
    plain = ends(shell, base)
    assert plain is not None, shell.capsys.readouterr().err
    ignored = []
    for k, option in enumerate(options):
        if option == "files" or (option in line.split() and not VALUES[option]):
            continue
        fresh(f"{k}")
        before = plain
        if option == "--again":
            ends(shell, base)
            before = ends(shell, base)
        if ends(shell, f"{base} {option} {VALUES[option]}") == before:
            ignored.append(option)
    assert ignored == []
