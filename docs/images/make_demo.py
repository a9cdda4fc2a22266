"""
Makes the pictures of the pages anew, with Playwright and Chromium:

    python docs/images/make_demo.py runs/tiny-python-stdlib NODE_MODULES

demo.png is the page of `python -m generation_mini.demo`, and browser-page.png that of an ONNX export on a phone.
NODE_MODULES is the folder into which npm installed @huggingface/transformers.
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

PORT = "7868"
FOLDER = Path(__file__).parent


@contextlib.contextmanager
def page_of(command: list[str], **window: Any) -> Iterator[Page]:
    """The page that a server of ours shows, in a browser."""
    server = subprocess.Popen([sys.executable, "-m", *command])
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(**window)
            for _ in range(100):  # until it answers
                with contextlib.suppress(Exception):
                    page.goto(f"http://127.0.0.1:{PORT}/")
                    break
                assert server.poll() is None, "the server has ended"
                page.wait_for_timeout(1000)
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait()


def take_picture(page: Page, tokens: int, chosen: int, name: str) -> None:
    """Lets the page write and chooses a character of the text."""
    page.wait_for_selector("#write:enabled", timeout=60_000)
    page.evaluate("document.querySelector('#settings').open = true")
    page.fill("#prompt", "def ")
    page.fill("#max_new_tokens", str(tokens))
    page.fill("#seed", "3")
    page.evaluate("document.querySelector('#settings').open = matchMedia('(min-width: 60rem)').matches")
    page.click("#write")
    page.wait_for_function("document.querySelector('#status').textContent.includes('per second')", timeout=60_000)
    page.locator("#text .piece").nth(chosen).click()
    page.wait_for_timeout(2000)
    page.mouse.move(0, 0)
    page.screenshot(path=FOLDER / name)


def main(run: str, node_modules: str) -> None:
    demo = ["generation_mini.demo", "--model", run, "--port", PORT]
    with page_of(demo, viewport={"width": 1200, "height": 1000}, color_scheme="light") as page:
        take_picture(page, tokens=350, chosen=48, name="demo.png")
    with tempfile.TemporaryDirectory() as folder:
        export = ["modeling_mini.export", "onnx", run, f"{folder}/page", "--node_modules", node_modules]
        subprocess.run([sys.executable, "-m", *export], check=True)
        files = ["http.server", PORT, "--directory", f"{folder}/page"]
        with page_of(files, viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True) as page:
            take_picture(page, tokens=150, chosen=40, name="browser-page.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
