"""The nodes for ComfyUI, on a stand-in for it or on ComfyUI itself: see `comfy_hosts`."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from odesolvers import parse

from .comfy_hosts import FOLDER, KINDS, SCALE, ComfyUI, Host, Network, StandIn, prompt

BOTH_WAYS = "BDIA(Euler(), gamma=StepRatio(1))"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    chosen: Host = StandIn() if FOLDER is None else ComfyUI()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in chosen.install().items():
            patch.setitem(sys.modules, name, module)
        yield chosen


@pytest.fixture(scope="module")
def nodes(host: Host) -> Iterator[Any]:
    yield importlib.import_module("odesolvers.interop.comfyui")
    del sys.modules["odesolvers.interop.comfyui"]  # it holds on to the host


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def image(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(batch, 4, 8, 8, generator=generator)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def noise_end(nodes: Any, latent: dict[str, Any]) -> Tensor:
    """The state at the highest level, in the model's space."""
    state = latent[nodes.KEY].state
    end: Tensor = state.current if state.coupled else state.partner
    return end.double()


def test_every_solver_of_the_menu_goes_back_and_forth(host: Host, nodes: Any, kind: str) -> None:
    sigmas = host.sigmas(kind, 12)
    for name, expression in nodes.SOLVERS.items():
        (sampler,) = nodes.SamplerNode().make(name)
        assert sampler.solver == parse(expression)
        if name.endswith("samples only"):
            continue
        (noise,) = nodes.InvertNode().invert(
            host.guider(kind), sampler, sigmas, {"samples": image(), "batch_index": [0, 1]}
        )
        assert noise["batch_index"] == [0, 1]
        assert far(noise["samples"], image()) > 0.1, name
        (again,) = nodes.SampleNode().sample(host.guider(kind), noise)
        assert far(again["samples"], image()) < 1e-5, name
        (edited,) = nodes.SampleNode().sample(host.guider(kind, seed=7), noise)
        assert far(edited["samples"], image()) > 1e-2, name
        (back,) = nodes.InvertNode().invert(host.guider(kind, seed=7), sampler, sigmas, edited)
        miss = far(noise_end(nodes, back), noise_end(nodes, noise))
        assert miss == 0 if "bit" in name else miss < 1e-9, name


def test_networks_in_half_precision_are_undone_as_well(host: Host, nodes: Any, kind: str) -> None:
    (sampler,) = nodes.SamplerNode().make("", BOTH_WAYS)
    sigmas, half = host.sigmas(kind, 12), torch.float16
    (noise,) = nodes.InvertNode().invert(
        host.guider(kind, dtype=half), sampler, sigmas, {"samples": image()}
    )
    (edited,) = nodes.SampleNode().sample(host.guider(kind, seed=7, dtype=half), noise)
    (back,) = nodes.InvertNode().invert(
        host.guider(kind, seed=7, dtype=half), sampler, sigmas, edited
    )
    assert far(noise_end(nodes, back), noise_end(nodes, noise)) < 1e-9


def test_the_sampler_is_one_of_the_host(host: Host, nodes: Any, kind: str) -> None:
    """Under the host's own sampling, `Euler` is the host's "euler"."""
    (ours,) = nodes.SamplerNode().make("", "Euler()")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for sigmas in (host.sigmas(kind, 8), host.sigmas(kind, 8)[3:6]):
        results = [
            host.guider(kind).sample(noise, image(), s, sigmas, callback=lambda *_: None, seed=0)
            for s in (ours, host.euler())
        ]
        assert far(*results) < 1e-5


@pytest.mark.parametrize("levels", [slice(3, None), slice(None, -1), slice(2, -2)])
def test_part_of_the_way_and_the_scaling_at_both_ends(
    host: Host, nodes: Any, kind: str, levels: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `denoise` below 1, and with sigmas that end above 0."""
    shown: list[tuple[int, Tensor, Tensor, int]] = []
    monkeypatch.setattr(
        sys.modules["latent_preview"], "prepare_callback", lambda *_: lambda *s: shown.append(s)
    )
    (sampler,) = nodes.SamplerNode().make("", BOTH_WAYS)
    sigmas = host.sigmas(kind, 10)[levels]
    (noise,) = nodes.InvertNode().invert(host.guider(kind), sampler, sigmas, {"samples": image()})
    high, low, flow = sigmas[0], sigmas[-1], kind in ("flow", "flux")
    clean, unit = image() * SCALE, noise[nodes.KEY].noise
    assert far(shown[0][2], clean * (1 - low) if flow else clean) < 1e-6
    noisy = (1 - high) * clean + high * unit if flow else clean + high * unit
    assert far(noisy.double(), noise_end(nodes, noise)) < 1e-6
    assert far(noise["samples"].double(), noise_end(nodes, noise) / SCALE) < 1e-6
    (again,) = nodes.SampleNode().sample(host.guider(kind), noise)
    assert far(again["samples"], image()) < 1e-5


def test_an_inversion_is_that_of_the_solver(host: Host, nodes: Any) -> None:
    network, sigmas = Network(torch.float32), host.sigmas("flow", 8)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        z, s = x.float(), sigma.float()
        velocities = [network(z, 1000 * s, prompt(seed)) for seed in (1, 0)]
        guided = velocities[1] + 3.0 * (velocities[0] - velocities[1])
        return x - sigma.reshape(-1, 1, 1, 1) * guided

    (sampler,) = nodes.SamplerNode().make("", BOTH_WAYS)
    (noise,) = nodes.InvertNode().invert(
        host.guider("flow", cfg=3.0), sampler, sigmas, {"samples": image()}
    )
    expected = parse(BOTH_WAYS).invert(denoiser, SCALE * image().double(), sigmas)
    assert far(noise_end(nodes, noise), expected.x) < 1e-5


def test_a_mask_keeps_the_image_outside_of_it_and_can_be_undone(
    host: Host, nodes: Any, kind: str
) -> None:
    (sampler,) = nodes.SamplerNode().make("", BOTH_WAYS)
    sigmas, mask = host.sigmas(kind, 12), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    (noise,) = nodes.InvertNode().invert(
        host.guider(kind), sampler, sigmas, {"samples": image(), "noise_mask": mask}
    )
    (whole,) = nodes.InvertNode().invert(host.guider(kind), sampler, sigmas, {"samples": image()})
    assert torch.equal(noise["samples"], whole["samples"])  # the whole image is inverted
    (edited,) = nodes.SampleNode().sample(host.guider(kind, seed=7), noise)
    (free,) = nodes.SampleNode().sample(host.guider(kind, seed=7), whole)
    assert far(edited["samples"][..., 4:], image()[..., 4:]) < 1e-5
    assert far(free["samples"][..., 4:], image()[..., 4:]) > 0.05
    assert far(edited["samples"][..., :4], image()[..., :4]) > 0.05
    (back,) = nodes.InvertNode().invert(host.guider(kind, seed=7), sampler, sigmas, edited)
    assert far(noise_end(nodes, back), noise_end(nodes, noise)) < 1e-6  # the noise is in float32


def test_a_latent_that_was_changed_has_no_pair(host: Host, nodes: Any) -> None:
    (sampler,) = nodes.SamplerNode().make("", BOTH_WAYS)
    sigmas, guider = host.sigmas("eps", 6), host.guider("eps")
    (noise,) = nodes.InvertNode().invert(guider, sampler, sigmas, {"samples": image()})
    for samples in (noise["samples"] + 1e-3, noise["samples"][:1], noise["samples"].clone()):
        changed = {**noise, "samples": samples}
        if torch.equal(samples, noise["samples"]):
            nodes.SampleNode().sample(guider, changed)  # an equal copy is the latent it was
            continue
        with pytest.raises(ValueError, match="has no pair, or was changed"):
            nodes.SampleNode().sample(guider, changed)
    with pytest.raises(ValueError, match="has no pair"):
        nodes.SampleNode().sample(guider, {"samples": image()})
    (there,) = nodes.SampleNode().sample(guider, noise)
    (new,) = nodes.InvertNode().invert(guider, sampler, sigmas, {**there, "samples": image(seed=3)})
    (lone,) = nodes.InvertNode().invert(guider, sampler, sigmas, {"samples": image(seed=3)})
    assert torch.equal(new["samples"], lone["samples"])


def test_what_cannot_be_run_is_refused(host: Host, nodes: Any) -> None:
    (sampler,) = nodes.SamplerNode().make("", BOTH_WAYS)
    sigmas, guider = host.sigmas("eps", 6), host.guider("eps")
    invert = nodes.InvertNode().invert
    with pytest.raises(TypeError, match=r"only the samplers of the node.*got KSAMPLER"):
        invert(guider, host.euler(), sigmas, {"samples": image()})
    with pytest.raises(TypeError, match="only latents of one tensor"):
        invert(guider, sampler, sigmas, {"samples": [image()]})
    with pytest.raises(ValueError, match="flip it with"):
        invert(guider, sampler, sigmas.flip(0), {"samples": image()})
    with pytest.raises(ValueError, match=r"wrap it as BDIA\(Euler\(\)\)"):
        invert(guider, nodes.SamplerNode().make("", "Euler()")[0], sigmas, {"samples": image()})
    (noise,) = invert(guider, sampler, sigmas, {"samples": image()})
    (there,) = nodes.SampleNode().sample(guider, noise)
    with pytest.raises(ValueError, match="nothing to sample"):
        nodes.SampleNode().sample(guider, there)
    with pytest.raises(ValueError, match="another grid"):
        invert(guider, sampler, host.sigmas("eps", 7), there)


@pytest.mark.parametrize(
    ("expression", "told"),
    [("", True), (BOTH_WAYS, True), ("BDIA(Eul())", "did you mean"), ("StepRatio(1)", "no solver")],
)
def test_expressions_are_checked_before_a_workflow_runs(
    nodes: Any, expression: str, told: bool | str
) -> None:
    found = nodes.SamplerNode.VALIDATE_INPUTS(expression=expression)
    assert found is True if told is True else str(told) in found


def test_previews_and_interruptions(
    host: Host, nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, Tensor, Tensor, int]] = []
    monkeypatch.setattr(
        sys.modules["latent_preview"], "prepare_callback", lambda *_: lambda *s: shown.append(s)
    )
    (sampler,) = nodes.SamplerNode().make("", BOTH_WAYS)
    sigmas, guider = host.sigmas("eps", 6), host.guider("eps")
    steps = len(sigmas) - 1
    (noise,) = nodes.InvertNode().invert(guider, sampler, sigmas, {"samples": image()})
    assert [s[0] for s in shown] == list(range(steps))
    shown.clear()
    nodes.SampleNode().sample(guider, noise)
    assert [s[0] for s in shown] == list(range(1, steps))
    for _, denoised, x, total in shown:
        assert denoised.dtype is x.dtype is torch.float32
        assert total == steps

    class Interrupted(BaseException):
        pass

    def stop(*shown: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(sys.modules["latent_preview"], "prepare_callback", lambda *_: stop)
    with pytest.raises(Interrupted):
        nodes.SampleNode().sample(guider, noise)


DOCS = Path(__file__).parents[1] / "docs"
PACKAGE = Path(__file__).parents[1] / "comfyui"
STOCK = {  # nodes of ComfyUI: their inputs, None for a widget, and their outputs
    "CheckpointLoaderSimple": ({"ckpt_name": None}, ("MODEL", "CLIP", "VAE")),
    "LoadImage": ({"image": None}, ("IMAGE", "MASK")),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ("LATENT",)),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "CLIPTextEncode": ({"text": None, "clip": "CLIP"}, ("CONDITIONING",)),
    "CFGGuider": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": None},
        ("GUIDER",),
    ),
    "BasicScheduler": (
        {"model": "MODEL", "scheduler": None, "steps": None, "denoise": None},
        ("SIGMAS",),
    ),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": None}, ()),
}


def form(nodes: Any, name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The inputs and outputs of a node, as in `STOCK`."""
    if name in STOCK:
        return STOCK[name]
    node = nodes.NODE_CLASS_MAPPINGS[name]
    given = node.INPUT_TYPES()
    inputs = {
        key: None if isinstance(kind, list) or kind == "STRING" else kind
        for key, (kind, *_) in {**given["required"], **given.get("optional", {})}.items()
    }
    return inputs, node.RETURN_TYPES


def test_the_workflow_of_the_docs_is_made_of_nodes_that_exist(nodes: Any) -> None:
    workflow = json.loads((DOCS / "workflows" / "comfyui_edit.json").read_text())
    for node in workflow.values():
        inputs, _ = form(nodes, node["class_type"])
        assert node["inputs"].keys() == inputs.keys(), node["class_type"]
        for key, value in node["inputs"].items():
            if not isinstance(value, list):
                assert inputs[key] is None
                continue
            origin, output = value
            assert form(nodes, workflow[origin]["class_type"])[1][output] == inputs[key]
    used = {node["class_type"] for node in workflow.values()}
    assert set(nodes.NODE_CLASS_MAPPINGS) < used
    [chosen] = [n["inputs"] for n in workflow.values() if n["class_type"] == "ODESolversSampler"]
    assert chosen["solver"] in nodes.SOLVERS


def test_the_node_package_is_of_this_version() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    node, own = (
        tomllib.loads((folder / "pyproject.toml").read_text())
        for folder in (PACKAGE, PACKAGE.parent)
    )
    assert node["project"]["version"] == own["project"]["version"]
    assert node["project"]["dependencies"] == [own["project"]["name"]]
    assert node["tool"]["comfy"].keys() == {"PublisherId", "DisplayName"}
    assert "comfy" not in own["tool"]  # where the registry would find no nodes


def test_the_file_of_the_docs_registers_the_nodes(nodes: Any, tmp_path: Path) -> None:
    page = (DOCS / "comfyui.md").read_text()
    [text] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert text.strip() in re.sub(r"(?m)^ {4}", "", nodes.__doc__)
    assert text == (PACKAGE / "__init__.py").read_text()
    file = tmp_path / "exact_inversion.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(str(file.with_suffix("")), file)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS is nodes.NODE_CLASS_MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    for node in module.NODE_CLASS_MAPPINGS.values():
        inputs = [key for group in node.INPUT_TYPES().values() for key in group]
        assert list(inspect.signature(getattr(node(), node.FUNCTION)).parameters) == inputs
        assert len(node.RETURN_TYPES) == 1
    for name in module.NODE_DISPLAY_NAME_MAPPINGS.values():
        assert f"**{name}**" in page
