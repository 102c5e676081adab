"""The local web page, with the network in the box, in a headless browser where there is one."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from odesolvers import page
from odesolvers.models import emoji_drawings
from odesolvers.opening import open_model


def drawing() -> torch.Tensor:
    drawings = emoji_drawings()
    return drawings.images[drawings.withheld][:1]


def test_the_way_back_is_exact_beside_ddim_inversion_which_is_not() -> None:
    model = open_model("emoji", torch.device("cpu"), None, None)
    options: Any = {"steps": 12, "guidance": 3.0}
    found = page.compare(model, drawing(), "flag", "food-fruit", strength=1.0, **options)
    shown = {name: [np.asarray(p).astype(int) for p in row] for name, (row, _) in found.items()}
    given = ((drawing()[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert abs(shown["BDIA"][1] - given).max() <= 1
    assert abs(shown["DDIM inversion"][1] - given).max() > 10
    assert abs(shown["BDIA"][2] - given).mean() > 3
    for name, (_, said) in found.items():
        assert said.startswith(f"**{name}**: off by ")
    # A code of strength 1/2 is noise of a lower level, and shown as such.
    half = page.compare(model, drawing(), "flag", "food-fruit", strength=0.5, **options)["BDIA"]
    assert 0.5 < float(half[1].split("deviation ")[1].split()[0]) < 2


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match="pip install gradio"):
        page.build("emoji", torch.device("cpu"))


@pytest.fixture
def address() -> Iterator[str]:
    """The address of the page, served by this process."""
    pytest.importorskip("gradio", reason="the page needs the extra `app`")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    built = page.build("emoji", torch.device("cpu"))
    built.launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, share=False
    )
    yield f"http://127.0.0.1:{port}"
    built.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of gradio and its server
def test_the_page_in_a_browser(address: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs chromium")
    picture = ((drawing()[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "a.png")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1100})
        tab.goto(address)
        tab.get_by_text("Loaded: emoji, a small trained network").wait_for(timeout=60_000)
        run = tab.get_by_role("button", name="Invert, go back and edit")
        run.click()
        tab.get_by_text("drop a picture first").wait_for(timeout=30_000)
        tab.locator("input[type=file]").first.set_input_files(str(tmp_path / "a.png"))
        tab.get_by_label("Prompt of the picture").fill("flag")
        tab.get_by_label("Prompt of the edit").fill("food-fruit")
        tab.get_by_label("number input for Steps").fill("8")
        tab.wait_for_timeout(1000)
        run.click()
        tab.get_by_text("DDIM inversion: off by").wait_for(timeout=120_000)
        said = tab.get_by_text("BDIA: off by").inner_text()
        assert float(said.split("off by ")[1].split()[0]) < 1e-5
        said = tab.get_by_text("DDIM inversion: off by").inner_text()
        assert float(said.split("off by ")[1].split()[0]) > 1e-2
        shown = "() => [...document.images].filter(i => i.naturalWidth == 192).length"
        assert tab.evaluate(shown) == 6  # three for each solver, six times as large
        tab.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        before = tab.locator("img").first.get_attribute("src")
        tab.get_by_label("Prompt of the picture").fill("no emoji")
        run.click()
        tab.get_by_text("prompts of this model are subgroups of emoji").first.wait_for(
            timeout=30_000
        )
        tab.get_by_label("Model: a name").fill("os:getcwd")
        tab.get_by_role("button", name="Load the model").click()
        tab.get_by_text("functions are opened from the command line").wait_for(timeout=30_000)
        tab.get_by_label("Model: a name").fill("digits")
        tab.get_by_role("button", name="Load the model").click()
        tab.get_by_text("Loaded: digits").wait_for(timeout=60_000)
        tab.get_by_label("Prompt of the picture").fill("7")
        tab.get_by_role("button", name="Draw a picture of the prompt").click()
        drawn = "src => document.querySelector('img').src != src"
        tab.wait_for_function(drawn, arg=before, timeout=60_000)
        tab.wait_for_function("() => document.querySelector('img').naturalWidth == 200")
        tab.get_by_label("number input for Guidance").fill("3")
        tab.wait_for_timeout(500)
        tab.get_by_role("button", name="Draw a picture of the prompt").click()
        tab.get_by_text("guidance leads away from no prompt").first.wait_for(timeout=30_000)
        browser.close()
