"""Pages in a real browser, as people use them."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
# The window of a laptop and of a phone, each in the colours of the day or of the night.
SCREENS = [(1280, 900, "light"), (1280, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]


@dataclass
class Opened:
    """A page that is open, and what went wrong or was asked of others since then."""

    page: Any
    wrong: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


Opener = Callable[..., AbstractContextManager[Opened]]


@contextlib.contextmanager
def chromium() -> Iterator[Opener]:
    """`open_page` in a Chromium that is started once; each page has a profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield functools.partial(open_page, browser)
        browser.close()


@contextlib.contextmanager
def open_page(
    browser: Any, url: str, width: int = 1280, height: int = 900, color_scheme: str = "light", script: str | None = None
) -> Iterator[Opened]:
    """A page; `script` runs before those of the page."""
    touch = {"has_touch": True, "is_mobile": True} if width < 500 else {}
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=color_scheme, **touch)
    with contextlib.closing(context):
        page = context.new_page()
        found = Opened(page)
        if script is not None:
            page.add_init_script(script)
        context.on(
            "request",
            lambda request: request.url.startswith((url, "data:")) or found.elsewhere.append(request.url),
        )
        page.on("console", lambda message: found.wrong.append(message.text))
        page.on("pageerror", lambda error: found.wrong.append(str(error)))
        page.goto(url)
        yield found


def write(page: Any, prompt: str, **settings: float) -> str:
    """Writes with the page by Ctrl-Enter; gives the text, prompt included, once it is complete."""
    page.wait_for_selector("#write:enabled")
    page.evaluate("document.querySelector('#settings').open = true")
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")
    page.wait_for_function("document.querySelector('#status').textContent.includes('per second')")
    return text_of(page)


def text_of(page: Any) -> str:
    """What is written, without the names of special tokens."""
    return page.evaluate(
        "[...document.querySelectorAll('#text .piece:not(.special)')].map(span => span.textContent).join('')"
    )


def colours_of(page: Any, selector: str = "#text .piece") -> list[str]:
    return page.eval_on_selector_all(selector, "all => all.map(each => getComputedStyle(each).backgroundColor)")


def share_of_red(page: Any, path: Path) -> float:
    """How much of the picture of the text is red, as a share of its pixels."""
    page.locator("#text").screenshot(path=path)
    pixels = Image.open(path).convert("RGB").get_flattened_data()
    return sum(red > green + 25 and red > blue + 25 for red, green, blue in pixels) / len(pixels)


def check_colours(page: Any) -> None:
    """Entropy and surprise recolour what stands there, on a scale that ends at the most of this text."""
    before, text, most = colours_of(page), text_of(page), page.inner_text("#most")
    assert len(set(before)) > 5, "a colour for each degree"
    assert float(most) == round(most_of(page, "entropy"), 1) and "unsure" in page.inner_text("#explanation")
    page.check("[name=measure][value=surprise]")
    assert colours_of(page) != before and text_of(page) == text
    assert float(page.inner_text("#most")) == round(most_of(page, "surprise"), 1)
    assert "unlikely" in page.inner_text("#explanation")
    page.check("[name=measure][value=entropy]")
    assert colours_of(page) == before


def most_of(page: Any, measure: str) -> float:
    return page.eval_on_selector_all(
        "#text .piece", f"all => Math.max(...all.map(each => Number(each.style.getPropertyValue('--{measure}'))))"
    )


def check_other_character(page: Any, number: int) -> None:
    """Choosing a piece shows what else was likely, and one of these in its place goes on from there."""
    piece = page.locator("#text .piece").nth(number)
    piece.scroll_into_view_if_needed()
    piece.click()
    figures = page.text_content("#figures")
    assert "probability of" in figures and "bits of entropy" in figures, figures
    others = page.locator("#others button")
    assert others.count() == 5
    names = others.locator("span:first-child").all_inner_texts()
    # A token may be half a character, which the next one completes.
    chosen = next(i for i, name in enumerate(names) if len(name.strip("“”")) == 1 or name in ("space", "bos", "eos"))
    name = names[chosen]
    assert others.nth(chosen).get_attribute("aria-label").startswith(f"Go on with {name}, ")
    written = page.locator("#text .piece").all_text_contents()
    before = written[:number]
    page.evaluate("document.querySelector('#status').textContent = ''")
    temperature = page.input_value("#temperature")
    page.fill("#temperature", "")  # as with Write, the browser asks for a number
    others.nth(chosen).click()
    assert page.text_content("#status") == "" and page.locator("#text .piece").all_text_contents() == written
    page.fill("#temperature", temperature)
    others.nth(chosen).click()
    page.wait_for_function("document.querySelector('#status').textContent.includes('per second')")
    after = page.locator("#text .piece").all_text_contents()
    assert after[:number] == before and len(after) > number + 1
    assert after[number] == {"space": " "}.get(name, name.strip("“”"))


def check_stop(page: Any) -> None:
    """Stop is there only while a text is written, and what was written stays."""
    assert page.is_hidden("#stop")
    page.evaluate("document.querySelector('#status').textContent = ''")
    page.fill("#max_new_tokens", "2000")
    page.fill("#seed", "")
    page.click("#write")
    page.wait_for_selector("#stop:visible")
    page.wait_for_function("document.querySelectorAll('#text .piece').length >= 40")
    assert page.is_disabled("#write")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#status').textContent.startsWith('Stopped.')")
    assert page.is_hidden("#stop") and page.is_enabled("#write")
    length = len(text_of(page))
    page.wait_for_timeout(300)
    assert 20 < len(text_of(page)) == length < 1900


def check_layout(page: Any) -> None:
    """Nothing is wider than the window, and what is written can be read on its ground."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for selector in ("body", ".primary", "#others button"):
        ink, ground = page.eval_on_selector(
            selector,
            """each => {
                const { color, backgroundColor } = getComputedStyle(each);
                return [color, backgroundColor].map((text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number));
            }""",
        )
        assert contrast(ink, ground) >= 4.5, selector


def contrast(*colours: list[float]) -> float:
    """The contrast ratio of WCAG."""
    linear = [[v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
              for colour in colours]  # fmt: skip
    low, high = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear)
    return (high + 0.05) / (low + 0.05)
