"""Installs into fresh environments: seconds, sizes, import times, and tests, for each Python.

For each Python, a fresh clone of the last commit is installed (not editable) into an empty environment:
first alone, then with the extras `cli`, `edm` and `stable-diffusion`, then with `k-diffusion`
where that can be had. Every module is imported away from the clone, and tests run in it. Seconds contain
downloads that pip has not cached. An environment takes 5 to 7 GB and is deleted afterwards.

    python -m benchmarks.installs python3.10 python3.11 python3.12 python3.13 --write
    python -m benchmarks.installs python3.10 --lowest    # `make lowest`: at the lower bounds, tests only
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parents[1]
TABLE = CLONE / "docs" / "tables" / "installs.md"
RESULTS = CLONE / "out" / "installs.json"

EXTRAS = "cli,edm,stable-diffusion"
TOOLS = ("pytest>=8", "sybil>=9", "hypothesis>=6.100", "scipy", "build")
CORE = [f"tests/test_{name}.py" for name in ("run", "bdia", "fixed_point", "grids", "imports")]
MODELS = [f"tests/models/test_{name}.py" for name in ("closed_form", "edm", "emoji")]
MODELS += [f"tests/models/test_{name}.py" for name in ("flow", "stable_diffusion_loading")]

IMPORTS = """
import json, pkgutil, importlib, sys, time, warnings
import torch
start = time.perf_counter()
import odesolvers
seconds = time.perf_counter() - start
names = [m.name for m in pkgutil.walk_packages(odesolvers.__path__, "odesolvers.")]
names = [name for name in names if not name.endswith("__main__")]
missing = {}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing[name] = (error.name or str(error)).split(".")[0]
versions = {name: importlib.import_module(name).__version__ for name in ("torch", "numpy")}
print(json.dumps(dict(seconds=seconds, modules=len(names), missing=missing, **versions)))
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pythons", nargs="*", help="interpreters (those of the table)")
    parser.add_argument("--lowest", action="store_true", help="tests at the lower bounds")
    parser.add_argument("--uv", action="store_true", help="install by uv, on the PATH, not by pip")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(CLONE)}")
    args = parser.parse_args()
    failed = False
    for python in args.pythons:
        with tempfile.TemporaryDirectory() as folder:
            clone = Path(folder) / "clone"
            subprocess.run(["git", "clone", "-q", CLONE, clone], check=True)
            env = environment(python, Path(folder) / "env", uv=args.uv)
            if args.lowest:
                failed |= not lowest(env, clone)
                continue
            row = {"installer": "uv" if args.uv else "pip"} | measure(env, clone)
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        rows[row["python"]] = row
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        failed |= not row["passed"]
    if not args.lowest:
        text = report(json.loads(RESULTS.read_text()))
        print(text)
        if args.write:
            TABLE.write_text(text + "\n")
    sys.exit(failed)


def measure(env: Path, clone: Path) -> dict[str, Any]:
    """Install `clone` stage by stage, and run the tests."""
    row: dict[str, Any] = {"python": output(env, "import platform as p; print(p.python_version())")}
    row["core"] = install(env, str(clone))
    row["alone"] = json.loads(output(env, IMPORTS))
    row["extras"] = install(env, f"{clone}[{EXTRAS}]")
    row["modules"] = json.loads(output(env, IMPORTS))
    install(env, *TOOLS)
    row["tests"] = test(env, clone, CORE + MODELS)
    install(env, f"{clone}[k-diffusion]")  # nothing more, where that cannot be had
    call = "from odesolvers.models import import_k_diffusion as k; print(k().__name__)"
    wraps = output(env, call, check=False) == "k_diffusion"
    row["wrapped"] = test(env, clone, ["tests/models/test_kdiffusion.py"]) if wraps else None
    row["passed"] = not re.search("failed|error", f"{row['tests']} {row['wrapped']}")
    return row


def lowest(env: Path, clone: Path) -> bool:
    """Whether tests pass at the lowest versions that pyproject.toml allows."""
    metadata = (clone / "pyproject.toml").read_text()
    names = "torch|numpy|scikit-learn|safetensors|pillow|matplotlib|tqdm|rich"
    bounds = re.findall(rf'"({names})>=([\d.]+)', metadata)
    # An extra may ask for more than the core does.
    pins = {a: min((b for c, b in bounds if c == a), key=_numbers) for a, _ in bounds}
    print("lowest versions:", pins, flush=True)
    install(env, *(f"{a}=={b}" for a, b in pins.items()), *TOOLS[:3], "scipy<1.15")
    install(env, "--no-deps", "--no-build-isolation", str(clone))
    summary = test(env, clone, [*CORE, "tests/models/test_emoji.py"])
    print(summary)
    return not re.search("failed|error", summary)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def environment(python: str, folder: Path, *, uv: bool) -> Path:
    """An empty environment with a new setuptools, of which the interpreter is returned."""
    maker: list[str | Path] = (
        ["uv", "venv", "-q", "--python", python] if uv else [python, "-m", "venv"]
    )
    subprocess.run([*maker, folder], check=True)
    env = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install(env, "--upgrade", "setuptools", "wheel", *([] if uv else ["pip"]))
    return env


def install(env: Path, *packages: str) -> dict[str, float]:
    """Seconds that it takes, and GB in the environment after."""
    uv = not list(env.parent.glob("pip*"))
    installer: list[str | Path] = (
        ["uv", "pip", "install", "--python", env] if uv else [env, "-m", "pip", "install"]
    )
    start = time.perf_counter()
    subprocess.run([*installer, "-q", *packages], check=True)
    seconds = time.perf_counter() - start
    files = [path for path in env.parents[1].rglob("*") if path.is_file() and not path.is_symlink()]
    return {"seconds": seconds, "gb": sum(path.stat().st_size for path in files) / 1e9}


def output(env: Path, code: str, *, check: bool = True) -> str:
    """What Python prints, away from the clone: there, the clone's own files would be imported."""
    result = subprocess.run(
        [env, "-W", "ignore", "-c", code], cwd=env.parent, check=check, stdout=-1, text=True
    )
    return result.stdout.strip()


def test(env: Path, clone: Path, paths: Sequence[str]) -> str:
    """The last line of pytest, run in the clone."""
    command = [str(env), "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=clone, env=threads, stdout=-1, text=True)
    lines = result.stdout.strip().splitlines()
    print(*(line for line in lines if re.match("FAILED|ERROR|SKIPPED", line)), sep="\n", flush=True)
    return lines[-1].strip("= ") if lines else "error: pytest printed nothing"


def report(rows: dict[str, dict[str, Any]]) -> str:
    """The table of all measured Pythons, in Markdown."""
    from .common import table

    header = ["Python", "by", "torch", "numpy", "core", "GB", "import, s", "with extras", "GB"]
    header += ["modules", "tests", "k-diffusion"]
    lines = []
    for row in sorted(rows.values(), key=lambda row: [int(k) for k in row["python"].split(".")]):
        alone, modules = row["alone"], row["modules"]
        total = row["core"]["seconds"] + row["extras"]["seconds"]
        line = [row["python"], row.get("installer", "pip"), alone["torch"], alone["numpy"]]
        line += [f"{row['core']['seconds']:.0f} s", f"{row['core']['gb']:.1f}"]
        line += [f"{alone['seconds']:.2f}", f"{total:.0f} s", f"{row['extras']['gb']:.1f}"]
        line += [f"{modules['modules'] - len(modules['missing'])} of {modules['modules']}"]
        line += [re.sub(" in .*", "", row[key] or "cannot be had") for key in ("tests", "wrapped")]
        lines.append(line)
    return table(header, lines, words=(0, 1, 10, 11))


if __name__ == "__main__":
    main()
