"""The screenshot of the local web page in docs/command_line.md: writes ``app.png``.

python -m benchmarks.figures.page           # needs gradio, playwright and chromium
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from odesolvers.page import build

from ..common import IMAGES
from .gallery import save_photos

PORT = 7861


def main() -> None:
    """Serves the page, uses it once in a browser, and photographs it."""
    from playwright.sync_api import sync_playwright

    page = build("emoji", torch.device("cpu"))
    page.launch(server_name="127.0.0.1", server_port=PORT, prevent_thread_lock=True, quiet=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        save_photos(Path(folder, "photos"))
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 1000})
        tab.goto(f"http://127.0.0.1:{PORT}")
        tab.locator("input[type=file]").first.set_input_files(f"{folder}/photos/person.png")
        tab.get_by_label("Prompt of the picture").fill("person")
        tab.get_by_label("Prompt of the edit").fill("person, dark")
        tab.wait_for_timeout(2000)
        tab.get_by_role("button", name="Invert, go back and edit").click()
        tab.get_by_text("DDIM inversion: off by").wait_for(timeout=300_000)
        tab.wait_for_timeout(2000)
        tab.screenshot(path=IMAGES / "app.png")
        browser.close()
    page.close()


if __name__ == "__main__":
    main()
