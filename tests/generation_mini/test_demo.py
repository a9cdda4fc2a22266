"""The page of the demo, in a real browser and without one."""

import contextlib
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_mini import demo
from generation_mini.arguments import GenerationArguments
from generation_mini.demo import Character, as_html, follow
from helpers.programs import ROOT
from modeling_mini.loading.checkpoints import load_model
from PIL import Image
from torch.nn import functional as F

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def characters_of(views: Iterator[list]) -> list[Character]:
    return [each for view in views for each in view]


def test_bits_are_those_of_the_model(quick_run: Path) -> None:
    """Against one forward over the whole text."""
    model, tokenizer = load_model(str(quick_run))
    arguments = GenerationArguments(max_new_tokens=30, temperature=0.8, top_k=20, seed=3)
    characters = characters_of(follow(model, tokenizer, "the ", arguments))
    text = "".join(character.text for character in characters)
    ids = tokenizer("the ").input_ids
    written = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        log_probabilities = F.log_softmax(model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1], dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1) / math.log(2)
    surprise = -log_probabilities[range(len(written)), written] / math.log(2)
    assert len(written) == 30
    assert [bits for each in characters for bits in each.entropy] == pytest.approx(entropy.tolist(), abs=1e-4)
    assert [bits for each in characters for bits in each.surprise] == pytest.approx(surprise.tolist(), abs=1e-4)
    again = characters_of(follow(model, tokenizer, "the ", arguments))
    assert "".join(character.text for character in again) == text


def test_what_takes_the_loop_of_transformers_is_followed_too(quick_run: Path) -> None:
    """As models with an adapter and those of other families do."""
    model, tokenizer = load_model(str(quick_run))
    arguments = GenerationArguments(max_new_tokens=20, temperature=0.0)
    fast = characters_of(follow(model, tokenizer, "the ", arguments))
    model.set_attn_implementation("eager")
    slow = characters_of(follow(model, tokenizer, "the ", arguments))
    assert [each.text for each in slow] == [each.text for each in fast] and len(fast) >= 10
    for a, b in zip(slow, fast, strict=True):
        assert a.entropy == pytest.approx(b.entropy, abs=1e-3) and a.surprise == pytest.approx(b.surprise, abs=1e-3)


def test_leaving_the_page_ends_the_text(quick_run: Path) -> None:
    model, tokenizer = load_model(str(quick_run))
    before = set(threading.enumerate())
    views = follow(model, tokenizer, "the ", GenerationArguments(max_new_tokens=1_000_000, temperature=1.0))
    next(views)
    started = time.monotonic()
    views.close()  # waits for the thread, which has to notice
    assert time.monotonic() - started < 20 and set(threading.enumerate()) <= before


def test_notices_and_errors_reach_the_page(quick_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(str(quick_run))
    views = follow(model, tokenizer, "x" * 100, GenerationArguments(max_new_tokens=3))
    assert "only the last 31 tokens" in characters_of(views)[0]
    monkeypatch.setattr(model, "generate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        characters_of(follow(model, tokenizer, "x", GenerationArguments(max_new_tokens=3)))


def test_colours_and_escapes() -> None:
    page = as_html("<b>", [Character("<", [0.0], [1.0]), Character("é", [8.0, 8.0], [2.0, 3.0])], "entropy", 256)
    assert "&lt;b&gt;" in page and "<b>" not in page and ">&lt;</span>" in page
    assert re.findall(r"rgba\(220, 60, 20, ([\d.]+)\)", page) == ["0.000", "0.850"]
    assert "entropy 8.00 and surprise 2.00 bits, entropy 8.00 and surprise 3.00 bits" in page


@contextlib.contextmanager
def served(run: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "generation_mini.demo", "--model", str(run), "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, cwd=run,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + 100
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def settled(page: Any) -> str:
    """The text on the page once it does not change any more."""
    text = page.inner_text("#output .text")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        page.wait_for_timeout(1000)
        before, text = text, page.inner_text("#output .text")
        if text == before:
            return text
    raise AssertionError("the text never ends")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_in_a_browser(quick_run: Path, tmp_path: Path) -> None:
    """Write a text, look at the picture, change the colours, stop a long one."""
    from playwright.sync_api import sync_playwright

    with served(quick_run) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(url)
        page.wait_for_selector("h3")
        assert page.title() == "Mini: tiny-sample" and page.inner_text("h3") == "tiny-sample"
        assert str(quick_run.parent) not in page.content(), "a folder of this machine is nothing to show"
        page.fill("#prompt textarea", "the <b>cat</b> ")
        page.fill("#tokens input[type=number]", "60")
        page.fill("#seed input", "1")
        page.click("#write")
        page.wait_for_function("document.querySelectorAll('#output .character').length >= 50")
        first = settled(page)
        assert first.startswith("the <b>cat</b> ") and len(first) > 60
        page.check("#measure input[value=surprise]")
        page.click("#write")
        page.wait_for_function("document.querySelector('#output').innerText.includes('bits of surprise')")
        page.wait_for_function("document.querySelectorAll('#output .character').length >= 50")
        assert settled(page) == first, "the same seed writes the same text"
        colours = page.eval_on_selector_all(
            "#output .character", "spans => spans.map(span => getComputedStyle(span).backgroundColor)"
        )
        assert len(set(colours)) > 10, "one colour for each degree of surprise"
        assert "entropy" in page.get_attribute("#output .character", "title")
        picture = tmp_path / "page.png"
        page.locator("#output .text").screenshot(path=picture)
        pixels = Image.open(picture).convert("RGB").get_flattened_data()
        reddish = sum(red > green + 25 and red > blue + 25 for red, green, blue in pixels)
        assert reddish > 0.02 * len(pixels), "what the browser shows is coloured"

        page.fill("#tokens input[type=number]", "2000")
        page.click("#write")
        page.wait_for_function("document.querySelectorAll('#output .character').length >= 100")
        page.click("#stop")
        assert len(settled(page)) < 1900
        browser.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "port must be from 1 to 65535, got 0"),
        (["--model", "./none"], "There is no run or checkpoint folder './none'"),
        (["--modle", "a"], "did you mean 'model'?"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["generation_mini.demo", *arguments])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and message in errors and errors.count("\n") == 1


def test_bad_input_of_the_command(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "generation_mini.demo", "--port", "0"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr == "error: port must be from 1 to 65535, got 0.\n"
