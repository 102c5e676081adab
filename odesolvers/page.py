"""A local web page: a picture, its noise, the way back and an edit, beside DDIM inversion's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from .bundled import BUNDLED, Model, level_of
from .editing import edit
from .opening import open_model, solver_of
from .pictures import noise_in_view, read_images, to_picture
from .values import widened

SOLVERS: Final = {"BDIA": "damped", "DDIM inversion": "ddim"}
SHOWN: Final = ("noise", "reconstruction", "edit")


def compare(
    model: Model,
    picture: Tensor,
    prompt: str | None,
    target: str | None,
    *,
    steps: int,
    guidance: float,
    strength: float,
) -> dict[str, tuple[list[Any], str]]:
    """The noise of a picture, its reconstruction and an edit, by each of `SOLVERS`.

    Args:
        model: the model.
        picture: float ``(1, C, H, W)`` in [-1, 1].
        prompt: what the picture shows, or None.
        target: the prompt of the edit, or None.
        steps: of the grid.
        guidance: the scale of the edit; the inversion and the way back are unguided.
        strength: see `edit`.

    Returns:
        For each solver the pictures of `SHOWN` and a sentence with the errors.
    """
    sigmas = model.sigmas(steps, None, {})
    last = float(sigmas[-1])
    x = model.enter(picture, last, model.dtype)
    conditions = model.edited(prompt, target, guidance if target else None, None)
    found = {}
    for name, short in SOLVERS.items():
        solver = solver_of(short, model.method, sigmas)
        edited = edit(solver, model.denoiser, x, sigmas, **conditions, strength=strength)
        state = edited.code.state.fork()
        back = solver.sample(model.denoiser, state, sigmas, extra_args=conditions["source"]).x
        code, level = edited.code.x, level_of(edited.code.state)
        error = float(widened(back - x).norm() / widened(x).norm())
        std = float(widened(code).std()) / model.deviation(level)
        ends = [model.leave(y, last)[0] for y in (back, edited.x)]
        shown = [to_picture(image) for image in (noise_in_view(code[0], level), *ends)]
        said = f"off by {error:.1e} after the way back; code of standard deviation {std:.2f}"
        found[name] = shown, f"**{name}**: {said} (of noise: 1)"
    return found


def build(model: str, device: torch.device, network: torch.dtype | None = None) -> Any:
    """The page, for `launch()` of gradio.

    Raises:
        ImportError: if gradio is not installed.
        ValueError: if the model cannot be opened.
    """
    gradio = _gradio()
    opened = {"name": model, "model": open_model(model, device, network, None)}

    def load(name: str) -> tuple[Any, ...]:
        if ":" in name and "://" not in name:  # a page is no place to name code
            raise gradio.Error("functions are opened from the command line: odesolvers app --model")
        opened["model"] = _shown(gradio, lambda: open_model(name.strip(), device, network, None))
        opened["name"] = name.strip()
        its: Any = opened["model"]
        return _about(opened), gradio.Slider(value=its.steps), gradio.Slider(value=its.guidance)

    def draw(prompt: str, steps: float, guidance: float, seed: float) -> Any:
        def work() -> Any:
            its: Any = opened["model"]
            sigmas = its.sigmas(int(steps), None, {})
            solver = solver_of("damped", its.method, sigmas)
            denoiser, extra = its.guided([prompt or None], guidance if prompt else None, None)
            noise = its.draw([int(seed)], float(sigmas[0]), its.dtype)
            x = solver.sample(denoiser, noise, sigmas, extra_args=extra).x
            return _enlarged(to_picture(its.leave(x)[0]))

        return _shown(gradio, work)

    def run(
        path: str | None, prompt: str, target: str, steps: float, guidance: float, strength: float
    ) -> Any:
        if path is None:
            raise gradio.Error("drop a picture first, or draw one")

        def work() -> list[Any]:
            its: Any = opened["model"]
            picture = read_images(Path(path), its.shape, "crop")[:1]
            settings: Any = {"steps": int(steps), "guidance": guidance, "strength": strength}
            found = compare(its, picture, prompt or None, target or None, **settings)
            return [p for row, said in found.values() for p in (*map(_enlarged, row), said)]

        return _shown(gradio, work)

    first: Any = opened["model"]
    with gradio.Blocks(title="odesolvers", analytics_enabled=False) as page:
        gradio.Markdown("# From a picture to its noise, and exactly back")
        with gradio.Row():
            with gradio.Column(scale=1):
                name = gradio.Textbox(model, label="Model: a name, a folder, a file or a hub id")
                loads = gradio.Button("Load the model")
                about = gradio.Markdown(_about(opened))
                picture = gradio.Image(type="filepath", label="Picture", height=220)
                prompt = gradio.Textbox(label="Prompt of the picture")
                target = gradio.Textbox(label="Prompt of the edit")
                steps = gradio.Slider(4, 100, first.steps, step=1, label="Steps")
                guidance = gradio.Slider(1, 15, first.guidance, step=0.5, label="Guidance")
                strength = gradio.Slider(0.2, 1, 1.0, step=0.05, label="Strength")
                runs = gradio.Button("Invert, go back and edit", variant="primary")
                seed = gradio.Number(0, precision=0, label="Seed")
                draws = gradio.Button("Draw a picture of the prompt")
            with gradio.Column(scale=3):
                outputs: list[Any] = []
                for solver in SOLVERS:
                    with gradio.Row():
                        for what in SHOWN:
                            label = f"{solver}: {what}"
                            outputs.append(gradio.Image(label=label, format="png", height=220))
                    outputs.append(gradio.Markdown())
        loads.click(load, name, [about, steps, guidance])
        draws.click(draw, [prompt, steps, guidance, seed], picture)
        runs.click(run, [picture, prompt, target, steps, guidance, strength], outputs)
    return page.queue(default_concurrency_limit=1)


def launch(model: str, port: int, device: torch.device, network: torch.dtype | None) -> None:
    """Serves the page on this machine alone, until it is interrupted."""
    build(model, device, network).launch(
        server_name="127.0.0.1", server_port=port, share=False, show_error=True
    )


def _enlarged(picture: Image.Image) -> Image.Image:
    """A small picture in whole multiples of its size, to be seen."""
    times = max(1, 200 // picture.width)
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def _about(opened: dict[str, Any]) -> str:
    name, model = opened["name"], opened["model"]
    channels, height, width = model.shape
    hint = (
        BUNDLED[name][1] if name in BUNDLED else f"{width} x {height} pixels, {channels} channels"
    )
    return f"Loaded: {name}, {hint}"


def _shown(gradio: Any, work: Callable[[], Any]) -> Any:
    """The result of `work`, whose errors are shown on the page."""
    try:
        return work()
    except Exception as error:
        raise gradio.Error(str(error)[:1000]) from error


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"the page needs gradio ({error}): pip install gradio", name=error.name
        ) from error
    return gradio
