"""The commands of `odesolvers`: options in, a table and a picture out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from .. import State
from . import choices, pictures, report, work
from .choices import Options, Settings
from .work import Setup


class _Commands(TyperGroup):
    """Turns the errors that say what to do into one line and the exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            message = escape(str(error))
            Console(stderr=True).print(f"[bold red]Error:[/bold red] {message}", highlight=False)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    help="Diffusion ODE solvers that go from noise to data and exactly back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SUFFIX = ".safetensors"


def _state_path(path: Path | None) -> Path | None:
    if path is not None and path.suffix != SUFFIX:
        raise typer.BadParameter(f"{path} must end in {SUFFIX}")
    return path


ModelName = Annotated[
    str | None,
    typer.Option(
        "--model", help="See `odesolvers list`.", show_default="letters where installed, or digits"
    ),
]
Approximator = Annotated[
    str | None, typer.Option(help="The one-step method under BDIA.", show_default="heun-edm")
]
Gamma = Annotated[
    str | None,
    typer.Option(
        help="A number in (0, 1], step-ratio-P, damped-C-P, FILE.json or smoothed-RULE.",
        show_default="step-ratio-2",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="Classes, taken in turn: 3 or 1,4,7 or 0-9, A or A-E.", show_default="no classes"
    ),
]
GridName = Annotated[
    str | None, typer.Option("--grid", help="Spacing of the levels.", show_default="karras")
]
Steps = Annotated[int | None, typer.Option(help="Steps of the grid.", show_default="18")]
SigmaMin = Annotated[float | None, typer.Option(help="Lowest level above 0.", show_default="0.002")]
SigmaMax = Annotated[float | None, typer.Option(help="Highest level.", show_default="80")]
Rho = Annotated[float | None, typer.Option(help="Curvature of the grid.", show_default="7")]
Count = Annotated[int, typer.Option(help="How many images.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Dtype = Annotated[
    str | None, typer.Option(help=f"{', '.join(choices.DTYPES)}.", show_default="float32")
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Classifier-free, from no label to the labels.",
        show_default="1, or 3 to sample letters",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Save = Annotated[
    Path | None,
    typer.Option(help=f"Write the state too, to go on or back ({SUFFIX}).", callback=_state_path),
]


@app.command()
def roundtrip(
    model: ModelName = None,
    approximator: Approximator = None,
    gamma: Gamma = None,
    labels: Labels = None,
    grid: GridName = None,
    steps: Steps = None,
    sigma_min: SigmaMin = None,
    sigma_max: SigmaMax = None,
    rho: Rho = None,
    count: Count = 36,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("out/roundtrip.png"),
) -> None:
    """Sample, invert to the noise, sample again: every solver in a table, one in a picture."""
    options = Options(
        model or "digits",
        approximator,
        gamma,
        labels,
        grid,
        steps,
        sigma_min,
        sigma_max,
        rho,
        dtype,
        device,
    )
    setup, settings = Setup.of(options)
    noun = setup.model.noun
    contestants = work.every_solver(settings)
    rows = []
    with _progress(len(contestants)) as bar:
        for row in work.compare(setup, contestants, count, seed):
            rows.append(row)
            bar.update()
    console = Console()
    console.print(report.comparison(rows, settings, noun))
    console.print(report.legend(count, noun), style="dim", highlight=False)
    for sentence in report.findings(rows, settings, noun, finite=setup.model.finite):
        console.print(f"\n{sentence}", highlight=False)
    chosen = next(row for row in rows if row.settings.solver() == settings.solver())
    title = (
        f"From noise to {noun}s and back: BDIA over {settings.approximator}, γ = {settings.gamma}"
    )
    pictures.draw_round_trip(chosen.trip, setup.sigmas[0].item(), out, title=title, noun=noun)
    _wrote(out, "picture")


@app.command()
def sample(
    model: ModelName = None,
    approximator: Approximator = None,
    gamma: Gamma = None,
    labels: Labels = None,
    grid: GridName = None,
    steps: Steps = None,
    sigma_min: SigmaMin = None,
    sigma_max: SigmaMax = None,
    rho: Rho = None,
    count: Count = 36,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    guidance: Guidance = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Go on from the state that `invert --save` wrote, not noise."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The contact sheet.")] = Path("out/samples.png"),
    save: Save = None,
) -> None:
    """Sample images; with --save, keep the state that leads back to their noise."""
    if start is None:
        model = model or choices.default_model()
    options = Options(
        model,
        approximator,
        gamma,
        labels,
        grid,
        steps,
        sigma_min,
        sigma_max,
        rho,
        dtype,
        device,
        guidance,
    )
    if start is None:
        setup, settings = Setup.of(options.for_sampling())
        solution = work.go(setup, settings, setup.noise(count, seed), down=True)
    else:
        setup, settings, state = Setup.restore(start, options, relabel=True)
        solution = work.go(setup, settings, state, down=True)
    pictures.save(pictures.contact_sheet(solution.x), out)
    noun = setup.model.noun
    print(f"{solution.nfe} evaluations of the denoiser for {len(solution.x)} {noun}s")
    if setup.model.finite:
        distance = setup.distances(solution.x).median().item()
        print(f"distance to the nearest real {noun}, per pixel, median: {distance:.1e}")
    _wrote(out, "contact sheet")
    _save(solution.state, save, settings)


@app.command()
def invert(
    file: Annotated[
        Path, typer.Argument(help="A state (.safetensors), an image, or an array (.npy).")
    ],
    model: ModelName = None,
    approximator: Approximator = None,
    gamma: Gamma = None,
    labels: Labels = None,
    grid: GridName = None,
    steps: Steps = None,
    sigma_min: SigmaMin = None,
    sigma_max: SigmaMax = None,
    rho: Rho = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    guidance: Guidance = None,
    out: Annotated[Path, typer.Option(help="Images and noise.")] = Path("out/inverted.png"),
    save: Save = None,
) -> None:
    """Go back to the noise: exactly from a saved state, as well as can be from a lone image.

    A state brings its solver, grid and labels along; options that say otherwise are refused.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if file.suffix != SUFFIX:
        model = model or choices.default_model()
    options = Options(
        model,
        approximator,
        gamma,
        labels,
        grid,
        steps,
        sigma_min,
        sigma_max,
        rho,
        dtype,
        device,
        guidance,
    )
    if file.suffix == SUFFIX:
        setup, settings, state = Setup.restore(file, options)
        images = state.current
        solution = work.go(setup, settings, state, down=False)
    else:
        setup, settings = Setup.of(options)
        images = pictures.read_images(file, setup.model.images.shape[1:])
        images = setup.at_last_level(images)
        solution = work.go(setup, settings, images, down=False)
    mean, std = work.latent(solution.x, setup.sigmas)
    print(f"{solution.nfe} evaluations of the denoiser")
    print(f"latent mean {mean:.4f}, standard deviation {std:.4f} (of noise: 0 and 1)")
    noise = pictures.noise_in_view(solution.x, setup.sigmas[0].item())
    sheets = pictures.contact_sheet(images), pictures.contact_sheet(noise)
    pictures.save(pictures.side_by_side(*sheets), out)
    _wrote(out, "images and their noise")
    _save(solution.state, save, settings)


@app.command()
def edit(
    file: Annotated[
        Path | None,
        typer.Argument(help="An image or an array (.npy), with its --labels; or held-out ones."),
    ] = None,
    to: Annotated[str, typer.Option(help="Labels to sample under.")] = "",
    guidance: Annotated[float, typer.Option(help="Away from the image's own label.")] = 3.0,
    model: ModelName = None,
    approximator: Approximator = None,
    gamma: Gamma = None,
    labels: Labels = None,
    grid: GridName = None,
    steps: Steps = None,
    sigma_min: SigmaMin = None,
    sigma_max: SigmaMax = None,
    rho: Rho = None,
    count: Count = 6,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("out/edit.png"),
) -> None:
    """Invert images under their own label, and sample from their code under another."""
    model = model or choices.default_model()
    options = Options(
        model, approximator, gamma, labels, grid, steps, sigma_min, sigma_max, rho, dtype, device
    )
    setup, settings = Setup.of(options)
    names = choices.MODELS[model].names
    targets = choices.labels(to or ",".join(names[:: max(1, len(names) // 8)]), names)
    if file is None:
        images, settings = setup.held_out(settings, count, seed)
    elif settings.labels is None:
        raise ValueError(f"an edit starts from the label of the image: give --labels for {file}")
    else:
        images = pictures.read_images(file, setup.model.images.shape[1:])
    images = setup.at_last_level(images)
    done = work.edit(setup, settings, images, targets, guidance)
    mean, std = work.latent(done.code, setup.sigmas)
    print(f"{done.nfe} evaluations of the denoiser")
    print(f"latent mean {mean:.4f}, standard deviation {std:.4f} (of noise: 0 and 1)")
    print(f"back under its own label to {work.relative(done.back, images):.1e}")
    assert settings.labels is not None
    pictures.draw_edit(
        done,
        setup.sigmas[0].item(),
        out,
        own=[names[settings.labels[k % len(settings.labels)]] for k in range(len(images))],
        targets=[names[target] for target in targets],
        title=f"The same code under another label, guidance {guidance:g}",
    )
    _wrote(out, "edits")


@app.command()
def calibrate(
    model: ModelName = None,
    approximator: Approximator = None,
    labels: Labels = None,
    grid: GridName = None,
    steps: Steps = None,
    sigma_min: SigmaMin = None,
    sigma_max: SigmaMax = None,
    rho: Rho = None,
    count: Annotated[int, typer.Option(min=1, help="How many states to learn from.")] = 16,
    seed: Seed = 1000,
    dtype: Dtype = None,
    device: Device = "cpu",
    guidance: Guidance = None,
    runs: Annotated[int, typer.Option(min=1, help="When to stop at the latest.")] = 80,
    out: Annotated[Path, typer.Option(help="The weights.")] = Path("out/gamma.json"),
) -> None:
    """Learn the weights of BDIA for a model: then give the file as --gamma."""
    options = Options(
        model or choices.default_model(),
        approximator or "euler",
        None,
        labels,
        grid,
        steps,
        sigma_min,
        sigma_max,
        rho,
        dtype,
        device,
        guidance,
    )
    setup, settings = Setup.of(options.for_sampling())
    rule = work.calibrated(setup, settings, count, seed, runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    rule.save(out)
    print(rule.report)
    _wrote(out, "weights")


@app.command("list")
def list_() -> None:
    """Solvers, gamma rules, grids and models, and what each needs."""
    for table in report.catalogue():
        Console().print(table)


def _save(state: State, path: Path | None, settings: Settings) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state.save(path, settings.notes())
        _wrote(path, "state")


def _wrote(path: Path, what: str) -> None:
    print(f"wrote {path} ({what})")


def _progress(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress bars need tqdm: pip install 'odesolvers[cli]'") from error
    return tqdm(total=total, desc="solvers")
