"""The commands, each on one picture or many."""

from __future__ import annotations

import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

import odesolvers as ode

from ..bundled import BUNDLED, GRIDS, Model
from ..editing import edit as edit_picture, interpolate as between, mark, matches
from ..extend import IntegrationApproximator, Solver
from ..opening import SHORT, open_model, solver_of
from ..pictures import noise_in_view, read_images, side_by_side, to_picture
from ..typed import optional, printable, read
from .outputs import STATE, Outputs, digest_of, say

LEVELS: Final = ("sigma_min", "sigma_max", "rho")
_ASIDE: Final = "function prog out again batch count pictures states device key named"
"""Options on which a result does not depend, or whose value is a secret."""
_NOTES: Final = {
    "model": printable,
    "size": optional([int]),
    "prompt": optional(str),
    "negative": optional(str),
    "guidance": float,
}


@dataclass
class Setup:
    """A model, a solver and a grid, as the options ask for."""

    args: Namespace
    model: Model
    sigmas: Tensor
    solver: Solver
    dtype: torch.dtype

    @classmethod
    def of(cls, args: Namespace, state: ode.State | None = None) -> Setup:
        """The setup of the options; of a state its own solver, grid and dtype."""
        size = tuple(args.size) if args.size else None
        model = open_model(args.model, args.device, args.network, size)
        dtype = args.dtype or model.dtype
        if state is None:
            levels = {k: getattr(args, k) for k in LEVELS if getattr(args, k) is not None}
            sigmas = model.sigmas(args.steps or model.steps, args.grid, levels)
            return cls(args, model, sigmas, solver_of(args.solver, model.method, sigmas), dtype)
        held = state.current.dtype if state.side is None else state.side.dtype
        if args.dtype not in (None, held):
            raise ValueError(f"the state holds {held}, not {args.dtype}: leave out --dtype")
        return cls(args, model, torch.tensor(state.sigmas).double(), ode.parse(state.solver), held)

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last level."""
        return float(self.sigmas[0]), float(self.sigmas[-1])

    def prompt(self, k: int = 0) -> str | None:
        """The prompt of picture `k`: those of --prompt in turn."""
        prompts = self.args.prompt
        return prompts[k % len(prompts)] if prompts else None

    def guided(self, prompts: Sequence[str | None]) -> tuple[Any, Any]:
        """The denoiser under guidance, and its arguments."""
        return self.model.guided(prompts, self.args.guidance, self.args.negative)

    def read(self, path: Path) -> tuple[Tensor, Tensor]:
        """The picture in a file, (1, C, H, W), and its state at the last level."""
        images = read_images(path, self.model.shape, self.args.fit)
        if len(images) != 1:
            raise ValueError(f"{path} holds {len(images)} pictures: save each as a file of its own")
        return images, self.model.enter(images, self.ends[1], self.dtype)

    def noise(self, seeds: Iterable[int]) -> Tensor:
        """Noise of the first level."""
        return self.model.draw(seeds, self.ends[0], self.dtype)

    def notes(self, prompt: str | None) -> dict[str, Any]:
        """The settings of a run that a state does not hold."""
        args, scale = self.args, self.model.scale(self.args.guidance, prompt)
        own = {"prompt": prompt, "negative": args.negative, "guidance": float(scale)}
        return {"model": args.model, "size": args.size, **own}


def sample(args: Namespace) -> None:
    """Sample pictures from noise, or from the states of `invert`."""
    if args.states:
        return _each_state(args, down=True)
    names = {f"{args.seed + k:06d}": "" for k in range(args.count)}
    outputs, missing = _outputs(args, names)
    if not missing:
        return None
    setup = Setup.of(args)
    batch = 1 if args.save or setup.solver.arithmetic.exact else args.batch
    bar = tqdm(total=len(missing), desc="sample", unit="picture")
    for start in range(0, len(missing), batch):
        chosen = missing[start : start + batch]
        prompts = [setup.prompt(int(name) - args.seed) for name in chosen]
        x = setup.noise([int(name) for name in chosen])
        x = x if args.key is None else mark(x, args.key)
        denoiser, extra = setup.guided(prompts)
        run = setup.solver.sample(denoiser, x, setup.sigmas, extra_args=extra)
        images = setup.model.leave(run.x)
        for image, name, prompt in zip(images, chosen, prompts, strict=True):
            state = run.state if args.save else None
            outputs.write(name, "", to_picture(image), state, setup.notes(prompt))
            bar.update()
    bar.close()
    return say(outputs.summary())


def invert(args: Namespace) -> None:
    """Invert pictures, or states of `sample --save`, to noise."""
    if all(path.suffix == STATE for path in args.pictures):
        args.states = args.pictures
        return _each_state(args, down=False)
    outputs, missing = _outputs(args, _inputs(args.pictures))
    for setup, name, digest, _, x in _each_picture(args, missing):
        prompt = setup.prompt()
        args.guidance = 1.0 if args.guidance is None else args.guidance
        denoiser, extra = setup.guided([prompt])
        code = setup.solver.invert(denoiser, x, setup.sigmas, extra_args=extra)
        _write_code(outputs, setup, name, digest, code, prompt)
    return say(outputs.summary())


def edit(args: Namespace) -> None:
    """Invert pictures under one prompt, and sample them under another."""
    if args.mask is not None and args.save:
        raise ValueError(
            "a masked edit has no way back, for each step is blended: leave out --save"
        )
    outputs, missing = _outputs(args, _inputs(args.pictures))
    for setup, name, digest, picture, x in _each_picture(args, missing):
        model, mask, latent_mask = setup.model, None, None
        if args.mask is not None:
            mask = (read_images(args.mask, (1, *model.shape[1:]))[0, 0].double() + 1) / 2
            latent_mask = model.mask(mask)
        found = edit_picture(
            setup.solver,
            model.denoiser,
            x,
            setup.sigmas,
            source=model.arguments([setup.prompt()]),
            target=model.arguments([args.to]),
            guidance=model.scale(args.guidance, args.to),
            negative=model.arguments([args.negative]),
            mask=latent_mask,
            strength=args.strength,
        )
        image = model.leave(found.x, setup.ends[1])[0]
        if mask is not None:  # exact in pixels too, where an autoencoder is not
            image = torch.lerp(picture[0].double(), image, mask)
        state = found.state if args.save else None
        outputs.write(name, digest, to_picture(image), state, setup.notes(args.to))
        _about_code(name, setup, found.code.x)
    say(outputs.summary())


def interpolate(args: Namespace) -> None:
    """Walk from one picture to another through noise."""
    if len(args.pictures) != 2:
        raise ValueError(f"two pictures are interpolated, got {len(args.pictures)}")
    both = "".join(digest_of(path) for path in args.pictures)
    names = dict.fromkeys((f"{k + 1:03d}" for k in range(args.frames)), both)
    outputs, missing = _outputs(args, names)
    if missing:
        setup = Setup.of(args)
        first, second = (setup.read(path)[1] for path in args.pictures)
        denoiser, extra = setup.guided([setup.prompt()])
        options: Any = {"frames": args.frames, "source": extra, "progress": True}
        found = between(setup.solver, denoiser, first, second, setup.sigmas, **options)
        for (name, digest), frame in zip(names.items(), found, strict=True):
            image = setup.model.leave(frame.x, setup.ends[1])[0]
            outputs.write(name, digest, to_picture(image), None, None)
    say(outputs.summary())


def watermark(args: Namespace) -> None:
    """Sample pictures whose noise carries a key, or look for the key in pictures."""
    if args.action == "embed":
        if args.pictures:
            raise ValueError(
                "`watermark embed` samples new pictures and takes none; a photo has no key"
            )
        args.states = ()
        return sample(args)
    setup = Setup.of(args)
    for path in tqdm(_files(args.pictures), desc="detect", unit="picture", disable=None):
        x = setup.read(path)[1]
        extra = setup.model.arguments([setup.prompt()])
        code = setup.solver.invert(setup.model.denoiser, x, setup.sigmas, extra_args=extra).x
        found = matches(code, args.key)
        agree = f"{found.agreeing.item()} of {found.elements} signs agree"
        say(f"{path.name}: {agree}, p = 10^{found.log10_p_value.item():.1f}")
    return None


def roundtrip(args: Namespace) -> None:
    """Compare solvers on the way to noise and back, of pictures or of noise."""
    inputs = _inputs(args.pictures) if args.pictures else {f"{args.seed:06d}": ""}
    outputs, missing = _outputs(args, inputs)
    setup = Setup.of(args)
    names = dict.fromkeys([args.solver, *filter(None, args.compare.split(","))])
    solvers = {name: solver_of(name, setup.model.method, setup.sigmas) for name in names}
    denoiser, extra = setup.guided([setup.prompt()])
    paths = {path.stem: path for path in _files(args.pictures)} if args.pictures else {}
    say(f"{'picture':14} {'solver':26} {'calls':>7} {'round trip':>10} {'code std':>9}")
    for name in missing:
        x = setup.read(paths[name])[1] if paths else setup.noise([args.seed])
        for label, solver in solvers.items():
            walks = (solver.invert, solver.sample)[:: 1 if paths else -1]
            there = walks[0](denoiser, x, setup.sigmas, extra_args=extra)
            back = walks[1](denoiser, there.state, setup.sigmas, extra_args=extra)
            code, picture = (there.x, back.x) if paths else (back.x, there.x)
            error = float((back.x - x).double().norm() / x.double().norm())
            std = float(code.double().std()) / setup.model.deviation(setup.ends[0])
            calls = f"{there.nfe}+{back.nfe}"
            say(f"{name[:14]:14} {label[:26]:26} {calls:>7} {error:10.1e} {std:9.3f}")
            if label == args.solver:
                last = setup.ends[1] if paths else 0.0
                shown = [setup.model.leave(y, last)[0] for y in ([x] if paths else []) + [picture]]
                view = noise_in_view(code[0], setup.ends[0])
                shown[-1:-1] = [view] if view.shape == shown[0].shape else []
                outputs.write(name, inputs[name], to_picture(side_by_side(shown)), None, None)
    say(outputs.summary())


def calibrate(args: Namespace) -> None:
    """Learn weights of BDIA for a model and a grid, for --solver "load('FILE')"."""
    base = ode.parse(args.base) if args.base else None
    if base is not None and not isinstance(base, IntegrationApproximator):
        raise ValueError(f"--base must name a method such as Euler(), got {args.base}")
    if args.out.suffix != ".json" or not (args.out.parent.is_dir() or not args.out.parent.exists()):
        raise ValueError(f"--out must be a file that ends in .json, got {args.out}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    setup = Setup.of(args)
    denoiser, extra = setup.guided([setup.prompt(k) for k in range(args.count)])
    x = setup.noise(range(args.seed, args.seed + args.count))
    options: Any = {"max_runs": args.runs, "progress": True, "extra_args": extra}
    options["base"] = base or ode.parse(setup.model.method)
    rule = ode.calibrate(denoiser, x, setup.sigmas, **options)
    rule.save(args.out)
    say(f"{rule.report}\nwrote {args.out}")


def report(args: Namespace) -> None:
    """Say before a run what a solver amplifies on a grid."""
    setup = Setup.of(args)
    say(str(ode.stability_report(setup.solver, setup.sigmas)))


def list_(args: Namespace) -> None:
    """List short names of solvers, models and grids."""
    del args
    say("--solver takes a short name, or the expression of any solver:")
    for name, (expression, what) in SHORT.items():
        say(f"  {name:8} {what}\n           {expression.format('Euler()', '')}")
    say("In the first three, Euler() stands for the one-step method that suits the model.")
    say("load('FILE.json') in an expression is what `odesolvers calibrate` wrote.\n")
    say("--model takes")
    for name, (_, what) in BUNDLED.items():
        say(f"  {name:8} {what}")
    say("  a folder, a single file or a hub id of a pipeline of diffusers")
    say("  a .pkl or .safetensors file or URL of EDM, prompts 0, 1, ... if it has classes")
    say("  package.module:function, which returns a denoiser of your own\n")
    say(f"--grid takes {', '.join(GRIDS)}; a pipeline has its own.")


def app(args: Namespace) -> None:
    """Open the local web page: a picture, its noise, the way back and an edit."""
    from ..page import launch

    launch(args.model, args.port, args.device, args.network)


def _files(paths: Sequence[Path]) -> list[Path]:
    """The pictures that are named, and those in the folders that are named."""
    found = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        found += [p for p in inside if not p.name.startswith(".")]
    if not found:
        raise ValueError(f"there is no picture in {', '.join(map(str, paths)) or 'the arguments'}")
    return found


def _inputs(paths: Sequence[Path]) -> dict[str, str]:
    """The names of results, and the digests of the files that they are made of."""
    files = _files(paths)
    if len({path.stem for path in files}) < len(files):
        names = [path.stem for path in files]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two pictures are named {twice}: their results would be one file")
    return {path.stem: digest_of(path) for path in files}


def _outputs(args: Namespace, inputs: Mapping[str, str]) -> tuple[Outputs, list[str]]:
    """The results, and the names of those that are to be made; says what is finished."""
    settings: dict[str, Any] = {"command": args.function.__name__}
    for key, value in vars(args).items():
        if key not in _ASIDE.split() and value is not None:
            settings[key] = digest_of(value) if key == "mask" else value
    if args.solver not in SHORT:
        settings["solver"] = repr(solver_of(args.solver, "Euler()", torch.ones(1)))
    if getattr(args, "key", None):
        settings["key"] = hashlib.sha256(f"odesolvers {args.key}".encode()).hexdigest()  # no secret
    settings = {
        k: v if isinstance(v, int | float | str | list) else str(v) for k, v in settings.items()
    }
    outputs = Outputs(args.out, list(inputs), settings, again=args.again)
    given = [*(getattr(args, "pictures", None) or ()), *(getattr(args, "states", None) or ())]
    outputs.spare(inputs, _files(given) if given else ())
    missing = outputs.missing(inputs)
    if len(missing) < len(inputs):
        say(f"{len(inputs) - len(missing)} of {len(inputs)} are finished in {outputs.folder}")
    return outputs, missing


def _each_picture(
    args: Namespace, missing: Sequence[str]
) -> Iterator[tuple[Setup, str, str, Tensor, Tensor]]:
    """Setup, name, digest, picture and state at the last level of those that are to be made."""
    files = [path for path in _files(args.pictures) if path.stem in missing]
    setup = Setup.of(args) if files else None
    for path in tqdm(files, desc=args.function.__name__, unit="picture"):
        assert setup is not None
        yield setup, path.stem, digest_of(path), *setup.read(path)


def _each_state(args: Namespace, *, down: bool) -> None:
    """Samples from states, or inverts them, under their own prompts and guidance or others."""
    paths = {path.stem: path for path in _files(args.states)}
    outputs, missing = _outputs(args, _inputs(args.states))
    given = {k: getattr(args, k) for k in ("size", "guidance", "negative")}
    given |= {"prompt": args.prompt and args.prompt[0], "model": args.named}
    for name in tqdm(missing, desc=args.function.__name__, unit="state"):
        path = paths[name]
        state, notes = ode.State.load_with_notes(path, args.device)
        try:
            stored = read(notes, _NOTES)
            if stored["size"] is not None and len(stored["size"]) != 2:
                raise ValueError(f"its size is no height and width: {stored['size']}")
        except ValueError as error:
            raise ValueError(f"{path} was not saved by a command: {error}") from error
        changed = {k: v for k, v in given.items() if v is not None and v != stored[k]}
        for key in changed:
            if not down or key in ("model", "size"):
                raise ValueError(
                    f"{path} was made with {key} = {stored[key]}, not {changed[key]}: it leads back "
                    f"under the same only; leave out --{key}"
                )
        if (
            args.named is None and stored["model"] not in BUNDLED
        ):  # a file does not choose what is run
            raise ValueError(f"{path} was made by another model: give --model {stored['model']}")
        now = {**stored, **changed}
        setup = Setup.of(Namespace(**{**vars(args), **now, "prompt": [now["prompt"]]}), state)
        denoiser, extra = setup.guided([now["prompt"]])
        walk = setup.solver.sample if down else setup.solver.invert
        start = state.fork() if changed else state
        run = walk(denoiser, start, setup.sigmas, extra_args=extra)
        if down:
            kept, picture = (
                run.state if args.save else None,
                to_picture(setup.model.leave(run.x)[0]),
            )
            outputs.write(name, digest_of(path), picture, kept, setup.notes(now["prompt"]))
        else:
            _write_code(outputs, setup, name, digest_of(path), run, now["prompt"])
    say(outputs.summary())


def _write_code(
    outputs: Outputs, setup: Setup, name: str, digest: str, code: Any, prompt: str | None
) -> None:
    """Writes a code as a state, and as a picture of its noise."""
    view = to_picture(noise_in_view(code.x[0], setup.ends[0]))
    outputs.write(name, digest, view, code.state, setup.notes(prompt))
    _about_code(name, setup, code.x)


def _about_code(name: str, setup: Setup, code: Tensor) -> None:
    z = code.double() / setup.model.deviation(setup.ends[0])
    about = f"mean {z.mean().item():.3f}, standard deviation {z.std().item():.3f}"
    tqdm.write(f"{name}: code of {about} (of noise: 0 and 1)", file=sys.stderr)
