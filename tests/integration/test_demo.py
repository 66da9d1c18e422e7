"""The demo's page in a real browser: headless Chromium, where the machine has it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrl_ray.config import ControlConfig
from tests.policies import save_gains_adapter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CONTROL = ControlConfig(oracle="jpeg_size", thresholds=(1500.0,), unit="bytes")


@pytest.fixture
def address(tiny_pipeline: Path, tmp_path: Path) -> Iterator[str]:
    """Of the page that the command serves, until the test ends."""
    adapter = save_gains_adapter(tmp_path / "run" / "adapter", tiny_pipeline, {"size": CONTROL}, by=0.1)
    command = [sys.executable, "-m", "ctrl_ray.demo", "--adapter", str(adapter), "--port", "0"]
    with (tmp_path / "log").open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.fullmatch(r"open (http://127\.0\.0\.1:\d+/) in a browser; Ctrl-C ends it\n", line)
        assert found, (line, (tmp_path / "log").read_text())
        yield found[1]
    finally:
        server.terminate()
        assert server.wait(30) == 0


def test_a_prompt_and_a_class_become_pictures_with_their_measured_values(address: str) -> None:
    """Nothing is asked of another address; bad input shows its message on the page."""
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.fill("#prompt textarea", "a blue cross")
        page.click("#control-0 input")
        page.click("ul[role=listbox] >> text=<1500")
        page.click("#draw")
        page.wait_for_selector("#pictures .after img")
        captions = page.locator("#pictures figcaption").all_inner_texts()
        assert len(captions) == 8
        for index, caption in enumerate(captions):
            when, size, mark = re.fullmatch(r"(before|after) size (\d+) bytes (✓|✗)", caption).groups()  # type: ignore[union-attr]
            assert when == ("before", "after")[index % 2] and (mark == "✓") == (int(size) < 1500)
        for index in range(8):
            assert page.locator("#pictures img").nth(index).evaluate("image => image.naturalWidth") == 32
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.fill("#prompt textarea", "")
        page.click("#draw")
        page.wait_for_selector("text=the prompt is empty; type what the image should show")
        browser.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
