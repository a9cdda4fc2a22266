"""
Makes demo.png anew: `python docs/images/make_demo.py runs/tiny-python-stdlib`, with the page, Playwright and Chromium.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PORT = "7868"


def main(run: str) -> None:
    server = subprocess.Popen([sys.executable, "-m", "generation_mini.demo", "--model", run, "--port", PORT])
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 760}, color_scheme="light")
            for _ in range(100):  # until the model is loaded
                try:
                    page.goto(f"http://127.0.0.1:{PORT}/")
                    break
                except Exception as error:
                    assert server.poll() is None, error
                    page.wait_for_timeout(1000)
            page.fill("#prompt textarea", "def ")
            page.fill("#tokens input[type=number]", "400")
            page.fill("#seed input", "3")
            page.click("#write")
            text = ""
            while text != (text := page.inner_text("#output")) or "bits" not in text:
                page.wait_for_timeout(2000)
            page.mouse.move(0, 0)
            page.screenshot(path=Path(__file__).with_name("demo.png"))
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
