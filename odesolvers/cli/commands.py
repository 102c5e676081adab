"""The commands, each on one picture or many."""

from __future__ import annotations

import sys
from argparse import Namespace
from textwrap import wrap
from typing import Any

from torch import lerp
from tqdm import tqdm

import odesolvers as ode

from ..bundled import BUNDLED, GRIDS, level_of
from ..editing import edit as edit_picture, first_level, interpolate as between, mark, matches
from ..extend import IntegrationApproximator
from ..models.emoji import emoji_groups
from ..opening import SHORT, solver_of
from ..parsing import KINDS
from ..pictures import noise_in_view, read_mask, side_by_side
from ..results import Item
from ..values import widened
from .outputs import say
from .work import Input, Setup, Task, in_turn


def sample(args: Namespace) -> None:
    """Sample pictures from noise, or from the states of `invert`."""
    if not args.files:
        return from_noise(args)
    task = Task(args)
    task.refuse("count seed batch", "is for pictures from noise, not from states")
    items = task.results(task.inputs("states"))
    for one in task.each(items, free="prompt negative guidance"):
        state, setup = one.x, one.setup.under(**one.changed)
        if one.changed and state.index == len(state.sigmas) - 1:
            raise ValueError(
                f"{one.item.path} is at the last level, where another {min(one.changed)} changes "
                "nothing: invert it first"
            )
        denoiser, extra = setup.guided()
        state = state.fork() if one.changed else state
        run = setup.solver.sample(denoiser, state, setup.sigmas, extra_args=extra)
        image = setup.model.leave(run.x)[0]
        task.write(one.item, image, run.state if args.save else None, setup)
    return task.end()


def from_noise(args: Namespace) -> None:
    """Sample pictures whose noise carries a key; a photo cannot be marked."""
    task = Task(args)
    prompts = in_turn("prompt", args.prompt, args.count, most=args.count)
    items = [Item(f"{args.seed + k:06d}", prompt=prompt) for k, prompt in enumerate(prompts)]
    if missing := task.results(items):
        setup = task.setup
        alone = args.save or setup.solver.arithmetic.exact
        if alone and args.batch > 1:
            task.refuse(
                "batch", "is 1 for states and exact solvers, so that a state leads back alone"
            )
        size = 1 if alone else args.batch
        bar = tqdm(total=len(missing), desc=args.prog.split()[-1], unit="picture", disable=None)
        for chosen in (missing[k : k + size] for k in range(0, len(missing), size)):
            seeds = [int(item.name) for item in chosen]
            x = setup.model.draw(seeds, setup.ends[0], setup.dtype)
            x = x if args.key is None else mark(x, args.key)
            denoiser, extra = setup.guided(*(item.prompt for item in chosen))
            run = setup.solver.sample(denoiser, x, setup.sigmas, extra_args=extra)
            for item, image in zip(chosen, setup.model.leave(run.x), strict=True):
                own = setup.under(prompt=item.prompt)
                task.write(item, image, run.state if args.save else None, own)
                bar.update()
        bar.close()
    task.end()


def invert(args: Namespace) -> None:
    """Invert pictures, or states of `sample` and `edit`, to noise."""
    task = Task(args)
    for one in task.each(task.results(task.inputs("pictures and states"))):
        setup = one.setup
        denoiser, extra = setup.guided()
        code = setup.solver.invert(denoiser, one.x, setup.sigmas, extra_args=extra)
        view = noise_in_view(code.x[0], setup.ends[0])
        task.write(one.item, view, code.state, setup)
        _about_code(one, code)
    task.end()


def edit(args: Namespace) -> None:
    """Invert pictures under one prompt, and sample them under another."""
    if args.mask is not None and args.save:
        raise ValueError(
            "a masked edit has no way back, for each step is blended: leave out --save"
        )
    task = Task(args)
    items = task.results(task.inputs("pictures and states"))
    for one in task.each(items, free="negative guidance"):
        to, solver, sigmas = one.item.to, one.setup.solver, one.setup.sigmas
        setup = one.setup.under(prompt=to, negative=args.negative, guidance=args.guidance)
        if isinstance(one.x, ode.State):
            run = _edited_state(task, one, setup)
            image = setup.model.leave(run.x)[0]
        else:
            setup.guided()  # refuses what would change nothing
            scale, prompt = args.guidance, one.setup.prompt
            conditions = setup.model.edited(prompt, to, scale, args.negative)
            mask = latent_mask = None
            if args.mask is not None:
                mask = read_mask(args.mask, one.size, setup.model.shape, args.fit)
                latent_mask = setup.model.mask(mask)
            conditions |= {"mask": latent_mask, "strength": args.strength}
            run = edit_picture(solver, setup.model.denoiser, one.x, sigmas, **conditions)
            image = setup.model.leave(run.x, setup.ends[1])[0]
            if mask is not None:  # exact in pixels too, where an autoencoder is not
                assert one.picture is not None
                image = lerp(one.picture[0].double(), image, mask)
            _about_code(one, run.code)
        task.write(one.item, image, run.state if args.save else None, setup)
    task.end()


def _edited_state(task: Task, one: Input, setup: Setup) -> Any:
    """The end of a run under the prompt of the edit, from a state that is undone first."""
    task.refuse("mask", "is for pictures, not for states")
    state, solver, sigmas = one.x, setup.solver, setup.sigmas
    if level_of(state) == state.sigmas[0]:
        task.refuse("strength", f"is for pictures and samples, and {one.item.path} is noise")
    else:
        denoiser, extra = one.setup.guided()
        stop = first_level(solver, len(sigmas) - 1, task.args.strength)
        state = solver.invert(denoiser, state, sigmas, extra_args=extra, stop=stop).state
    denoiser, extra = setup.guided()
    return solver.sample(denoiser, state.fork(), sigmas, extra_args=extra)


def interpolate(args: Namespace) -> None:
    """Walk from one picture to another through noise."""
    task = Task(args)
    pictures = task.inputs("pictures")
    if task.total != 2:
        raise ValueError(f"two pictures are interpolated, got {task.total}")
    frames = [Item(f"{k + 1:03d}") for k in range(args.frames)]
    if task.results(frames, pictures):
        ends = list(task.each(pictures))
        if task.skipped:
            raise ValueError(task.skipped[0])
        setup, first, second = task.setup, *(one.x for one in ends)
        (denoiser, source), (_, target) = (one.setup.guided() for one in ends)
        target = target if ends[0].setup.prompt != ends[1].setup.prompt else None
        options: Any = {"frames": args.frames, "source": source, "target": target}
        found = between(
            setup.solver, denoiser, first, second, setup.sigmas, **options, progress=True
        )
        for item, frame in zip(frames, found, strict=True):
            task.write(item, setup.model.leave(frame.x, setup.ends[1])[0], None, setup)
    task.end()


def watermark_detect(args: Namespace) -> None:
    """Look for a key in the noise of pictures, and print a p-value for each."""
    task = Task(args)
    for one in task.each(task.inputs("pictures")):
        setup = one.setup
        extra = setup.model.arguments([setup.prompt])
        code = setup.solver.invert(setup.model.denoiser, one.x, setup.sigmas, extra_args=extra).x
        found = matches(code, args.key)
        agree = f"{found.agreeing.item()} of {found.elements} signs agree"
        name = one.item.path.name if one.item.path else one.item.name
        say(f"{name}: {agree}, p = 10^{found.log10_p_value.item():.1f}")
    task.end()


def roundtrip(args: Namespace) -> None:
    """Compare solvers on the way to noise and back, of pictures or of noise."""
    task = Task(args)
    if args.files:
        task.refuse("seed", "is for noise, not for pictures")
        items = task.inputs("pictures")
    else:
        task.refuse("fit", "is for pictures, not for noise")
        (prompt,) = in_turn("prompt", args.prompt, 1)
        items = [Item(f"{args.seed:06d}", prompt=prompt)]
    missing = task.results(items)
    if missing:
        say(f"{'picture':14} {'solver':26} {'calls':>7} {'round trip':>10} {'code std':>9}")
    for one in task.each(missing):
        setup, x = one.setup, one.x
        denoiser, extra = setup.guided()
        for label in dict.fromkeys([args.solver, *args.compare]):
            solver = solver_of(label, setup.model.method, setup.sigmas)
            walks = (solver.invert, solver.sample)[:: 1 if args.files else -1]
            there = walks[0](denoiser, x, setup.sigmas, extra_args=extra)
            back = walks[1](denoiser, there.state, setup.sigmas, extra_args=extra)
            code, picture = (there.x, back.x) if args.files else (back.x, there.x)
            error = float(widened(back.x - x).norm() / widened(x).norm())
            std = float(widened(code).std()) / setup.model.deviation(setup.ends[0])
            calls = f"{there.nfe}+{back.nfe}"
            say(f"{one.item.name[:14]:14} {label[:26]:26} {calls:>7} {error:10.1e} {std:9.3f}")
            if label == args.solver:
                last = setup.ends[1] if args.files else 0.0
                shown = [x, picture] if args.files else [picture]
                images = [setup.model.leave(y, last)[0] for y in shown]
                view = noise_in_view(code[0], setup.ends[0])
                images[-1:-1] = [view] if view.shape == images[0].shape else []
                task.write(one.item, side_by_side(images), None, setup)
    task.end()


def calibrate(args: Namespace) -> None:
    """Learn weights of BDIA for a model and a grid, for --solver "load('FILE')"."""
    base = ode.parse(args.base) if args.base else None
    if base is not None and not isinstance(base, IntegrationApproximator):
        raise ValueError(f"--base must name a method such as Euler(), got {args.base}")
    if args.out.suffix != ".json" or not (args.out.parent.is_dir() or not args.out.parent.exists()):
        raise ValueError(f"--out must be a file such as {args.out.with_suffix('.json')}")
    if args.out.exists() and not args.again:
        raise FileExistsError(f"{args.out} is there: give another --out, or --again to replace it")
    prompts = in_turn("prompt", args.prompt, args.count, most=args.count)
    setup = Task(args).setup
    denoiser, extra = setup.guided(*prompts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + args.count)
    x = setup.model.draw(seeds, setup.ends[0], setup.dtype)
    options: Any = {"max_runs": args.runs, "progress": True, "extra_args": extra}
    options |= {"base": base or ode.parse(setup.model.method), "levels": args.levels}
    rule = ode.calibrate(denoiser, x, setup.sigmas, **options)
    rule.save(args.out)
    say(f"{rule.report}\nwrote {args.out}")


def report(args: Namespace) -> None:
    """Say before a run what a solver amplifies on a grid."""
    setup = Task(args).setup
    say(str(ode.stability_report(setup.solver, setup.sigmas)))


def list_(args: Namespace) -> None:
    """List short names of solvers, models and grids."""
    del args
    say("--solver takes a short name, or the expression of any solver:")
    for name, (expression, what) in SHORT.items():
        say(f"  {name:8} {what}\n           {expression.format('Euler()', '')}")
    say("In the first three, Euler() stands for the one-step method that suits the model.")
    say("load('FILE.json') in an expression is what `odesolvers calibrate` wrote.")
    for kind, names in KINDS.items():
        _say_wrapped(f"{kind}: ", sorted(names))
    say("\n--model takes")
    for name, (_, what) in BUNDLED.items():
        say(f"  {name:8} {what}")
    say("  a folder, a single file or a hub id of a pipeline of diffusers")
    say("  a .pkl or .safetensors file or URL of EDM, prompts 0, 1, ... if it has classes")
    say("  package.module:function, which returns a denoiser of your own")
    _say_wrapped(
        "prompts of emoji: ", [name for names in emoji_groups().values() for name in names]
    )
    say(f"\n--grid takes {', '.join(GRIDS)}; a pipeline has its own.")


def app(args: Namespace) -> None:
    """Open the local web page: a picture, its noise, the way back and an edit."""
    from ..page import launch

    launch(args.model, args.port, args.device, args.network)


def _say_wrapped(title: str, names: list[str]) -> None:
    lines = wrap(title + ", ".join(names), 78, subsequent_indent="  ", break_on_hyphens=False)
    say("\n".join(lines))


def _about_code(one: Input, code: ode.Solution) -> None:
    z = widened(code.x) / one.setup.model.deviation(level_of(code.state))
    about = f"mean {z.mean().item():.3f}, standard deviation {z.std().item():.3f}"
    tqdm.write(f"{one.item.name}: code of {about} (of noise: 0 and 1)", file=sys.stderr)
